"""The encoders that can be exported: the built-in one, published ones, and whatever ``pretrain`` made."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fseft_edge.export.checkpoints import ModelDescription, ModelFile, read_checkpoint, read_model_file
from fseft_edge.runtime.errors import CheckpointError, UsageError
from fseft_edge.runtime.preprocessing import Preprocessing

CUSTOM = "custom"

_UNIVERSAL_ORGANS = (
    "spleen",
    "right_kidney",
    "left_kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "postcava",
    "portal_and_splenic_vein",
    "pancreas",
    "right_adrenal_gland",
    "left_adrenal_gland",
    "duodenum",
    "bladder",
    "prostate_or_uterus",
    "liver_tumour",
    "kidney_tumour",
    "kidney_cyst",
    "celiac_trunk",
    "right_lung",
    "left_lung",
    "bone",
    "brain",
    "lung_tumour",
    "pancreas_tumour",
    "hepatic_vessel",
    "hepatic_vessel_tumour",
    "colon_tumour",
)


@dataclass(frozen=True)
class ModelSpec:
    """A model that has a name here.

    Attributes:
        name: what ``--model`` calls it.
        origin: where it comes from, for people.
        built_in: the model file within the package, or ``None`` when a checkpoint must be given.
        published: what a published checkpoint does not say about itself; ``None`` for a model file, which does.
        classifier: name of the published checkpoint's 1x1x1 convolution behind the encoder.
    """

    name: str
    origin: str
    built_in: str | None = None
    published: ModelDescription | None = None
    classifier: str = ""


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("edge_base", "compact residual U-Net, part of fseft-edge", built_in="encoders/edge_base.safetensors"),
        ModelSpec(
            "fseft",
            "SwinUNETR-48 of Silva-Rodriguez et al., Medical Image Analysis 103 (2025) 103596, file fseft.pth",
            published=ModelDescription(
                name="fseft",
                architecture="swin_unetr",
                settings={"feature_size": 48},
                preprocessing=Preprocessing(axcodes="RAS", spacing=(1.5, 1.5, 1.5), hu_window=(-175.0, 250.0)),
                window=(96, 96, 96),
                organs=_UNIVERSAL_ORGANS,
            ),
            classifier="classifier",
        ),
        ModelSpec(CUSTOM, "a model file that `fseft-edge pretrain` wrote"),
    )
}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model and the file it was read from."""

    model: ModelFile
    source: Path


def load_model(name: str, checkpoint: Path | None) -> LoadedModel:
    """Return a model of the zoo.

    Args:
        name: one of :data:`MODELS`.
        checkpoint: its file; ``None`` for a built-in model.

    Raises:
        UsageError: when the name is unknown, or a checkpoint is missing or too much.
        CheckpointError: when the file is not a checkpoint of that model.
    """
    spec = MODELS.get(name)
    if spec is None:
        raise UsageError(f"The model {name!r} is unknown.", remedy=f"Choose one of {', '.join(MODELS)}.")
    if spec.built_in is not None:
        if checkpoint is not None:
            raise UsageError(
                f"The model {name} is built in and takes no checkpoint.",
                remedy=f"Leave {checkpoint} out, or say --model {CUSTOM} for a model file of your own.",
            )
        checkpoint = Path(str(resources.files("fseft_edge").joinpath(spec.built_in)))
    if checkpoint is None:
        raise UsageError(f"The model {name} needs its checkpoint ({spec.origin}).", remedy="Name the file.")
    if spec.published is None:
        return LoadedModel(read_model_file(checkpoint), checkpoint)
    return LoadedModel(_published(spec.published, spec.classifier, checkpoint), checkpoint)


def _published(description: ModelDescription, classifier: str, checkpoint: Path) -> ModelFile:
    """Return a published checkpoint as a model of ours: its classifier taken off, everything else the encoder."""
    weights = read_checkpoint(checkpoint)
    weight, bias = weights.pop(f"{classifier}.weight", None), weights.pop(f"{classifier}.bias", None)
    if weight is None or bias is None:
        raise CheckpointError(
            f"{checkpoint} has no classifier {classifier!r} behind the encoder.",
            remedy=f"Check that it is the checkpoint of --model {description.name}.",
        )
    return ModelFile(description, weights, weight.float().flatten(1), bias.float())
