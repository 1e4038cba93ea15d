"""The encoders that can be exported: the built-in one, published ones, and whatever ``pretrain`` made."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fseft_edge.export import published
from fseft_edge.export.checkpoints import ModelDescription, ModelFile, read_model_file
from fseft_edge.export.published import Layout, read_published
from fseft_edge.runtime.encoder.bundle import sha256_of_file
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.preprocessing import Preprocessing

CUSTOM = "custom"

_log = logging.getLogger(__name__)

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


_BTCV_ORGANS = _UNIVERSAL_ORGANS[:13]


@dataclass(frozen=True)
class ModelSpec:
    """A model that has a name here.

    Attributes:
        name: what ``--model`` calls it.
        origin: what it is and the paper that it comes from, for people.
        repository: the authors' project.
        file: what the authors call the checkpoint; empty where none is fetched.
        licence: of the weights, as far as known here; the authors' own word counts.
        sha256: of the checkpoint, where known.
        built_in: the model file within the package, or ``None`` when a checkpoint must be given.
        published: what a published checkpoint does not say about itself; ``None`` for a model file, which does.
        layout: of a published checkpoint.
    """

    name: str
    origin: str
    repository: str = ""
    file: str = ""
    licence: str = ""
    sha256: str | None = None
    built_in: str | None = None
    published: ModelDescription | None = None
    layout: Layout | None = None


def _as_fseft(name: str, organs: tuple[str, ...], architecture: str = "swin_unetr") -> ModelDescription:
    """Return a network under the preprocessing that FSEFT's ``models/configs.py`` gives all published ones."""
    return ModelDescription(
        name=name,
        architecture=architecture,
        settings={"feature_size": 48} if architecture == "swin_unetr" else {"width": 32},
        preprocessing=Preprocessing(axcodes="RAS", spacing=(1.5, 1.5, 1.5), hu_window=(-175.0, 250.0)),
        window=(96, 96, 96),
        organs=organs,
    )


_UNKNOWN_LICENCE = "not known here: read what the authors say"
_SUPREM_LICENCE = "the authors' terms differ from place to place (Apache-2.0, CC BY-NC-ND 4.0): ask them"
_MONAI = "Project-MONAI/research-contributions, SwinUNETR"
_TANG = "Tang et al., Self-Supervised Pre-Training of Swin Transformers, CVPR 2022"
_LI = "Li et al., How Well Do Supervised 3D Models Transfer to Medical Imaging Tasks?, ICLR 2024"

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "edge_base",
            "compact residual U-Net, part of fseft-edge",
            licence="as fseft-edge",
            built_in="encoders/edge_base.safetensors",
        ),
        ModelSpec(
            "fseft",
            "SwinUNETR-48 of Silva-Rodriguez et al., Medical Image Analysis 103 (2025) 103596",
            repository="jusiro/fewshot-finetuning",
            file="fseft.pth",
            licence=_UNKNOWN_LICENCE,
            published=_as_fseft("fseft", _UNIVERSAL_ORGANS),
            layout=published.FSEFT,
        ),
        ModelSpec(
            "suprem_swinunetr",
            f"SuPreM's SwinUNETR-48: {_LI}",
            repository="MrGiovanni/SuPreM",
            file="supervised_suprem_swinunetr_2100.pth",
            licence=_SUPREM_LICENCE,
            sha256="b1672096465974502ccd5e2f2e5fce2ce214d6fb9848b23fc24f7b8888ffb4a3",
            published=_as_fseft("suprem_swinunetr", _UNIVERSAL_ORGANS),
            layout=published.UNIVERSAL_SWIN,
        ),
        ModelSpec(
            "suprem_unet",
            f"SuPreM's U-Net, the network of Models Genesis: {_LI}",
            repository="MrGiovanni/SuPreM",
            file="supervised_suprem_unet_2100.pth",
            licence=_SUPREM_LICENCE,
            sha256="c8dc39c86cd8d715e5ef0b5bb4ba4335ba45237127829ea016f75ee8beca0a93",
            published=_as_fseft("suprem_unet", _UNIVERSAL_ORGANS, "genesis_unet"),
            layout=published.UNIVERSAL_UNET,
        ),
        ModelSpec(
            "clipdriven",
            "SwinUNETR-48 without its head, made from texts: Liu et al., CLIP-Driven Universal Model, ICCV 2023",
            repository="ljwztc/CLIP-Driven-Universal-Model",
            file="supervised_clip_driven_universal_swin_unetr_2100.pth",
            licence=_UNKNOWN_LICENCE,
            published=_as_fseft("clipdriven", ()),
            layout=published.CLIP_DRIVEN,
        ),
        ModelSpec(
            "btcv",
            f"SwinUNETR-48 fine-tuned on BTCV: {_TANG}",
            repository=_MONAI,
            file="swin_unetr.base_5000ep_f48_lr2e-4_pretrained.pt",
            licence="Apache-2.0, as the project says of itself",
            published=_as_fseft("btcv", _BTCV_ORGANS),
            layout=published.BTCV,
        ),
        ModelSpec(
            "selfsup",
            f"the transformer of a SwinUNETR-48, self-supervised; its decoder is new and to be trained: {_TANG}",
            repository=_MONAI,
            file="model_swinvit.pt",
            licence="Apache-2.0, as the project says of itself",
            published=_as_fseft("selfsup", ()),
            layout=published.SELF_SUPERVISED,
        ),
        ModelSpec(CUSTOM, "a model file that `fseft-edge pretrain` wrote, or a network of your own (--description)"),
    )
}


def models() -> tuple[ModelSpec, ...]:
    """Return every model that has a name, with where it comes from; the twin of ``fseft-edge models``."""
    return tuple(MODELS.values())


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model and the file it was read from.

    Attributes:
        model: encoder and head.
        source: the file.
        network: the encoder itself, where its architecture is none that
            :func:`fseft_edge.runtime.encoder.networks.build_network` knows.
    """

    model: ModelFile
    source: Path
    network: FeatureNetwork | None = None


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
        named = f"{spec.file}, {spec.origin}" if spec.file else spec.origin
        raise UsageError(f"The model {name} needs its checkpoint ({named}).", remedy="Name the file.")
    if spec.published is None or spec.layout is None:
        return LoadedModel(read_model_file(checkpoint), checkpoint)
    model = read_published(spec.published, spec.layout, checkpoint)
    if spec.sha256 is not None and sha256_of_file(checkpoint) != spec.sha256:
        _log.warning(
            "%s is not the file that was known as %s when this version was made (its sha256 differs): it may be "
            "another release of it. Its weights are those of the expected network.",
            checkpoint,
            spec.file,
        )
    if spec.layout.transformer_only:
        _log.warning(
            "%s holds a transformer alone: the decoder is new, with random weights, and features mean little until it "
            "is trained (`fseft-edge pretrain`).",
            checkpoint,
        )
    return LoadedModel(model, checkpoint)
