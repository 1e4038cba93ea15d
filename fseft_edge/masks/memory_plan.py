"""How much memory turning a feature map into a mask will take, predicted from shapes, and the plan that fits a budget.

The scan's features stay on disk. What counts is one tile in the adapters, one slab of probabilities on the grid, a
piece of them on the scan's own lattice, and the mask with what is measured on it.
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
from fseft_edge.runtime.scans.grid import PIECE_BYTES, Grid
from fseft_edge.runtime.system.memory import Budget, Footprint, first_that_fits, is_out_of_memory

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

SLAB = 32
TILE = 96

_FLOAT, _STORED = 4, 2
_SIZES = ((TILE, SLAB), (64, SLAB), (64, 16), (32, 16), (32, 8))
# Of the mask: itself and its post-processed copy; a mask of one organ, and a padded one; its numbered components, and
# what numbering them takes. Organs are taken to be as large as the scan.
_BYTES_A_VOXEL_MEASURED = 4 + 4 + 1


@dataclass(frozen=True)
class MemoryPlan:
    """How a feature map is turned into a mask.

    Attributes:
        tile: voxels of a tile in the adapters along x and y.
        slab: slices at a time.
        footprint: the most that it is predicted to take.
    """

    tile: int
    slab: int
    footprint: Footprint


AMPLE = MemoryPlan(TILE, SLAB, Footprint(0))
"""How it is done where memory does not matter."""

LEAST = MemoryPlan(*_SIZES[-1], Footprint(0))
"""How it is done in the smallest pieces."""


def plan_segmentation(grid: Grid, adapters: Sequence[Adapter], budget: Budget, held: int) -> MemoryPlan:
    """Return the fastest plan within a budget.

    Args:
        grid: of the scan.
        adapters: that segment it.
        budget: what may be taken.
        held: bytes that the process will hold before
            (:func:`fseft_edge.runtime.encoder.encoding_plan.held_after_encoding`).

    Raises:
        OutOfMemoryError: the budget is too small; the message says the smallest that works.
    """
    return first_that_fits(list(plans(grid, adapters, held)), budget, adapters[0].device, "segmenting this scan")


def in_smaller_pieces(plan: MemoryPlan, work: Callable[[MemoryPlan], _Result]) -> _Result:
    """Return the result of work by a plan, or in the smallest pieces where memory runs out, with a warning.

    Raises:
        OutOfMemoryError: memory runs out in the smallest pieces too.
    """
    for attempt in (plan, LEAST):
        try:
            return work(attempt)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        _LOG.warning("Memory ran out while segmenting in tiles of %d and slabs of %d.", attempt.tile, attempt.slab)
    raise OutOfMemoryError(
        "Memory ran out while segmenting, in the smallest pieces.",
        remedy="Close other programs, segment fewer organs at once, or use a larger machine.",
    )


def plans(grid: Grid, adapters: Sequence[Adapter], held: int) -> Iterator[MemoryPlan]:
    """Yield every way to segment, the fastest first, each with what it takes.

    Args:
        grid: of the scan.
        adapters: that segment it.
        held: bytes that the process holds before.
    """
    classes = sum(adapter.classes for adapter in adapters)
    organs = sum(adapter.classes - adapter.backgrounds for adapter in adapters)
    x, y, _ = grid.shape
    voxels = math.prod(grid.source_shape)
    mask = voxels * (1 if organs < 256 else 2)
    along_z = grid.axes[2].source_axis
    plane = _FLOAT * classes * voxels // grid.source_shape[along_z]
    piece = max(PIECE_BYTES, plane)
    # Beside the probabilities of a piece: which organ is the most probable, by how much, and comparisons.
    deciding = piece + piece * (_FLOAT + 4) // (_FLOAT * classes)
    measuring = voxels * _BYTES_A_VOXEL_MEASURED
    on_gpu = adapters[0].device.type == "cuda"
    for tile, slab in _SIZES:
        core = Box((0, min(tile, x)), (0, min(tile, y)), (0, slab))
        adapting = max(adapter_bytes(adapter, core) for adapter in adapters)
        stored = sum(
            _STORED * level.channels * math.prod(box.shape)
            for adapter in adapters[:1]
            for level, box in zip(adapter.levels, adapter.boxes(core), strict=True)
        )
        # A slab on the grid, and the same with its slices first, with some of the slab before.
        probabilities = _FLOAT * classes * x * y * (2 * slab + slab // 2)
        predicting = probabilities + max(stored if on_gpu else adapting, deciding)
        ram = held + max(mask + predicting, measuring)
        yield MemoryPlan(tile, slab, Footprint(ram, adapting if on_gpu else 0))


def adapter_bytes(adapter: Adapter, core: Box) -> int:
    """Return about how many bytes an adapter's tensors take at most for a block, the features that it reads included.

    Features are there as they were read and normalised; the residual path adds a few tensors of its width at the finest
    level, and classes count on the way to probabilities.

    Args:
        adapter: the adapter.
        core: the block, in voxels of the finest level.
    """
    boxes = adapter.boxes(core)
    features = [level.channels * math.prod(box.shape) for level, box in zip(adapter.levels, boxes, strict=True)]
    elements = 2 * sum(features) + features[0]
    if adapter.settings.method != "linear":
        width = adapter.settings.width if adapter.settings.levels == "all" else adapter.levels[0].channels
        elements += 3 * width * math.prod(boxes[0].shape)
    return _FLOAT * (elements + 3 * adapter.classes * math.prod(core.shape))
