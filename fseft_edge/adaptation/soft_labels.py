"""Occupancy: the share of each grid voxel that an organ fills, stored only in the bounding box of the organ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fseft_edge.adapters.blocks import Box
from fseft_edge.runtime.scans.components import bounding_box

_HALF = 127
_FULL = 255


@dataclass(frozen=True, eq=False)
class _Patch:
    """Shares of one organ in its bounding box, uint8 ``[x, y, z]`` with 255 for a full voxel, and the box start."""

    values: NDArray[np.uint8]
    start: tuple[int, int, int]


class Occupancy:
    """The share of each grid voxel that each organ of a scan fills.

    Args:
        shares: for each organ, the shares of all grid voxels from 0 to 1, float ``[X, Y, Z]``; the arrays are read one
            after another, so that only one has to be in memory.
    """

    def __init__(self, shares: Iterable[NDArray[np.floating]]) -> None:
        self._patches = tuple(_patch(share) for share in shares)

    def __len__(self) -> int:
        return len(self._patches)

    def block(self, core: Box) -> Tensor:
        """Return the shares of a block from 0 to 1, float32 ``[K, *core.shape]``; outside the scan, shares are 0."""
        block = torch.zeros(len(self), *core.shape)
        for organ, patch in enumerate(self._patches):
            source: list[slice] = []
            target: list[slice] = []
            for (low, high), first, size in zip(core.ranges, patch.start, patch.values.shape, strict=True):
                begin, end = max(low, first), min(high, first + size)
                source.append(slice(begin - first, max(begin, end) - first))
                target.append(slice(begin - low, max(begin, end) - low))
            part = patch.values[tuple(source)]
            if part.size:
                block[organ][tuple(target)] = torch.from_numpy(part.astype(np.float32) / _FULL)
        return block

    def positions(self, organ: int) -> NDArray[np.int64]:
        """Return the positions ``[m, 3]`` of the voxels that the organ fills by at least half, in memory order."""
        patch = self._patches[organ]
        positions: NDArray[np.int64] = np.argwhere(patch.values > _HALF) + np.asarray(patch.start)
        return positions


def _patch(share: NDArray[np.floating]) -> _Patch:
    values = np.rint(_FULL * share).astype(np.uint8)
    if not values.any():
        return _Patch(np.zeros((0, 0, 0), np.uint8), (0, 0, 0))
    box = bounding_box(values > 0)
    return _Patch(values[box].copy(), (box[0].start, box[1].start, box[2].start))
