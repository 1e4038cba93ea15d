"""Predict the peak memory of the tensors in an encoder's forward pass, from the shapes of the tensors.

The peak is computed with formulas. Running the network on tensors without values (PyTorch's meta device) would give the
same result, but needs 80 MB of memory. The formulas follow the code of the networks in this package at the places where
memory peaks; tests compare them with the storages that the networks really allocate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from fseft_edge.runtime.encoder.networks import IMPORTED
from fseft_edge.runtime.encoder.networks.med_adapter import hidden_channels
from fseft_edge.runtime.errors import EncoderBundleError

Window = tuple[int, int, int]

_FLOAT = 4
_SLAB, _FINE_LEVELS = 4, 2  # as in slabwise.py
_FILTER_TENSORS = 7  # number of tensors of a Med-Adapter's narrow path that exist during its frequency filter
_ATTENTION_WINDOW, _HEADS = 7, 3  # of the first stage of a SwinUNETR, which needs the most memory


def activation_bytes(architecture: str, settings: Mapping[str, Any], window: Window, *, slabwise: bool) -> int:
    """Return the peak bytes of the tensors for one window, including the returned pyramid.

    Args:
        architecture: architecture name for :func:`fseft_edge.runtime.encoder.networks.build_network`.
        settings: settings of the architecture from a bundle's manifest.
        window: size of the window, ``[X, Y, Z]`` in voxels.
        slabwise: whether a compact encoder is computed slab by slab.

    Raises:
        EncoderBundleError: this version does not know the architecture.
    """
    if architecture == "residual_unet":
        channels = cast("Sequence[int]", settings["channels"])
        plain = _slabwise_unet(channels, window) if slabwise else _residual_unet(channels, window)
        return _FLOAT * (plain if settings.get("inserts") is None else _with_med_adapters(plain, channels, window))
    if architecture == "swin_unetr":  # inserts are negligible compared with the attention scores
        return _FLOAT * _swin_unetr(int(settings.get("feature_size", 48)), window)
    if architecture == "genesis_unet":
        channels = [2 * int(settings.get("width", 32)) * 2**level for level in range(4)]
        plain = _genesis_unet(channels, window)
        return _FLOAT * (plain if settings.get("inserts") is None else _with_med_adapters(plain, channels, window))
    if architecture == IMPORTED:
        return int(settings["activation_bytes"])
    raise EncoderBundleError(
        f"This version of fseft-edge does not know the encoder architecture {architecture!r}.",
        remedy="Update fseft-edge, or export the encoder again with this version.",
    )


def _genesis_unet(channels: Sequence[int], window: Window) -> int:
    """Return the peak number of elements.

    The peak is in a decoder level: upsampled features of twice the level's width, the skip, and both concatenated.
    """
    sizes = _level_sizes(channels, window)
    return max(sum(sizes) + 5 * size for size in sizes[:-1])


def _level_sizes(channels: Sequence[int], window: Window) -> list[int]:
    """Return the number of elements of each stage's features."""
    return [width * math.prod(window) // 8**level for level, width in enumerate(channels)]


def _residual_unet(channels: Sequence[int], window: Window) -> int:
    """Return the peak number of elements.

    All skips stay in memory until the end. A decoder level also needs its input of twice the width and two tensors of
    the residual block.
    """
    sizes = _level_sizes(channels, window)
    down = max(sum(sizes[:level]) + 2 * size for level, size in enumerate(sizes))
    up = max(sum(sizes) + sum(sizes[level + 1 : -1]) + 4 * size for level, size in enumerate(sizes[:-1]))
    return max(down, up)


def _slabwise_unet(channels: Sequence[int], window: Window) -> int:
    """Return the peak number of elements.

    The decoder's features replace the skips in place. In addition, one slab needs its input, inner tensor, result and
    shortcut.
    """
    sizes = _level_sizes(channels, window)
    up = 0
    for level, (width, size) in enumerate(zip(channels[:-1], sizes[:-1], strict=True)):
        kept = sum(sizes[:-1]) if level + 2 < len(sizes) else sum(sizes)
        if level < _FINE_LEVELS:
            plane = math.prod(window[1:]) // 4**level
            slab = (_SLAB + 2) * 3 * width + 3 * 2 * width + 2 * _SLAB * width
            up = max(up, kept + slab * plane)
        else:
            up = max(up, kept + 4 * size)
    return up


def _with_med_adapters(plain: int, channels: Sequence[int], window: Window) -> int:
    """Return the peak number of elements with Med-Adapters.

    The peak is in a decoder level, as without adapters, or in the adapter of a stage: the stage's features twice, and
    the tensors of the narrow path.
    """
    sizes, narrow = _level_sizes(channels, window), _level_sizes([*map(hidden_channels, channels)], window)
    within = 0
    for level, (size, inner) in enumerate(zip(sizes, narrow, strict=True)):
        kept = sum(sizes[:level]) + (narrow[level - 1] if level else 0)
        within = max(within, kept + 2 * size + 3 * inner, kept + size + _FILTER_TENSORS * inner)
    return max(plain + narrow[-1], within)


def _swin_unetr(width: int, window: Window) -> int:
    """Return the peak number of elements.

    The peak is in the attention of the first stage (scores twice, their mask, tokens) or in the last decoder block, at
    full resolution.
    """
    tokens = math.prod(
        math.ceil(size // 2 / _ATTENTION_WINDOW) * _ATTENTION_WINDOW if size // 2 > _ATTENTION_WINDOW else size // 2
        for size in window
    )
    within = math.prod(min(_ATTENTION_WINDOW, size // 2) for size in window)
    scores = tokens * within
    attention = (2 * _HEADS + 1) * scores + 10 * width * tokens
    decoder = math.ceil(7.5 * width * math.prod(window))
    return max(attention, decoder)
