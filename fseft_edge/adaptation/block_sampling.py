"""Which blocks of a support set an adapter learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adapters.blocks import Box, read_block, stack_blocks
from fseft_edge.adapters.network import Adapter
from fseft_edge.runtime.encoder.feature_map import FeatureMap
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.intensities import HuPercentiles
from fseft_edge.runtime.scans.volume import LabelMap

_POSITIONS = 4000


@dataclass(frozen=True)
class SupportScan:
    """One annotated scan on the grid.

    Attributes:
        features: its cached feature map.
        shape: grid voxels that belong to the scan, ``[X, Y, Z]``; the map may be padded beyond them.
        occupancy: share of each voxel that each organ fills.
        annotated: bool ``[K]``; False where nobody contoured the organ in this scan, which then says nothing on it.
        volumes_mm3: volume of each organ on the source lattice, 0 where not annotated.
        grid: the scan's grid; None where nobody validates on the scan.
        reference: its annotation on its own lattice, and the label value of each organ; likewise.
        hu: of each organ, None where not annotated; empty where nobody asks for them.
        variations: the scan as another patient and another scanner might have shown it
            (:mod:`fseft_edge.adaptation.augmentation`); an adapter that may not see the scan may not see these.
    """

    features: FeatureMap
    shape: tuple[int, int, int]
    occupancy: Occupancy
    annotated: NDArray[np.bool_]
    volumes_mm3: tuple[float, ...]
    grid: Grid | None = None
    reference: tuple[LabelMap, tuple[int, ...]] | None = None
    hu: tuple[HuPercentiles | None, ...] = ()
    variations: tuple[SupportScan, ...] = ()


def with_variations(support: Sequence[SupportScan]) -> list[SupportScan]:
    """Return the scans of a support set, and behind them all their variations."""
    return [*support, *(variation for scan in support for variation in scan.variations)]


@dataclass(frozen=True)
class Batch:
    """Blocks of one optimiser step, on the adapter's device.

    Attributes:
        features: each level's part, ``[n, C_l, ...]``.
        targets: ``[n, K, X, Y, Z]``.
        annotated: ``[n, K]``.
    """

    features: list[Tensor]
    targets: Tensor
    annotated: Tensor


@dataclass(frozen=True)
class Positions:
    """Grid positions ``[m, 3]`` of each annotated organ present, and the scan's shape to draw anywhere from."""

    organs: tuple[NDArray[np.int64], ...]
    shape: tuple[int, int, int]


class BlockSampler:
    """Draws batches of blocks from a support set, half of them around organs; scans take turns.

    Args:
        adapter: decides what is read around a block.
        support: the scans.
        block: edge of a block in voxels.
        batch: blocks a batch.
        random: decides on everything.

    Attributes:
        core: where the blocks' voxels lie, for :meth:`Adapter.forward`; the blocks of a batch share their alignment.
    """

    def __init__(
        self, adapter: Adapter, support: Sequence[SupportScan], *, block: int, batch: int, random: np.random.Generator
    ) -> None:
        self._adapter, self._support, self._random = adapter, support, random
        self._block, self._batch = block, batch
        self._positions = [organ_positions(scan, random) for scan in support]
        self._order: list[int] = []
        self._drawn = 0
        self.core = Box((0, block), (0, block), (0, block))

    def draw(self) -> Batch:
        """Return the next batch; scans take turns, positive and negative blocks alternate."""
        device = self._adapter.device
        blocks, targets, annotated = [], [], []
        for _ in range(self._batch):
            if not self._order:
                self._order = list(self._random.permutation(len(self._support)))
            index = self._order.pop()
            scan = self._support[index]
            centre = draw_centre(self._positions[index], self._random, positive=self._drawn % 2 == 0)
            self._drawn += 1
            core = aligned_core(centre, self._block, self._adapter)
            blocks.append(read_block(scan.features, self._adapter.boxes(core), device))
            targets.append(scan.occupancy.block(core))
            annotated.append(torch.from_numpy(scan.annotated).float())
        return Batch(stack_blocks(blocks), torch.stack(targets).to(device), torch.stack(annotated).to(device))


def organ_positions(scan: SupportScan, random: np.random.Generator) -> Positions:
    """Return where the organs of a scan lie, at most 4000 voxels of each."""
    organs = []
    for organ in range(len(scan.occupancy)):
        positions = scan.occupancy.positions(organ)
        if len(positions) > _POSITIONS:
            positions = random.choice(positions, _POSITIONS, replace=False)
        if len(positions):
            organs.append(positions)
    return Positions(tuple(organs), scan.shape)


def draw_centre(positions: Positions, random: np.random.Generator, *, positive: bool) -> NDArray[np.int64]:
    """Return a voxel of an organ, off by up to 8 (positive), or any voxel of the scan."""
    if positive and positions.organs:
        organ = positions.organs[random.integers(len(positions.organs))]
        centre: NDArray[np.int64] = organ[random.integers(len(organ))] + random.integers(-8, 9, 3)
        return centre
    return random.integers(0, positions.shape)


def aligned_core(centre: NDArray[np.int64], edge: int, adapter: Adapter) -> Box:
    """Return a block around ``centre`` that starts on the coarsest level's lattice, as blocks of one batch must."""
    stride = adapter.levels[-1].stride
    starts = [int(c - edge // 2 + stride // 2) // stride * stride for c in centre]
    return Box(*((start, start + edge) for start in starts))
