"""Masks inside boxes of the grid: decide only where an organ is, and grow the boxes until they cut no mask.

The result has all components of the mask of the whole scan that reach into the given boxes, voxel by voxel, and no
others. A scan voxel is *complete* if the boxes contain all grid voxels between which its probabilities are
interpolated. As long as such a component has a voxel that is not complete, or that is next to a voxel that is not
complete, its box grows on that side. A box does not grow for components that only the growth has brought into sight:
otherwise scattered false voxels would lead from one to the next through the whole scan. Voxels whose probability
differs from the threshold by rounding alone can differ from those of the whole scan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adapters.blocks import Box, tiles
from fseft_edge.adapters.network import Adapter
from fseft_edge.masks.memory_plan import AMPLE, MemoryPlan
from fseft_edge.masks.prediction import DecidedScan, decide_sections, predict_block
from fseft_edge.runtime.encoder.encoding import EncodedScan
from fseft_edge.runtime.encoder.feature_map import Range
from fseft_edge.runtime.scans.axis_map import rows_using
from fseft_edge.runtime.scans.components import bounding_box, components
from fseft_edge.runtime.scans.grid import Grid

Cuts = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Positions along x, y and z between which features become final together."""

_MOST_ROUNDS = 8
_LEAST_STEP = 8


@dataclass(frozen=True, eq=False)
class DecidedRegion:
    """The labels of a scan that were decided in boxes.

    Attributes:
        found: labels of all voxels, and the confidence of each organ: the mean probability of all its voxels in the
            boxes.
        boxes: the boxes in which labels were decided, in grid voxels.
        rounds: how often boxes grew.
    """

    found: DecidedScan
    boxes: tuple[Box, ...]
    rounds: int


def decide_region(
    encoded: EncodedScan,
    adapters: Sequence[Adapter],
    boxes: Sequence[Box],
    *,
    cuts: Cuts,
    plan: MemoryPlan = AMPLE,
    prepare: Callable[[Sequence[Box]], None] | None = None,
) -> DecidedRegion:
    """Return the labels inside boxes that grow until they cut no mask.

    Args:
        encoded: encoded scan; only the features that the boxes need are read (:func:`read_by`).
        adapters: adapters that segment the scan.
        boxes: the boxes to begin with, in grid voxels; at least one.
        cuts: where features become final together; a box grows to the next of them.
        plan: sizes of the pieces in which the mask is computed.
        prepare: receives the boxes of level 0 that will be read, before each round.
    """
    grid = encoded.grid
    whole = Box(*((0, length) for length in grid.shape))
    current = separate([clipped(box, whole) for box in boxes])
    given = [_influenced(grid, box) for box in current]
    for number in range(_MOST_ROUNDS + 1):
        if prepare is not None:
            prepare([read_by(adapters, box) for box in current])
        found = _decide_inside(encoded, adapters, current, plan)
        labels = _reaching_into(found.labels, given)
        grown = [_grown(box, _cut_sides(labels, grid, box), adapters, cuts, whole) for box in current]
        if grown == current:
            return DecidedRegion(DecidedScan(labels, found.confidence), tuple(current), number)
        current = separate(grown) if number < _MOST_ROUNDS - 1 else [whole]
    raise AssertionError("the box of the whole scan cannot grow")


def read_by(adapters: Sequence[Adapter], core: Box) -> Box:
    """Return the box of level 0 that contains everything that adapters read at any level to compute ``core``."""
    read = [
        Box(*((low * level.stride, high * level.stride) for low, high in box.ranges))
        for adapter in adapters
        for level, box in zip(adapter.levels, adapter.boxes(core), strict=True)
    ]
    return hull(read)


def hull(boxes: Sequence[Box]) -> Box:
    """Return the smallest box that contains all boxes."""
    return Box(
        *((min(box.ranges[axis][0] for box in boxes), max(box.ranges[axis][1] for box in boxes)) for axis in range(3))
    )


def clipped(box: Box, limit: Box) -> Box:
    """Return the part of a box inside another box, of at least one voxel along each axis."""
    ranges = []
    for (low, high), (first, last) in zip(box.ranges, limit.ranges, strict=True):
        start = min(max(low, first), last - 1)
        ranges.append((start, max(start + 1, min(high, last))))
    return Box(*ranges)


def separate(boxes: Sequence[Box]) -> list[Box]:
    """Join boxes that overlap or touch to the smallest box around them, until at least one voxel lies between all."""
    apart: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.ranges):
        joined = box
        while touching := [other for other in apart if _overlap(joined.grown(1), other)]:
            apart = [other for other in apart if other not in touching]
            joined = hull([joined, *touching])
        apart.append(joined)
    return sorted(apart, key=lambda box: box.ranges)


def _overlap(one: Box, other: Box) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(one.ranges, other.ranges, strict=True))


def _decide_inside(
    encoded: EncodedScan, adapters: Sequence[Adapter], boxes: Sequence[Box], plan: MemoryPlan
) -> DecidedScan:
    return decide_sections(encoded.grid, _sections(encoded, adapters, boxes, plan), adapters)


def _sections(
    encoded: EncodedScan, adapters: Sequence[Adapter], boxes: Sequence[Box], plan: MemoryPlan
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the probabilities on the grid, slab by slab, with zeros outside the boxes (see ``predict_sections``)."""
    x, y, z = encoded.grid.shape
    classes = sum(adapter.classes for adapter in adapters)
    for start in range(0, z, plan.slab):
        stop = min(start + plan.slab, z)
        slab = np.zeros((classes, x, y, stop - start), np.float32)
        for box in boxes:
            low, high = max(box.z[0], start), min(box.z[1], stop)
            if low >= high:
                continue
            for tile in tiles((box.shape[0], box.shape[1], high - low), (plan.tile, plan.tile, plan.slab)):
                core = Box(_moved(tile.x, box.x[0]), _moved(tile.y, box.y[0]), (low, high))
                first = 0
                for adapter in adapters:
                    part = slab[first : first + adapter.classes, slice(*core.x), slice(*core.y)]
                    part[..., low - start : high - start] = predict_block(adapter, encoded, core)
                    first += adapter.classes
        yield start, slab


def _moved(along: Range, offset: int) -> Range:
    return along[0] + offset, along[1] + offset


def _influenced(grid: Grid, box: Box) -> tuple[slice, slice, slice]:
    """Return the scan voxels, in the axis order of the scan, whose probabilities depend on a box of the grid."""
    where = [slice(None)] * 3
    for axis, along in zip(grid.axes, box.ranges, strict=True):
        where[axis.source_axis] = axis.flip_range(rows_using(axis.to_source(), slice(*along)))
    return where[0], where[1], where[2]


def _reaching_into(
    labels: NDArray[np.uint8] | NDArray[np.uint16], given: Sequence[tuple[slice, slice, slice]]
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return the components of each organ that have a voxel in any of the given parts of the scan."""
    kept = np.zeros_like(labels)
    if not labels.any():
        return kept
    box = bounding_box(labels > 0)
    inside = np.zeros(labels.shape, np.bool_)
    for part in given:
        inside[part] = True
    inside = inside[box]
    for label in np.flatnonzero(np.bincount(labels[box].ravel())[1:]) + 1:
        mask = labels[box] == label
        numbered, _ = components(mask)
        reaching = np.unique(numbered[inside & mask])
        kept[box][np.isin(numbered, reaching) & mask] = label
    return kept


def _cut_sides(labels: NDArray[np.unsignedinteger], grid: Grid, box: Box) -> list[tuple[bool, bool]]:
    """Return, for each axis of the grid, whether a mask may be cut at the lower and at the upper side of a box."""
    matrices = [axis.to_source() for axis in grid.axes]
    influenced = [rows_using(matrix, slice(*along)) for matrix, along in zip(matrices, box.ranges, strict=True)]
    sides = []
    for axis, (low, high) in enumerate(box.ranges):
        rows, matrix, length = influenced[axis], matrices[axis], grid.shape[axis]
        cut = [False, False]
        if low > 0:  # up to the first voxel that is complete
            complete = rows_using(matrix, slice(0, low)).stop
            cut[0] = _any_label(labels, grid, influenced, axis, slice(rows.start, min(complete + 1, rows.stop)))
        if high < length:
            complete = rows_using(matrix, slice(high, length)).start
            cut[1] = _any_label(labels, grid, influenced, axis, slice(max(complete - 1, rows.start), rows.stop))
        sides.append((cut[0], cut[1]))
    return sides


def _any_label(
    labels: NDArray[np.unsignedinteger], grid: Grid, influenced: Sequence[slice], axis: int, rows: slice
) -> bool:
    where = [slice(None)] * 3
    for number, along in enumerate(grid.axes):
        where[along.source_axis] = along.flip_range(rows if number == axis else influenced[number])
    return bool(labels[tuple(where)].any())


def _grown(box: Box, cut: Sequence[tuple[bool, bool]], adapters: Sequence[Adapter], cuts: Cuts, whole: Box) -> Box:
    """Return a box that reaches to the next cut on each side where a mask may be cut."""
    read = read_by(adapters, box)
    ranges = []
    for axis, ((low, high), (at_low, at_high)) in enumerate(zip(box.ranges, cut, strict=True)):
        read_low, read_high = read.ranges[axis]
        if at_low:
            stop = max((place for place in cuts[axis] if place <= read_low - _LEAST_STEP), default=0)
            low = stop + low - read_low if stop > 0 else 0  # noqa: PLW2901 - the side moves
        if at_high:
            stop = min((place for place in cuts[axis] if place >= read_high + _LEAST_STEP), default=cuts[axis][-1])
            high = stop - (read_high - high) if stop < cuts[axis][-1] else whole.ranges[axis][1]  # noqa: PLW2901 - the side moves
        ranges.append((low, high))
    return clipped(Box(*ranges), whole)
