"""Read published checkpoints: translate their key names to ours, and their classifier to the head.

A :class:`Layout` describes the file of a release. It must list every part of the file that is neither encoder nor
classifier. Therefore a checkpoint of another network is refused with the names of its unexpected keys, and is never
loaded partially.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fseft_edge.export.checkpoints import ModelDescription, ModelFile, first_names, load_weights, read_checkpoint
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.errors import CheckpointError

_WRAPPERS = ("module.", "backbone.")  # prefixes from data-parallel training, and from a network inside another network
_TRANSFORMER = "swinViT"
_CONSTANT = "relative_position_index"  # computed from the attention window; only some releases of MONAI store it
_SEED = 0

_NEVER_READ = tuple(f"encoder{number}.layer.conv3.conv.weight" for number in (2, 3, 4, 10))
"""Unused weights: MONAI before 0.9 created a skip convolution in residual blocks of equal widths, but never used it."""

_TEXT_HEAD = ("organ_embedding", "text_to_vision", "controller", "GAP", "precls_conv")
"""Parts of the CLIP-driven universal model's head, which computes its classifier from the scan and from texts."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Layout of a release's state dict, after the prefixes of wrappers are removed.

    Attributes:
        classifiers: possible names of the 1x1x1 convolution after the encoder.
        needs_classifier: whether a file without a classifier is refused; if not, such a file gives an encoder without
            organs.
        background: whether the classifier's first row is the background class of a softmax.
        transformer_only: whether the file contains only a Swin transformer, without the rest of the network.
        dropped: parts that are neither encoder nor classifier, given as the first component of their keys.
        unread: keys, or last components of keys, that a release may contain but the network never uses.
        sized_by: setting that determines the width of the network, and the key whose first dimension is this width.
    """

    classifiers: tuple[str, ...] = ()
    needs_classifier: bool = False
    background: bool = False
    transformer_only: bool = False
    dropped: tuple[str, ...] = ()
    unread: tuple[str, ...] = _NEVER_READ
    sized_by: tuple[str, str] = ("feature_size", "swinViT.patch_embed.proj.weight")


FSEFT = Layout(classifiers=("classifier",), needs_classifier=True)
UNIVERSAL_SWIN = Layout(classifiers=("classifier", "out.conv.conv"), dropped=_TEXT_HEAD)
CLIP_DRIVEN = Layout(dropped=(*_TEXT_HEAD, "out"))
BTCV = Layout(classifiers=("out.conv.conv",), needs_classifier=True, background=True)
SELF_SUPERVISED = Layout(
    transformer_only=True,
    dropped=("rotation_head", "contrastive_head", "conv", "convTrans3d", "norm"),
)
UNIVERSAL_UNET = Layout(
    classifiers=("out_tr.final_conv", "classifier.final_conv", "classifier"),
    dropped=_TEXT_HEAD,
    unread=("running_mean", "running_var", "num_batches_tracked"),
    sized_by=("width", "down_tr64.ops.0.conv1.weight"),
)


def read_published(description: ModelDescription, layout: Layout, path: Path) -> ModelFile:
    """Return the model of a published checkpoint, with a complete state dict of the encoder.

    If the file contains only a transformer (``layout.transformer_only``), the other parts are initialised from a fixed
    seed. If the head is followed by a softmax with a background class, its rows become ``w_k - w_0``: the logit of
    organ k against only the background. The softmax assigns a voxel to the organ with the largest of these logits if
    this logit is above 0, else to the background.

    Args:
        description: metadata that the checkpoint does not contain; ``organs`` becomes empty if the file has no usable
            classifier.
        layout: layout of the release.
        path: checkpoint file.

    Raises:
        CheckpointError: the file cannot be read safely, belongs to another network or another network size, or has
            keys that are missing, unexpected or of another shape.
    """
    weights = _translated(read_checkpoint(path), layout, path)
    network = _fresh_network(description)
    expected = network.state_dict()
    _check_layout(weights, expected, layout, path)
    _check_size(weights, description, layout, path)
    conditioned = any(_part(key) in _TEXT_HEAD for key in weights)
    weights = {key: value for key, value in weights.items() if _part(key) not in layout.dropped}
    head = _take_head(weights, layout, path, conditioned=conditioned)
    for key, value in expected.items():
        if key.endswith(_CONSTANT) and not torch.equal(weights.setdefault(key, value), value):
            raise CheckpointError(
                f"The value of {key} in {path} differs: the attention windows are not the windows of the model "
                f"{description.name}.",
                remedy=_OTHER_NETWORK,
            )
        if layout.transformer_only and _part(key) != _TRANSFORMER:
            weights.setdefault(key, value)
    load_weights(network, weights, source=str(path), remedy=_OTHER_NETWORK)
    if head is not None and not _fits(head[0], description, layout, path):
        head = None
    if head is None:
        description = description.model_copy(update={"organs": ()})
        head = torch.zeros(0, network.levels[0].channels), torch.zeros(0)
    weight, bias = head
    if layout.background:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    untrained = sorted({_part(key) for key in expected} - {_TRANSFORMER}) if layout.transformer_only else ()
    return ModelFile(description, network.state_dict(), weight, bias, tuple(untrained))


_OTHER_NETWORK = (
    "Check that --model names the network of this checkpoint (`fseft-edge models` lists all names). Describe a network "
    "that is not listed with --model custom --description FILE."
)


def _translated(weights: Mapping[str, Tensor], layout: Layout, path: Path) -> dict[str, Tensor]:
    """Return the tensors under our names: without wrappers' prefixes, with equal names for all MONAI releases."""
    named: list[tuple[str, Tensor]] = []
    for key, value in weights.items():
        name = key
        while name.startswith(_WRAPPERS):
            name = name.partition(".")[2]
        name = name.replace("swin_vit.", f"{_TRANSFORMER}.").replace(".mlp.fc", ".mlp.linear")
        if layout.transformer_only and name.startswith(("patch_embed.", "layers")):
            name = f"{_TRANSFORMER}.{name}"
        if not {name, name.rpartition(".")[2]} & set(layout.unread):
            named.append((name, value))
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise CheckpointError(
            f"{path} contains {first_names(twice)} more than once, under different prefixes.",
            remedy="Give a file with the weights of only one network.",
        )
    return dict(named)


def _fresh_network(description: ModelDescription) -> FeatureNetwork:
    """Return the network, initialised from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return build_network(description.architecture, **description.settings)


def _check_layout(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], layout: Layout, path: Path) -> None:
    parts = sorted({_part(key) for key in weights})
    if not weights.keys() & expected.keys():
        raise CheckpointError(
            f"{path} contains no weights of this network. The file contains {len(weights)} tensors "
            f"({first_names(weights)}) of the parts {first_names(parts)}.",
            remedy=_OTHER_NETWORK,
        )
    if layout.transformer_only and any(part.startswith("decoder") for part in parts):
        raise CheckpointError(
            f"{path} contains a decoder, so the file is a fine-tuned network and not the self-supervised transformer.",
            remedy="If the network was fine-tuned on BTCV, export the file with --model btcv.",
        )


def _check_size(weights: Mapping[str, Tensor], description: ModelDescription, layout: Layout, path: Path) -> None:
    setting, key = layout.sized_by
    wanted, found = description.settings[setting], weights[key].shape[0] if key in weights else None
    if found not in (None, wanted):
        raise CheckpointError(
            f"{path} contains a network with {setting.replace('_', ' ')} {found}; the model {description.name} has "
            f"{wanted}.",
            remedy=f"Download the release's file with {setting.replace('_', ' ')} {wanted}, or describe your network "
            "with --model custom --description FILE.",
        )


def _take_head(
    weights: dict[str, Tensor], layout: Layout, path: Path, *, conditioned: bool
) -> tuple[Tensor, Tensor] | None:
    """Remove the classifier from the weights, and return its weight ``[K, C_0]`` and bias ``[K]``, or None."""
    found = [name for name in layout.classifiers if f"{name}.weight" in weights and f"{name}.bias" in weights]
    if not found and layout.needs_classifier:
        raise CheckpointError(
            f"{path} contains no classifier {' or '.join(map(repr, layout.classifiers))}.",
            remedy=_OTHER_NETWORK,
        )
    heads = [(weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias")) for name in found]
    if not heads or conditioned:
        # If the release computes its head from texts, the classifier of the backbone was never trained.
        _log.info("%s contains no usable classifier; the encoder bundle will contain no organs", path)
        return None
    weight, bias = heads[0]
    return weight.float().flatten(1), bias.float()


def _fits(weight: Tensor, description: ModelDescription, layout: Layout, path: Path) -> bool:
    """Return whether a classifier has the number of rows of the release.

    Raises:
        CheckpointError: the number of rows differs, and the layout needs the classifier.
    """
    rows = len(description.organs) + layout.background
    if weight.shape[0] == rows:
        return True
    found = f"The classifier in {path} has {weight.shape[0]} rows; the model {description.name} has {rows} rows"
    if layout.needs_classifier:
        raise CheckpointError(f"{found}.", remedy=_OTHER_NETWORK)
    _log.warning("%s. The classifier is not used; the encoder bundle will contain no organs.", found)
    return False


def _part(key: str) -> str:
    return key.partition(".")[0]
