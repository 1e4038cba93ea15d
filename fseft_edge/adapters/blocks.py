"""Blocks of a cached feature map: which voxels of every level a block of the finest level needs, and how to read them.

Beyond its border, a feature map is continued by repeating its edge voxels, at every level. The result of an adapter for
a voxel therefore depends only on the position of the voxel in the map, and not on the division of the map into blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fseft_edge.runtime.encoder.feature_map import Features, Range

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Box:
    """A box of voxels as half-open ranges along x, y and z. The box may extend beyond the map."""

    x: Range
    y: Range
    z: Range

    @property
    def ranges(self) -> tuple[Range, Range, Range]:
        """The ranges along x, y and z."""
        return self.x, self.y, self.z

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along x, y and z."""
        return (self.x[1] - self.x[0], self.y[1] - self.y[0], self.z[1] - self.z[0])

    def grown(self, halo: int) -> Box:
        """Return the box with ``halo`` more voxels on every side."""
        return Box(*((low - halo, high + halo) for low, high in self.ranges))

    def coarser(self) -> Box:
        """Return the voxels of the next level (twice the stride) that trilinear interpolation to this box needs.

        The centre of voxel ``i`` is at the coordinate ``(i + 1/2) / 2 - 1/2`` of the coarser level. The interpolation
        uses the two voxels next to that coordinate.
        """
        return Box(*(((low - 1) // 2, high // 2 + 1) for low, high in self.ranges))


def upsample_into(coarse: Tensor, coarse_box: Box, box: Box) -> Tensor:
    """Interpolate ``coarse`` trilinearly to the next finer level, and return the voxels of ``box``.

    Trilinear interpolation is linear along every axis, so three products with small matrices compute the result. This
    is several times faster than the kernel of PyTorch, forwards and backwards, and computes nothing outside the box.

    Args:
        coarse: values of the coarser level, ``[n, C, *coarse_box.shape]``.
        coarse_box: position of ``coarse``, in voxels of the coarser level; contains ``box.coarser()``.
        box: the voxels to compute, in voxels of the finer level.

    Returns:
        ``[n, C, *box.shape]``.
    """
    x, y, z = interpolation_matrices(coarse_box, box, coarse)
    count, channels, extent, *_ = coarse.shape
    along_z = coarse.reshape(-1, coarse.shape[-1]) @ z.T
    along_y = y @ along_z.view(count, channels, extent, -1, len(z))
    return (x @ along_y.flatten(3)).view(count, channels, *box.shape)


def interpolation_matrices(coarse_box: Box, box: Box, coarse: Tensor) -> list[Tensor]:
    """Return the matrices ``[fine, coarse]`` along x, y and z that interpolate one level to the next finer level.

    Args:
        coarse_box: position of the coarse voxels; contains ``box.coarser()``.
        box: the voxels to compute, in voxels of the finer level.
        coarse: tensor of the coarser level, whose device and type the matrices get.
    """
    # The tracing of a graph replaces tensors by placeholders. A placeholder must not remain in the cache.
    interpolation = _interpolation if torch.compiler.is_exporting() else _cached_interpolation
    return [
        interpolation(low - 2 * coarse_low, high - low, coarse_high - coarse_low, coarse.device).to(coarse.dtype)
        for (low, high), (coarse_low, coarse_high) in zip(box.ranges, coarse_box.ranges, strict=True)
    ]


@torch.inference_mode(mode=False)  # training uses the cached matrices, too
def _interpolation(first: int, fine_count: int, coarse_count: int, device: torch.device) -> Tensor:
    """Return the matrix ``[fine_count, coarse_count]`` that doubles the resolution along one axis by interpolation.

    Args:
        first: index of the first fine voxel to compute; index 0 is the first half of coarse voxel 0.
        fine_count: number of fine voxels to compute.
        coarse_count: number of coarse voxels that are available.
        device: device of the matrix.
    """
    fine = np.arange(first, first + fine_count)
    matrix = np.zeros((fine_count, coarse_count), np.float32)
    matrix[fine - first, fine // 2] = 0.75
    matrix[fine - first, fine // 2 + 2 * (fine % 2) - 1] = 0.25
    return torch.from_numpy(matrix).to(device)


_cached_interpolation = functools.lru_cache(maxsize=256)(_interpolation)


def read_block(features: Features, boxes: Sequence[Box], device: torch.device = _CPU) -> list[Tensor]:
    """Return the box of each level as float32 ``[1, C_l, *box.shape]``; outside the map, repeat its edge voxels.

    Args:
        features: the cached feature map.
        boxes: one box per level, finest level first, in voxels of that level. Levels without a box are not read.
        device: device of the result. The values are copied to the device in their stored type.
    """
    return [_read_level(features, level, box, device) for level, box in enumerate(boxes)]


def pad_to_boxes(levels: Sequence[Tensor], boxes: Sequence[Box]) -> list[Tensor]:
    """Return the levels of a map in memory, padded to ``boxes`` by repeating the edge voxels, like :func:`read_block`.

    Args:
        levels: the complete map, one tensor ``[n, C_l, X / s_l, Y / s_l, Z / s_l]`` per level, finest level first.
        boxes: one box per level, in voxels of that level; each box contains its complete level.
    """
    blocks = []
    for level, box in zip(levels, boxes, strict=False):
        padding: list[int] = []
        for (low, high), size in zip(box.ranges, level.shape[2:], strict=True):
            padding = [-low, high - size, *padding]
        blocks.append(F.pad(level, padding, mode="replicate") if any(padding) else level)
    return blocks


def _read_level(features: Features, level: int, box: Box, device: torch.device) -> Tensor:
    stride = features.levels[level].stride
    inside: list[Range] = []
    padding: list[int] = []
    for (low, high), size in zip(box.ranges, features.padded_shape, strict=True):
        last = -(-size // stride)
        start, stop = min(max(low, 0), last - 1), max(min(high, last), 1)
        inside.append((start, stop))
        padding = [start - low, high - stop, *padding]
    block = features.read(level, *inside).to(device).float()[None]
    return F.pad(block, padding, mode="replicate") if any(padding) else block


def tiles(shape: tuple[int, int, int], tile: tuple[int, int, int]) -> Iterator[Box]:
    """Yield boxes that cover ``shape`` without overlap. The outer loop is over z, so that results stream along z."""
    starts = [range(0, size, step) for size, step in zip(shape, tile, strict=True)]
    for z in starts[2]:
        for x in starts[0]:
            for y in starts[1]:
                yield Box(*((s, min(s + t, n)) for s, t, n in zip((x, y, z), tile, shape, strict=True)))


def stack_blocks(blocks: Sequence[list[Tensor]]) -> list[Tensor]:
    """Return blocks of equal shape as one batch, one tensor per level."""
    return [torch.cat(level) for level in zip(*blocks, strict=True)]
