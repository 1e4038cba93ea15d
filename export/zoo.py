"""Models that can be exported: the built-in model, published models, and model files of ``fseft-edge pretrain``."""

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
    """A model that ``--model`` can name.

    Attributes:
        name: name of the model for ``--model``.
        origin: description for the user, with the paper.
        repository: repository of the authors' project.
        file: name of the checkpoint file in the authors' release; empty if no file needs to be downloaded.
        licence: licence of the weights as far as known; the statement of the authors is decisive.
        sha256: sha256 of the checkpoint, or ``None`` if it is unknown.
        built_in: path of the model file inside the package, or ``None`` if the user must give a checkpoint.
        published: metadata that a published checkpoint does not contain; ``None`` for a model file, which contains its
            metadata.
        layout: layout of a published checkpoint; ``None`` for a model file.
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
    """Return metadata with the preprocessing that FSEFT's ``models/configs.py`` uses for all published networks."""
    return ModelDescription(
        name=name,
        architecture=architecture,
        settings={"feature_size": 48} if architecture == "swin_unetr" else {"width": 32},
        preprocessing=Preprocessing(axcodes="RAS", spacing=(1.5, 1.5, 1.5), hu_window=(-175.0, 250.0)),
        window=(96, 96, 96),
        organs=organs,
    )


_UNKNOWN_LICENCE = "unknown: read the terms of the authors"
_SUPREM_LICENCE = "the authors state two different licences (Apache-2.0, CC BY-NC-ND 4.0): ask the authors"
_MONAI = "Project-MONAI/research-contributions, SwinUNETR"
_TANG = "Tang et al., Self-Supervised Pre-Training of Swin Transformers, CVPR 2022"
_LI = "Li et al., How Well Do Supervised 3D Models Transfer to Medical Imaging Tasks?, ICLR 2024"

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "edge_base",
            "compact residual U-Net, part of fseft-edge",
            licence="the licence of fseft-edge (Apache-2.0)",
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
            "SwinUNETR-48 without its text-based head: Liu et al., CLIP-Driven Universal Model, ICCV 2023",
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
            licence="Apache-2.0, as stated by the project",
            published=_as_fseft("btcv", _BTCV_ORGANS),
            layout=published.BTCV,
        ),
        ModelSpec(
            "selfsup",
            f"self-supervised transformer of a SwinUNETR-48, with an untrained decoder: {_TANG}",
            repository=_MONAI,
            file="model_swinvit.pt",
            licence="Apache-2.0, as stated by the project",
            published=_as_fseft("selfsup", ()),
            layout=published.SELF_SUPERVISED,
        ),
        ModelSpec(CUSTOM, "a model file of `fseft-edge pretrain`, or a network of your own (--description)"),
    )
}


def described(model: ModelSpec) -> ModelDescription | None:
    """Return network, preprocessing and organs of a model; None if they depend on the file that the user gives."""
    return model.published if model.built_in is None else load_model(model.name, None).model.description


def models() -> tuple[ModelSpec, ...]:
    """Return all models that ``--model`` can name; ``fseft-edge models`` prints this list."""
    return tuple(MODELS.values())


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model and the file from which it was read.

    Attributes:
        model: encoder and head.
        source: path of the file.
        network: encoder as a PyTorch network, if :func:`fseft_edge.runtime.encoder.networks.build_network` cannot build
            it; else ``None``.
    """

    model: ModelFile
    source: Path
    network: FeatureNetwork | None = None


def load_model(name: str, checkpoint: Path | None) -> LoadedModel:
    """Return a model with its weights.

    Args:
        name: name of the model in :data:`MODELS`.
        checkpoint: checkpoint file; ``None`` for a built-in model.

    Raises:
        UsageError: the name is unknown, the checkpoint is missing, or a checkpoint is given for a built-in model.
        CheckpointError: the file is not a checkpoint of the model.
    """
    spec = MODELS.get(name)
    if spec is None:
        raise UsageError(f"The model {name!r} is unknown.", remedy=f"Choose one of these models: {', '.join(MODELS)}.")
    if spec.built_in is not None:
        if checkpoint is not None:
            raise UsageError(
                f"The model {name} is built in, but the checkpoint {checkpoint} is given.",
                remedy=f"Leave out the checkpoint, or write --model {CUSTOM} to export a model file of your own.",
            )
        checkpoint = Path(str(resources.files("fseft_edge").joinpath(spec.built_in)))
    if checkpoint is None:
        named = f"{spec.file}, {spec.origin}" if spec.file else spec.origin
        raise UsageError(
            f"The model {name} needs a checkpoint ({named}), but no file is given.",
            remedy="Give the path of the checkpoint file.",
        )
    if spec.published is None or spec.layout is None:
        return LoadedModel(read_model_file(checkpoint), checkpoint)
    model = read_published(spec.published, spec.layout, checkpoint)
    if spec.sha256 is not None and sha256_of_file(checkpoint) != spec.sha256:
        _log.warning(
            "The sha256 of %s is not the sha256 of the known file %s. The file may be another release. The weights "
            "match the expected network.",
            checkpoint,
            spec.file,
        )
    if spec.layout.transformer_only:
        _log.warning(
            "%s contains only a transformer. The decoder has random weights, so the features are not useful until the "
            "decoder is trained (`fseft-edge pretrain`).",
            checkpoint,
        )
    return LoadedModel(model, checkpoint)
