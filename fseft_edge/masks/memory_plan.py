"""Prediction of the memory that is needed to compute a mask from a feature map, and the plan that fits a budget.

The features of the scan stay on disk. The prediction counts one tile in the adapters, one slab of probabilities on the
grid, one slice of the scan (one piece with all probabilities if they are kept), and the mask with the arrays for its
measurements.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Adapter
from fseft_edge.runtime.errors import OutOfMemoryError
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.source_pieces import PIECE_BYTES
from fseft_edge.runtime.system.memory import Budget, Footprint, first_that_fits, is_out_of_memory

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

SLAB = 32
TILE = 96

_FLOAT, _STORED = 4, 2
_KEPT = 2
"""Bytes of a probability that is written to a file."""
_SIZES = ((TILE, SLAB), (64, SLAB), (64, 16), (32, 16), (32, 8))
# In one slice of the scan, for an organ as large as the slice: its probabilities, two stages of their interpolation,
# the highest probability so far, and results of comparisons; then the label and the probability of each voxel for the
# confidence, with their indices, in up to eight bytes each.
_DECIDING_BYTES_PER_VOXEL = 4 * _FLOAT + 2 + 4 * 8
# Measurements on the mask need: the mask and its post-processed copy; the mask of one organ and a padded copy; the
# numbered components and the work arrays of their numbering. The prediction assumes organs as large as the scan.
_MEASURING_BYTES_PER_VOXEL = 4 + 4 + 1


@dataclass(frozen=True)
class MemoryPlan:
    """The sizes of the pieces in which a mask is computed from a feature map.

    Attributes:
        tile: size of a tile in the adapters along x and y, in voxels.
        slab: number of slices of a slab.
        footprint: predicted peak memory.
    """

    tile: int
    slab: int
    footprint: Footprint


AMPLE = MemoryPlan(TILE, SLAB, Footprint(0))
"""The plan without a memory limit."""

LEAST = MemoryPlan(*_SIZES[-1], Footprint(0))
"""The plan with the smallest pieces."""


def plan_segmentation(
    grid: Grid, adapters: Sequence[Adapter], budget: Budget, held: int, *, probabilities: bool = False
) -> MemoryPlan:
    """Return the fastest plan within a budget.

    Args:
        grid: grid of the scan.
        adapters: adapters that segment the scan.
        budget: memory that may be used.
        held: bytes that the process uses before the segmentation
            (:func:`fseft_edge.runtime.encoder.encoding.held_after_encoding`).
        probabilities: the probabilities are also written to files.

    Raises:
        OutOfMemoryError: the budget is too small; the message states the smallest sufficient budget.
    """
    possible = list(plans(grid, adapters, held, probabilities=probabilities))
    return first_that_fits(possible, budget, adapters[0].device, "segmenting this scan")


def in_smaller_pieces(plan: MemoryPlan, work: Callable[[MemoryPlan], _Result]) -> _Result:
    """Return the result of ``work(plan)``; if memory is exhausted, log a warning and repeat with the smallest pieces.

    Raises:
        OutOfMemoryError: memory is exhausted with the smallest pieces, too.
    """
    for attempt in (plan, LEAST):
        try:
            return work(attempt)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        _LOG.warning(
            "out of memory during segmentation with tiles of %d voxels and slabs of %d slices",
            attempt.tile,
            attempt.slab,
        )
    raise OutOfMemoryError(
        f"The segmentation ran out of memory, also with the smallest tiles ({LEAST.tile} voxels) and slabs "
        f"({LEAST.slab} slices).",
        remedy="Close other programs, segment fewer organs at once, or use a computer with more memory.",
    )


def plans(grid: Grid, adapters: Sequence[Adapter], held: int, *, probabilities: bool = False) -> Iterator[MemoryPlan]:
    """Yield all plans with their predicted memory, fastest plan first.

    Args:
        grid: grid of the scan.
        adapters: adapters that segment the scan.
        held: bytes that the process uses before the segmentation.
        probabilities: the probabilities are also written to files.
    """
    classes = sum(adapter.classes for adapter in adapters)
    organs = sum(adapter.classes - adapter.backgrounds for adapter in adapters)
    x, y, _ = grid.shape
    voxels = math.prod(grid.source_shape)
    mask = voxels * (1 if organs < 256 else 2)
    along_z = grid.axes[2].source_axis
    plane = voxels // grid.source_shape[along_z]
    deciding = _DECIDING_BYTES_PER_VOXEL * plane
    if probabilities:
        # A piece with all probabilities; and one organ of it: rescaled, as whole numbers, and mapped from its file.
        piece = max(PIECE_BYTES, _FLOAT * classes * plane)
        deciding += piece + piece * (_FLOAT + 2 * _KEPT) // (_FLOAT * classes)
    # Writing the probabilities maps the files of two organs (two bytes for each voxel), before the measurements.
    measuring = voxels * _MEASURING_BYTES_PER_VOXEL
    on_gpu = adapters[0].device.type == "cuda"
    for tile, slab in _SIZES:
        core = Box((0, min(tile, x)), (0, min(tile, y)), (0, slab))
        adapting = max(adapter_bytes(adapter, core) for adapter in adapters)
        stored = sum(
            _STORED * level.channels * math.prod(box.shape)
            for adapter in adapters[:1]
            for level, box in zip(adapter.levels, adapter.boxes(core), strict=True)
        )
        # One slab on the grid, plus a copy with slices as the first axis and a part of the previous slab.
        on_grid = _FLOAT * classes * x * y * (2 * slab + slab // 2)
        predicting = on_grid + max(stored if on_gpu else adapting, deciding)
        ram = held + max(mask + predicting, measuring)
        yield MemoryPlan(tile, slab, Footprint(ram, adapting if on_gpu else 0))


def adapter_bytes(adapter: Adapter, core: Box) -> int:
    """Return the predicted peak memory in bytes of an adapter for a block, including the features that it reads.

    The prediction counts the features as read and normalised, three tensors of the width of the residual path at the
    finest level, and three tensors with one channel per class.

    Args:
        adapter: the adapter.
        core: box of the block, in voxels of the finest level.
    """
    boxes = adapter.boxes(core)
    features = [level.channels * math.prod(box.shape) for level, box in zip(adapter.levels, boxes, strict=True)]
    elements = 2 * sum(features) + features[0]
    if adapter.settings.method != "linear":
        width = adapter.settings.width if adapter.settings.levels == "all" else adapter.levels[0].channels
        elements += 3 * width * math.prod(boxes[0].shape)
    return _FLOAT * (elements + 3 * adapter.classes * math.prod(core.shape))
