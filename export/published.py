"""Published checkpoints: their key names become ours, their classifier the head, and nothing else is let through.

A :class:`Layout` says what a release's file looks like. What it holds besides the encoder and its classifier has to be
named there, so that a checkpoint of another network is refused with the keys that show it, and never half loaded.
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

_WRAPPERS = ("module.", "backbone.")  # of data-parallel training, and of a network within another
_TRANSFORMER = "swinViT"
_CONSTANT = "relative_position_index"  # follows from the window of attention; not every release of MONAI stores it
_SEED = 0

_NEVER_READ = tuple(f"encoder{number}.layer.conv3.conv.weight" for number in (2, 3, 4, 10))
"""MONAI before 0.9 gave residual blocks of equal widths a convolution for their skip too, and did not use it."""

_TEXT_HEAD = ("organ_embedding", "text_to_vision", "controller", "GAP", "precls_conv")
"""The head of the CLIP-driven universal model, whose classifier is computed from the scan and from texts."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """What a release's state dict looks like, once the prefixes of wrappers are gone.

    Attributes:
        classifiers: names that the 1x1x1 convolution behind the encoder may have.
        needs_classifier: whether a file without one is refused; else it gives an encoder without organs.
        background: whether the classifier's first row is the background of a softmax.
        transformer_only: whether the file holds a Swin transformer alone, not the network around it.
        dropped: parts that are neither encoder nor classifier, by the first word of their keys.
        unread: keys, or last words of keys, that a release may store and its network never reads.
        sized_by: the setting that says how wide the network is, and the key whose first dimension shows it.
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
    """Return a published checkpoint as a model of ours; its encoder's state dict is complete.

    Parts that the file does not hold (``layout.transformer_only``) are freshly initialised from a fixed seed. A head
    behind a softmax with background becomes rows ``w_k - w_0``, whose logit is that of organ k against background
    alone; the largest of them, where it is above 0, is the softmax's own decision.

    Args:
        description: what a checkpoint does not say about itself; a file without a classifier leaves its organs out.
        layout: of the release.
        path: the checkpoint.

    Raises:
        CheckpointError: when the file cannot be read safely, is of another network or size, or has keys that are
            missing, unexpected or of another shape.
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
                f"{path} has another {key}: its attention windows are not {description.name}'s.",
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
    "Check that --model names the network that the checkpoint was made for (`fseft-edge models`); a network that is "
    "not listed is described by --model custom --description FILE."
)


def _translated(weights: Mapping[str, Tensor], layout: Layout, path: Path) -> dict[str, Tensor]:
    """Return the tensors under our names: wrappers' prefixes off, newer and older names of MONAI's parts made one."""
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
            f"{path} holds {first_names(twice)} more than once, under different prefixes.",
            remedy="Give a file with the weights of one network.",
        )
    return dict(named)


def _fresh_network(description: ModelDescription) -> FeatureNetwork:
    """Return the architecture, initialised the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return build_network(description.architecture, **description.settings)


def _check_layout(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], layout: Layout, path: Path) -> None:
    parts = sorted({_part(key) for key in weights})
    if not weights.keys() & expected.keys():
        raise CheckpointError(
            f"{path} has none of this network's weights; it has {len(weights)} tensors ({first_names(weights)}) "
            f"of the parts {first_names(parts)}.",
            remedy=_OTHER_NETWORK,
        )
    if layout.transformer_only and any(part.startswith("decoder") for part in parts):
        raise CheckpointError(
            f"{path} has a decoder: it is a network that was fine-tuned, not the self-supervised transformer alone.",
            remedy="Export the one that was fine-tuned on BTCV with --model btcv.",
        )


def _check_size(weights: Mapping[str, Tensor], description: ModelDescription, layout: Layout, path: Path) -> None:
    setting, key = layout.sized_by
    wanted, found = description.settings[setting], weights[key].shape[0] if key in weights else None
    if found not in (None, wanted):
        raise CheckpointError(
            f"{path} is a network of {setting.replace('_', ' ')} {found}; {description.name} has {wanted}.",
            remedy=f"Fetch the release's file of {setting.replace('_', ' ')} {wanted}, or describe a network of your "
            "own with --model custom --description FILE.",
        )


def _take_head(
    weights: dict[str, Tensor], layout: Layout, path: Path, *, conditioned: bool
) -> tuple[Tensor, Tensor] | None:
    """Take the classifier out of the weights; return its weight ``[K, C_0]`` and bias ``[K]``, or None."""
    found = [name for name in layout.classifiers if f"{name}.weight" in weights and f"{name}.bias" in weights]
    if not found and layout.needs_classifier:
        raise CheckpointError(
            f"{path} has no classifier {' or '.join(map(repr, layout.classifiers))} behind the encoder.",
            remedy=_OTHER_NETWORK,
        )
    heads = [(weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias")) for name in found]
    if not heads or conditioned:
        # Beside a head that is computed from texts, the backbone's own classifier was never trained.
        _log.info("%s: no classifier of fixed rows, so the encoder knows no organ by itself", path)
        return None
    weight, bias = heads[0]
    return weight.float().flatten(1), bias.float()


def _fits(weight: Tensor, description: ModelDescription, layout: Layout, path: Path) -> bool:
    """Return whether a classifier has the release's rows; one that has others is refused where it is needed."""
    rows = len(description.organs) + layout.background
    if weight.shape[0] == rows:
        return True
    found = f"The classifier in {path} has {weight.shape[0]} rows, not the {rows} of {description.name}"
    if layout.needs_classifier:
        raise CheckpointError(f"{found}.", remedy=_OTHER_NETWORK)
    _log.warning("%s: it is left out, and the encoder knows no organ by itself", found)
    return False


def _part(key: str) -> str:
    return key.partition(".")[0]
