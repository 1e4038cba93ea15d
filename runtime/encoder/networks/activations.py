"""How much memory the tensors of an encoder's forward pass take at most, from shapes alone.

Formulas, because what could find out by running the network on tensors without values (PyTorch's meta device) keeps
80 MB of its own in memory. They follow the networks beside this file, line by line where memory peaks, and are tested
against every storage that the networks really make.
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
_SLAB, _FINE_LEVELS = 4, 2  # of slabwise.py
_FILTERED = 7  # tensors of a Med-Adapter's narrow path at a time, its frequency filter at work
_ATTENTION_WINDOW, _HEADS = 7, 3  # of a SwinUNETR's first stage, which is its largest


def activation_bytes(architecture: str, settings: Mapping[str, Any], window: Window, *, slabwise: bool) -> int:
    """Return the most bytes that tensors of one window hold at a time, the returned pyramid included.

    Args:
        architecture: a name that :func:`fseft_edge.runtime.encoder.networks.build_network` knows.
        settings: of that architecture, as a bundle's manifest holds them.
        window: ``[X, Y, Z]`` voxels.
        slabwise: whether a compact encoder is computed slab by slab.

    Raises:
        EncoderBundleError: for an architecture that this version does not know.
    """
    if architecture == "residual_unet":
        channels = cast("Sequence[int]", settings["channels"])
        plain = _slabwise_unet(channels, window) if slabwise else _residual_unet(channels, window)
        return _FLOAT * (plain if settings.get("inserts") is None else _with_adapters(plain, channels, window))
    if architecture == "swin_unetr":  # what is inserted is small beside attention's scores
        return _FLOAT * _swin_unetr(int(settings.get("feature_size", 48)), window)
    if architecture == "genesis_unet":
        channels = [2 * int(settings.get("width", 32)) * 2**level for level in range(4)]
        plain = _genesis_unet(channels, window)
        return _FLOAT * (plain if settings.get("inserts") is None else _with_adapters(plain, channels, window))
    if architecture == IMPORTED:
        return int(settings["activation_bytes"])
    raise EncoderBundleError(
        f"The encoder architecture {architecture!r} is unknown to this version.",
        remedy="Update fseft-edge, or export the encoder again with this version.",
    )


def _genesis_unet(channels: Sequence[int], window: Window) -> int:
    """Merging a level holds upsampled features of twice its width, its skip, and both side by side."""
    sizes = _level_sizes(channels, window)
    return max(sum(sizes) + 5 * size for size in sizes[:-1])


def _level_sizes(channels: Sequence[int], window: Window) -> list[int]:
    """Return the elements of each stage's features."""
    return [width * math.prod(window) // 8**level for level, width in enumerate(channels)]


def _residual_unet(channels: Sequence[int], window: Window) -> int:
    """Every skip stays to the end; merging a level holds its input of twice the width and two tensors of the block."""
    sizes = _level_sizes(channels, window)
    down = max(sum(sizes[:level]) + 2 * size for level, size in enumerate(sizes))
    up = max(sum(sizes) + sum(sizes[level + 1 : -1]) + 4 * size for level, size in enumerate(sizes[:-1]))
    return max(down, up)


def _slabwise_unet(channels: Sequence[int], window: Window) -> int:
    """Features replace skips in place; beside them there is one slab's input, inner tensor, result and shortcut."""
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


def _with_adapters(plain: int, channels: Sequence[int], window: Window) -> int:
    """Memory peaks while merging as before, or in the adapter of a stage: its features twice and the narrow path."""
    sizes, narrow = _level_sizes(channels, window), _level_sizes([*map(hidden_channels, channels)], window)
    within = 0
    for level, (size, inner) in enumerate(zip(sizes, narrow, strict=True)):
        kept = sum(sizes[:level]) + (narrow[level - 1] if level else 0)
        within = max(within, kept + 2 * size + 3 * inner, kept + size + _FILTERED * inner)
    return max(plain + narrow[-1], within)


def _swin_unetr(width: int, window: Window) -> int:
    """Attention of the first stage: scores twice, their mask, tokens; or the last decoder block, at full resolution."""
    tokens = math.prod(
        math.ceil(size // 2 / _ATTENTION_WINDOW) * _ATTENTION_WINDOW if size // 2 > _ATTENTION_WINDOW else size // 2
        for size in window
    )
    within = math.prod(min(_ATTENTION_WINDOW, size // 2) for size in window)
    scores = tokens * within
    attention = (2 * _HEADS + 1) * scores + 10 * width * tokens
    decoder = math.ceil(7.5 * width * math.prod(window))
    return max(attention, decoder)
