"""Selection of the blocks of a support set that an adapter is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fseft_edge.adaptation.patients import SupportIdentity
from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adapters.blocks import Box, read_block, stack_blocks
from fseft_edge.adapters.network import Adapter
from fseft_edge.runtime.encoder.feature_map import Features
from fseft_edge.runtime.scans.annotation import Annotation
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.intensities import HuPercentiles

_MAX_POSITIONS = 4000


@dataclass(frozen=True)
class SupportScan:
    """One annotated scan on the grid.

    Attributes:
        features: cached feature map of the scan.
        shape: grid shape of the scan, ``(X, Y, Z)``; the feature map may be padded beyond it.
        occupancy: share of each voxel that each organ fills.
        annotated: bool ``[K]``; False if the organ is not annotated in this scan. The scan is then not used for that
            organ.
        volumes_mm3: volume of each organ on the lattice of the scan; 0 for an organ that is not annotated.
        grid: grid of the scan; None if the scan is not used for cross-validation.
        reference: annotation on the lattice of the scan, and the label value of each organ; None if the scan is not
            used for cross-validation.
        hu: HU percentiles of each organ; None for an organ that is not annotated. The tuple is empty if no HU are
            needed.
        variations: variations of the scan (:mod:`fseft_edge.adaptation.augmentation`). If cross-validation leaves the
            scan out, it leaves out the variations, too.
        identity: case name and hashes of the scan and its annotation; None if they are not known.
        region: boxes of the grid in which the centres of blocks lie, because the windows around them are encoded; empty
            if blocks may lie anywhere.
        located: boxes of the grid in which the scan is segmented if it is left out; None segments the whole scan.
    """

    features: Features
    shape: tuple[int, int, int]
    occupancy: Occupancy
    annotated: NDArray[np.bool_]
    volumes_mm3: tuple[float, ...]
    grid: Grid | None = None
    reference: tuple[Annotation, tuple[int, ...]] | None = None
    hu: tuple[HuPercentiles | None, ...] = ()
    variations: tuple[SupportScan, ...] = ()
    identity: SupportIdentity | None = None
    region: tuple[Box, ...] = ()
    located: tuple[Box, ...] | None = None


def with_variations(support: Sequence[SupportScan]) -> list[SupportScan]:
    """Return the scans of a support set, followed by the variations of all scans."""
    return [*support, *(variation for scan in support for variation in scan.variations)]


@dataclass(frozen=True)
class Batch:
    """Blocks of one training step, on the device of the adapter.

    Attributes:
        features: features of each level, ``[n, C_l, ...]``.
        targets: share of each voxel that each organ fills, ``[n, K, X, Y, Z]``.
        annotated: 1 if the organ is annotated in the scan of the block, else 0, ``[n, K]``.
    """

    features: list[Tensor]
    targets: Tensor
    annotated: Tensor


@dataclass(frozen=True)
class Positions:
    """Positions ``[m, 3]`` of each annotated organ that is present, the grid shape, and the region of the scan."""

    organs: tuple[NDArray[np.int64], ...]
    shape: tuple[int, int, int]
    region: tuple[Box, ...] = ()


class BlockSampler:
    """A sampler of batches of blocks from a support set. Half of the blocks are centred near an organ.

    Args:
        adapter: adapter whose context voxels are read around each block.
        support: scans to sample from; all scans are used equally often.
        block: edge length of a block in voxels.
        batch: number of blocks per batch.
        random: generator for all random choices.

    Attributes:
        core: box of a block for :meth:`Adapter.forward`; all blocks have the alignment of this box.
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
        """Return the next batch. Blocks near an organ alternate with blocks at any position of a scan."""
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
    """Return positions of the organs of a scan, at most 4000 random positions per organ."""
    organs = []
    for organ in range(len(scan.occupancy)):
        positions = scan.occupancy.positions(organ)
        if len(positions) > _MAX_POSITIONS:
            positions = random.choice(positions, _MAX_POSITIONS, replace=False)
        if len(positions):
            organs.append(positions)
    return Positions(tuple(organs), scan.shape, scan.region)


def draw_centre(positions: Positions, random: np.random.Generator, *, positive: bool) -> NDArray[np.int64]:
    """Return the centre of a block.

    Args:
        positions: positions of the organs of a scan.
        random: generator for all random choices.
        positive: True returns a voxel of an organ plus an offset of up to 8 voxels per axis, moved into the region of
            the scan; False returns any voxel of the region, which is the whole scan if it has no boxes.
    """
    if positive and positions.organs:
        organ = positions.organs[random.integers(len(positions.organs))]
        centre: NDArray[np.int64] = organ[random.integers(len(organ))] + random.integers(-8, 9, 3)
        return nearest_in(positions.region, centre)
    if positions.region:
        sizes = np.array([np.prod(box.shape) for box in positions.region], float)
        box = positions.region[random.choice(len(sizes), p=sizes / sizes.sum())]
        low, high = np.array(box.ranges).T
        return np.asarray(random.integers(low, high), np.int64)
    return random.integers(0, positions.shape)


def nearest_in(region: Sequence[Box], position: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position in any box of a region that is nearest to a position; without boxes, the position itself."""
    inside = [np.clip(position, *(np.array(box.ranges).T - [[0], [1]])) for box in region]
    return min(inside, key=lambda candidate: int(np.square(candidate - position).sum()), default=position)


def aligned_core(centre: NDArray[np.int64], edge: int, adapter: Adapter) -> Box:
    """Return the box of a block around ``centre``, aligned to the coarsest level, as all blocks of a batch must be."""
    stride = adapter.levels[-1].stride
    starts = [int(c - edge // 2 + stride // 2) // stride * stride for c in centre]
    return Box(*((start, start + edge) for start in starts))
