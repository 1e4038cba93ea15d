"""Blocks of a cached feature map: which part of every level a block of the finest level depends on, and reading it.

A feature map is taken to continue beyond its border by repeating its edge, at every level. What an adapter computes
for a voxel then depends on the voxel's position relative to the map alone, never on how the map was cut into blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fseft_edge.runtime.encoder.feature_map import FeatureMap

Range = tuple[int, int]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Box:
    """A box of voxels, half-open ranges along x, y and z; it may reach beyond the map."""

    x: Range
    y: Range
    z: Range

    @property
    def ranges(self) -> tuple[Range, Range, Range]:
        """The three ranges in order."""
        return self.x, self.y, self.z

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along x, y and z."""
        return (self.x[1] - self.x[0], self.y[1] - self.y[0], self.z[1] - self.z[0])

    def grown(self, halo: int) -> Box:
        """Return the box with ``halo`` more voxels on every side."""
        return Box(*((low - halo, high + halo) for low, high in self.ranges))

    def coarser(self) -> Box:
        """Return the voxels of the next level (twice the stride) that trilinear interpolation reads for this box.

        Voxel ``i`` lies at ``(i + 1/2) / 2 - 1/2`` of the coarser level, between that position's two neighbours.
        """
        return Box(*(((low - 1) // 2, high // 2 + 1) for low, high in self.ranges))


def upsample_into(coarse: Tensor, coarse_box: Box, box: Box) -> Tensor:
    """Return ``coarse`` interpolated trilinearly to the next finer level, cut to ``box``.

    Interpolation is linear in every axis, so it is three products with small matrices: several times faster than
    PyTorch's own kernel forwards and backwards, and nothing outside the box is computed.

    Args:
        coarse: ``[n, C, *coarse_box.shape]``.
        coarse_box: where it lies; contains ``box.coarser()``.
        box: what is wanted, in voxels of the finer level.
    """
    # While a graph is traced, tensors stand for values and must not stay behind in a cache.
    interpolation = _interpolation if torch.compiler.is_exporting() else _cached_interpolation
    x, y, z = (
        interpolation(low - 2 * coarse_low, high - low, coarse_high - coarse_low, coarse.device).to(coarse.dtype)
        for (low, high), (coarse_low, coarse_high) in zip(box.ranges, coarse_box.ranges, strict=True)
    )
    count, channels, extent, *_ = coarse.shape
    along_z = coarse.reshape(-1, coarse.shape[-1]) @ z.T
    along_y = y @ along_z.view(count, channels, extent, -1, len(z))
    return (x @ along_y.flatten(3)).view(count, channels, *box.shape)


@torch.inference_mode(mode=False)  # what is cached has to serve training too
def _interpolation(first: int, wanted: int, given: int, device: torch.device) -> Tensor:
    """Return the matrix ``[wanted, given]`` of linear interpolation along one axis to twice as many voxels.

    Args:
        first: of the wanted voxels, counted from the first that the given ones turn into.
        wanted: how many.
        given: how many.
        device: where the matrix is needed.
    """
    fine = np.arange(first, first + wanted)
    matrix = np.zeros((wanted, given), np.float32)
    matrix[fine - first, fine // 2] = 0.75
    matrix[fine - first, fine // 2 + 2 * (fine % 2) - 1] = 0.25
    return torch.from_numpy(matrix).to(device)


_cached_interpolation = functools.lru_cache(maxsize=256)(_interpolation)


def read_block(features: FeatureMap, boxes: Sequence[Box], device: torch.device = _CPU) -> list[Tensor]:
    """Return each level's box as float32 ``[1, C_l, *box.shape]``, repeating the map's edge outside.

    Args:
        features: the cached map.
        boxes: one box a level, finest first, in voxels of that level; fewer boxes than levels read only the first.
        device: where the blocks are wanted; they travel there as they are stored.
    """
    return [_read_level(features, level, box, device) for level, box in enumerate(boxes)]


def surrounded(levels: Sequence[Tensor], boxes: Sequence[Box]) -> list[Tensor]:
    """Return what :func:`read_block` returns of a map that is held in memory and lies whole within every box.

    Args:
        levels: the whole map, ``[n, C_l, X / s_l, Y / s_l, Z / s_l]`` a level, finest first.
        boxes: one box a level, as for :func:`read_block`; each contains its level.
    """
    blocks = []
    for level, box in zip(levels, boxes, strict=False):
        padding: list[int] = []
        for (low, high), size in zip(box.ranges, level.shape[2:], strict=True):
            padding = [-low, high - size, *padding]
        blocks.append(F.pad(level, padding, mode="replicate") if any(padding) else level)
    return blocks


def _read_level(features: FeatureMap, level: int, box: Box, device: torch.device) -> Tensor:
    stride = features.levels[level].stride
    inside: list[Range] = []
    padding: list[int] = []
    for (low, high), size in zip(box.ranges, features.padded_shape, strict=True):
        last = size // stride
        start, stop = min(max(low, 0), last - 1), max(min(high, last), 1)
        inside.append((start, stop))
        padding = [start - low, high - stop, *padding]
    block = features.read(level, *inside).to(device).float()[None]
    return F.pad(block, padding, mode="replicate") if any(padding) else block


def tiles(shape: tuple[int, int, int], tile: tuple[int, int, int]) -> Iterator[Box]:
    """Yield boxes that cover ``shape`` without overlap, slice ranges outermost so that results stream along z."""
    starts = [range(0, size, step) for size, step in zip(shape, tile, strict=True)]
    for z in starts[2]:
        for x in starts[0]:
            for y in starts[1]:
                yield Box(*((s, min(s + t, n)) for s, t, n in zip((x, y, z), tile, shape, strict=True)))


def stack_blocks(blocks: Sequence[list[Tensor]]) -> list[Tensor]:
    """Return blocks of equal shape as one batch, level by level."""
    return [torch.cat(level) for level in zip(*blocks, strict=True)]
