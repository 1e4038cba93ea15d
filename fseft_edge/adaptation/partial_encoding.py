"""Which windows of a support scan are encoded for training: those around the organs, and some elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Adapter
from fseft_edge.masks.region import clipped, hull, read_by, separate
from fseft_edge.runtime.encoder.on_demand import FeaturesOnDemand
from fseft_edge.runtime.scans.components import components

AROUND_ORGAN: Final = 8
"""Voxels around an organ that blocks of training cover."""

_BLOCK_REACH = 24
"""Half the edge of a block, plus half the stride of the coarsest level, to which a block is aligned."""
_PLACES_TO_TRY = 64


@dataclass(frozen=True, eq=False)
class PartialEncoding:
    """Which windows of the support scans are encoded for training.

    Attributes:
        adapter: an adapter of the kind that will be trained; its context voxels are needed, too.
        elsewhere: largest number of windows that are encoded in addition to those around the organs.
        located: for each scan, the boxes in which it is segmented if it is left out; None segments the whole scan.
    """

    adapter: Adapter
    elsewhere: int
    located: Sequence[tuple[Box, ...] | None]

    def encode(self, scan: SupportScan, random: np.random.Generator) -> tuple[Box, ...]:
        """Encode windows of a scan; return the boxes in which the centres of blocks may lie.

        The first boxes contain the organs. Then random places follow, as long as the blocks there need at most the
        remaining number of windows. If this encodes all windows, there is no box: blocks may lie anywhere.
        """
        features = scan.features
        assert isinstance(features, FeaturesOnDemand)  # noqa: S101 - the caller encodes on demand
        cores = separate([_with_block(box.grown(AROUND_ORGAN)) for box in organ_boxes(scan)])
        region = [self._centres(core, features, scan) for core in cores]
        left = self.elsewhere
        for _ in range(_PLACES_TO_TRY):
            centre = random.integers(0, scan.shape)
            core = Box(*((int(c) - _BLOCK_REACH, int(c) + _BLOCK_REACH) for c in centre))
            needed = features.not_asked(read_by([self.adapter], core).ranges)
            if 0 < needed <= left:
                region.append(self._centres(core, features, scan))
                left -= needed
        features.release()
        return tuple(region) if features.asked < features.windows else ()

    def _centres(self, core: Box, features: FeaturesOnDemand, scan: SupportScan) -> Box:
        """Encode the windows that blocks in a box need; return the centres of all blocks that need no other windows."""
        read = read_by([self.adapter], core)
        features.encode([read.ranges])
        centres = []
        ends = zip(core.ranges, read.ranges, features.grown(read.ranges), scan.shape, strict=True)
        for (low, high), (read_low, read_high), (free_low, free_high), length in ends:
            # At the border of the scan, the map continues by repeating its edge.
            first = 0 if free_low <= 0 else low - max(0, read_low - free_low) + _BLOCK_REACH
            last = length if free_high >= length else high + max(0, free_high - read_high) - _BLOCK_REACH
            middle = min(max((low + high) // 2, 0), length - 1)
            centres.append((first, last) if first < last else (middle, middle + 1))
        return clipped(Box(*centres), Box(*((0, length) for length in scan.shape)))


def _with_block(box: Box) -> Box:
    """Return a box around the same centre that is large enough for a block."""
    centres = [(low + high) // 2 for low, high in box.ranges]
    return hull([box, Box(*((centre - _BLOCK_REACH, centre + _BLOCK_REACH) for centre in centres))])


def organ_boxes(scan: SupportScan) -> list[Box]:
    """Return the bounding box of each connected part of each annotated organ."""
    from scipy.ndimage import find_objects  # noqa: PLC0415 - slow to import

    boxes: list[Box] = []
    for organ in np.flatnonzero(scan.annotated):
        positions = scan.occupancy.positions(int(organ))
        if len(positions):
            start = positions.min(0)
            mask = np.zeros(positions.max(0) - start + 1, np.bool_)
            mask[tuple((positions - start).T)] = True
            numbered, _ = components(mask)
            for part in find_objects(numbered):
                boxes.append(
                    Box(*((along.start + int(s), along.stop + int(s)) for along, s in zip(part, start, strict=True)))
                )
    return boxes
