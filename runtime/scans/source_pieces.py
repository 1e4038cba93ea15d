"""Resampling from the grid to the scan, piece by piece, restricted to the rectangles that can have an effect.

An interpolated value lies between the values of its neighbours. Where no neighbour of a class can have an effect, the
class is therefore not interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.scans.axis_map import AxisMap

PIECE_BYTES = 32 << 20
"""Largest size of the probabilities of all classes in a piece, but at least one slice."""

Decisive: TypeAlias = Callable[[NDArray[np.float32]], Sequence[NDArray[np.bool_] | None]]
"""From a section of the grid ``[K, X, Y, n]``, for each class: the voxels ``[X, Y, n]`` whose value can have an effect;
None for no voxel. A value of the scan is needed if one of its neighbours can have an effect."""


@dataclass(frozen=True, eq=False)
class SourcePart:
    """The probabilities of one class in a rectangle of one slice of the scan.

    Attributes:
        channel: index of the class.
        index: index of the slice in its piece.
        y, x: the rectangle, along the axes of the scan that are the y and x axes of the grid.
        probabilities: float32 ``[y, x]``, in the directions in which the scan stores these axes.
    """

    channel: int
    index: int
    y: slice
    x: slice
    probabilities: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SourcePiece:
    """Probabilities for a range of slices of the scan.

    Attributes:
        axis: array axis of the scan that is divided into pieces.
        start, stop: range of the piece along ``axis``, in scan voxels.
        parts: for each class and slice, the rectangle that can have an effect, slice by slice and in the order of the
            classes.
        order: the axes that make an array ``[z, y, x]`` of the grid's axes an array in the axis order of the scan.
    """

    axis: int
    start: int
    stop: int
    parts: tuple[SourcePart, ...]
    order: tuple[int, int, int]
    _stacked: NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """All probabilities, float32 ``[K, x, y, z]`` in the axis order of the scan; only of a complete piece.

        All strides are positive, but the array need not be in C order.
        """
        assert self._stacked is not None  # noqa: S101 - the caller asked for complete pieces
        return self._stacked.transpose(0, *(1 + axis for axis in self.order))


class BackResampler:
    """Resamples probabilities from a grid to its scan.

    Args:
        axes: axes of the grid.
        order: the axes that make an array ``[z, y, x]`` of the grid's axes an array in the axis order of the scan.
        decisive: tells where a result is needed; None needs it everywhere.
        complete: also return all probabilities of each piece.
    """

    def __init__(
        self,
        axes: tuple[AxisMap, AxisMap, AxisMap],
        order: tuple[int, int, int],
        decisive: Decisive | None,
        *,
        complete: bool,
    ) -> None:
        x, y, z = axes
        self._order = order
        self._axes = axes
        self._x, self._y = x.neighbours(stored=True), y.neighbours(stored=True)
        self._z = z.neighbours(stored=False)
        self._decisive = decisive
        self._complete = complete

    def pieces(self, sections: Iterator[tuple[int, NDArray[np.float32]]]) -> Iterator[SourcePiece]:
        """Yield the pieces of the scan (see :meth:`fseft_edge.runtime.scans.grid.Grid.to_source`)."""
        shape = tuple(axis.length for axis in self._axes)
        done = arrived = 0
        window: _Window | None = None
        for z0, section in sections:
            if z0 != arrived or section.ndim != 4 or section.shape[1:3] != shape[:2]:
                raise ValueError(
                    f"a section of shape {section.shape} starts at slice {z0}, but slice {arrived} of a grid of shape "
                    f"{shape} was expected"
                )
            boxes = self._boxes(section)
            if window is None:
                window = _Window(z0, (section,), boxes, whole=self._complete)
            else:
                window = window.followed_by(section, boxes)
            arrived += section.shape[3]
            ready = int(np.searchsorted(self._z.upper, arrived))
            step = self._slices_in_a_piece(section.shape[0]) if self._complete else 1
            for start in range(done, ready, step):
                yield self._piece(window, range(start, min(start + step, ready)))
            done = ready
            window = window.since(min(int(self._z.lower[done]), arrived) if done < len(self._z) else arrived)
            del section  # so that its memory is free while the next section is computed
        if arrived != shape[2]:
            raise ValueError(f"the sections end at slice {arrived} of {shape[2]} grid slices")

    def _slices_in_a_piece(self, classes: int) -> int:
        return max(1, PIECE_BYTES // (4 * classes * len(self._x) * len(self._y)))

    def _boxes(self, section: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the rectangle of decisive voxels of each class and slice: from and to along x and y, ``[4, K, n]``."""
        classes, x, y, slices = section.shape
        empty, whole = (x, 0, y, 0), (0, x, 0, y)
        boxes = np.empty((4, classes, slices), np.int64)
        boxes[:] = np.array(whole if self._decisive is None else empty)[:, None, None]
        for channel, decisive in enumerate(self._decisive(section) if self._decisive else ()):
            if decisive is None:
                continue
            for first, other in ((0, 1), (2, 0)):
                filled: NDArray[np.bool_] = np.any(decisive, axis=other)
                some = np.any(filled, axis=0)
                boxes[first, channel, some] = filled.argmax(axis=0)[some]
                boxes[first + 1, channel, some] = len(filled) - filled[::-1].argmax(axis=0)[some]
        return boxes

    def _piece(self, window: _Window, rows: range) -> SourcePiece:
        """Return the probabilities for the scan slices ``rows``, counted in grid direction."""
        along_z, slices = self._axes[2], self._z
        stacked: NDArray[np.float32] | None = None
        if self._complete:
            stacked = np.zeros((window.classes, len(rows), len(self._y), len(self._x)), np.float32)
        parts: list[SourcePart] = []
        for row in rows:
            if not slices.covered.start <= row < slices.covered.stop:
                continue
            index = rows.stop - 1 - row if along_z.flipped else row - rows.start
            if stacked is not None:
                covered = self._y.covered, self._x.covered
                for channel in range(window.classes):
                    stacked[channel, index][covered] = self._interpolated(window, channel, row, *covered)
            for channel, (x0, x1, y0, y1) in window.rectangles(int(slices.lower[row]), int(slices.upper[row])):
                y, x = self._y.rows_between(y0, y1), self._x.rows_between(x0, x1)
                if y.start == y.stop or x.start == x.stop:
                    continue
                if stacked is not None:
                    values = stacked[channel, index, y, x]
                else:
                    values = self._interpolated(window, channel, row, y, x)
                parts.append(SourcePart(channel, index, y, x, values))
        cut = along_z.flip_range(slice(rows.start, rows.stop))
        return SourcePiece(along_z.source_axis, cut.start, cut.stop, tuple(parts), self._order, stacked)

    def _interpolated(self, window: _Window, channel: int, row: int, y: slice, x: slice) -> NDArray[np.float32]:
        """Return the probabilities ``[y, x]`` of a class in a rectangle of a scan slice: along z, then x, then y."""
        lower, upper = self._z.lower_weight[row], self._z.upper_weight[row]
        from_x, from_y = self._x.columns_of(x), self._y.columns_of(y)
        plane = window.plane(channel, int(self._z.lower[row]), from_x, from_y) * lower
        if upper:
            plane += window.plane(channel, int(self._z.upper[row]), from_x, from_y) * upper
        on_x = self._x.interpolate(plane, x, from_x.start)
        return self._y.interpolate(np.ascontiguousarray(on_x.T), y, from_y.start)


class _Window:
    """The grid slices that the next slices of the scan depend on.

    Args:
        start: first slice.
        slices: consecutive slices, float32 ``[K, X, Y, n]`` each.
        boxes: rectangles of decisive voxels of all slices, ``[4, K, n]``.
        whole: all voxels are needed, not only the decisive ones and their neighbours.
    """

    def __init__(
        self, start: int, slices: Sequence[NDArray[np.float32]], boxes: NDArray[np.int64], *, whole: bool
    ) -> None:
        self._start = start
        self._slices = slices
        self._boxes = boxes
        self._whole = whole
        self._cubes: dict[int, tuple[NDArray[np.float32], int, int]] = {}

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self._boxes.shape[1])

    def followed_by(self, section: NDArray[np.float32], boxes: NDArray[np.int64]) -> _Window:
        """Return these slices and those of the next section."""
        together = np.concatenate([self._boxes, boxes], axis=2)
        return _Window(self._start, (*self._slices, section), together, whole=self._whole)

    def since(self, start: int) -> _Window:
        """Return a copy of the slices from ``start`` on."""
        kept: list[NDArray[np.float32]] = []
        z = self._start
        for slices in self._slices:
            if z + slices.shape[3] > start:
                kept.append(slices[..., max(start - z, 0) :].copy())
            z += slices.shape[3]
        return _Window(start, kept, self._boxes[:, :, start - self._start :], whole=self._whole)

    def rectangles(self, lower: int, upper: int) -> Iterator[tuple[int, list[int]]]:
        """Yield each class with a decisive voxel in one of two slices, and the rectangle that holds these voxels."""
        first, second = self._boxes[:, :, lower - self._start], self._boxes[:, :, upper - self._start]
        boxes = np.minimum(first, second)
        boxes[1::2] = np.maximum(first, second)[1::2]
        for channel in np.flatnonzero(boxes[1] > boxes[0]).tolist():
            yield channel, boxes[:, channel].tolist()

    def plane(self, channel: int, z: int, x: slice, y: slice) -> NDArray[np.float32]:
        """Return a rectangle ``[x, y]`` of a class in a slice: of decisive voxels and their neighbours, or any."""
        cube, x0, y0 = self._cubes.get(channel) or self._cube(channel)
        return cube[z - self._start, x.start - x0 : x.stop - x0, y.start - y0 : y.stop - y0]

    def _cube(self, channel: int) -> tuple[NDArray[np.float32], int, int]:
        """Return the slices of a class as ``[n, x, y]`` around its decisive voxels, and the first x and y.

        The loop copies row by row, so that source and destination stay in the processor cache. This is four times as
        fast as one transposed copy.
        """
        _, x, y, _ = self._slices[0].shape
        x0 = y0 = 0
        if not self._whole:
            low, high = self._boxes[:, channel].min(axis=1), self._boxes[:, channel].max(axis=1)
            x0, x = max(int(low[0]) - 1, 0), min(int(high[1]) + 1, x)
            y0, y = max(int(low[2]) - 1, 0), min(int(high[3]) + 1, y)
        cube = np.empty((self._boxes.shape[2], x - x0, y - y0), np.float32)
        z = 0
        for slices in self._slices:
            depth = slices.shape[3]
            for row in range(x - x0):
                cube[z : z + depth, row] = slices[channel, x0 + row, y0:y].T
            z += depth
        self._cubes[channel] = cube, x0, y0
        return self._cubes[channel]
