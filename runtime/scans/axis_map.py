"""AxisMap: relation between one axis of a grid and one axis of a scan, and linear interpolation in both directions.

A grid has the axes of the scan. Resampling in three dimensions is therefore one sparse matrix for each axis, applied
one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

AxisMatrix: TypeAlias = csr_array[np.float32, tuple[int, int]]
"""Interpolation matrix, float32 ``[output voxels, input voxels]``."""


@dataclass(frozen=True)
class AxisMap:
    """Relation between one axis of the grid and one axis of the scan. All positions count along the grid direction.

    The field of view of the grid has the same centre as the scan voxels ``start`` to ``stop``. Its length is rounded to
    whole grid voxels, so each edge deviates by at most a quarter of a grid voxel (or by nothing, if the length is a
    multiple of the spacing). A grid has at least one voxel.

    Attributes:
        source_axis: array axis of the scan.
        flipped: True if the scan stores this axis in the opposite direction.
        source_length: number of scan voxels along the axis.
        source_spacing: distance between scan voxels in mm.
        start, stop: range of the scan voxels that the grid covers.
        spacing: distance between grid voxels in mm.
    """

    source_axis: int
    flipped: bool
    source_length: int
    source_spacing: float
    start: int
    stop: int
    spacing: float

    @property
    def length(self) -> int:
        """Number of grid voxels along the axis."""
        return max(1, int(np.floor((self.stop - self.start) * self.source_spacing / self.spacing + 0.5)))

    def flip_range(self, part: slice) -> slice:
        """Convert a range of scan voxels from storage order to grid direction, or from grid direction to storage."""
        if not self.flipped:
            return part
        return slice(self.source_length - part.stop, self.source_length - part.start)

    def source_positions(self) -> NDArray[np.float64]:
        """Return the centre of each grid voxel in units of scan voxels; 0 is the centre of the first scan voxel."""
        offsets = np.arange(self.length, dtype=np.float64) - (self.length - 1) / 2
        return offsets * (self.spacing / self.source_spacing) + (self.start + self.stop - 1) / 2

    def grid_positions(self) -> NDArray[np.float64]:
        """Return the centre of each scan voxel in units of grid voxels; 0 is the centre of the first grid voxel."""
        offsets = np.arange(self.source_length, dtype=np.float64) - (self.start + self.stop - 1) / 2
        return offsets * (self.source_spacing / self.spacing) + (self.length - 1) / 2

    def to_grid(self, *, antialias: bool) -> AxisMatrix:
        """Return the interpolation matrix from scan to grid, ``[length, source_length]``.

        Positions outside the outermost scan voxel centres get the value of the outermost voxel.

        Args:
            antialias: if the grid is coarser than the scan, use a triangular filter of half width one grid voxel.
        """
        reach = max(1.0, self.spacing / self.source_spacing) if antialias else 1.0
        return _interpolation(self.source_positions(), self.source_length, reach)

    def to_source(self) -> AxisMatrix:
        """Return the interpolation matrix from grid to scan, ``[source_length, length]``.

        Positions outside the outermost grid voxel centres get the value of the outermost voxel. The rows of scan voxels
        outside ``start`` to ``stop`` are empty, because the grid does not cover them.
        """
        matrix = _interpolation(self.grid_positions(), self.length, 1.0)
        inside = np.zeros(self.source_length, dtype=np.float32)
        inside[self.start : self.stop] = 1.0
        matrix.data *= np.repeat(inside, np.diff(matrix.indptr))
        matrix.eliminate_zeros()
        return matrix

    def neighbours(self, *, stored: bool) -> Neighbours:
        """Return the two grid voxels between which each scan voxel lies, and their weights.

        Positions outside the outermost grid voxel centres get the value of the outermost voxel. The grid does not cover
        the scan voxels outside ``start`` to ``stop``; their weights are 0.

        Args:
            stored: the scan voxels are in the order in which the scan stores them, not in the direction of the grid.
        """
        matrix = _interpolation(self.grid_positions(), self.length, 1.0)
        first, last = matrix.indptr[:-1], matrix.indptr[1:] - 1
        lower_weight = matrix.data[first]
        upper_weight = np.where(last > first, matrix.data[last], np.float32(0))
        for weight in (lower_weight, upper_weight):
            weight[: self.start] = weight[self.stop :] = 0
        lower, upper = matrix.indices[first], matrix.indices[last]
        covered = slice(self.start, self.stop)
        found = Neighbours(lower, upper, lower_weight, upper_weight, self.length, covered, flipped=False)
        return found.flip() if stored and self.flipped else found


@dataclass(frozen=True, eq=False)
class Neighbours:
    """For each scan voxel along an axis, the two grid voxels between which it lies, and their weights.

    Attributes:
        lower, upper: index of the grid voxels, ``[scan voxels]``; equal where one grid voxel has the whole weight.
        lower_weight, upper_weight: float32 ``[scan voxels]``. ``upper_weight`` is 0 where both voxels are the same.
        columns: number of grid voxels.
        covered: range of scan voxels that the grid covers; all others have weights of 0.
        flipped: the scan voxels are in the opposite direction of the grid.
    """

    lower: NDArray[np.integer[Any]]
    upper: NDArray[np.integer[Any]]
    lower_weight: NDArray[np.float32]
    upper_weight: NDArray[np.float32]
    columns: int
    covered: slice
    flipped: bool

    def __len__(self) -> int:
        return len(self.lower)

    def flip(self) -> Neighbours:
        """Return the same neighbours with the scan voxels in the opposite direction."""
        return Neighbours(
            self.lower[::-1].copy(),
            self.upper[::-1].copy(),
            self.lower_weight[::-1].copy(),
            self.upper_weight[::-1].copy(),
            self.columns,
            slice(len(self) - self.covered.stop, len(self) - self.covered.start),
            not self.flipped,
        )

    @cached_property
    def _reach(self) -> tuple[list[int], list[int]]:
        """For each grid voxel, the first scan voxel at or after it and the first one beyond it, in grid direction."""
        voxels = np.arange(self.columns + 1)
        lower, upper = (x[::-1] if self.flipped else x for x in (self.lower, self.upper))
        return np.searchsorted(upper, voxels).tolist(), np.searchsorted(lower, voxels).tolist()

    def rows_between(self, low: int, high: int) -> slice:
        """Return the scan voxels with one of the grid voxels ``low`` to ``high`` as a neighbour; may be empty."""
        first, beyond = self._reach
        start, stop = first[low], beyond[high]
        if self.flipped:
            start, stop = len(self) - stop, len(self) - start
        start, stop = max(start, self.covered.start), min(stop, self.covered.stop)
        return slice(start, max(start, stop))

    def columns_of(self, rows: slice) -> slice:
        """Return the smallest range of grid voxels with all neighbours of a non-empty range of scan voxels."""
        ends = (rows.stop - 1, rows.start) if self.flipped else (rows.start, rows.stop - 1)
        return slice(int(self.lower[ends[0]]), int(self.upper[ends[1]]) + 1)

    def interpolate(self, array: NDArray[np.float32], rows: slice, first: int) -> NDArray[np.float32]:
        """Interpolate along the first axis of an array. Each value depends, bit for bit, only on its two neighbours.

        Args:
            array: values of the grid voxels from ``first`` on, ``[n, ...]``.
            rows: range of scan voxels.
            first: index of the first grid voxel in ``array``.
        """
        wide = (slice(None), *[None] * (array.ndim - 1))
        result: NDArray[np.float32] = array.take(self.lower[rows] - first, axis=0)
        result *= self.lower_weight[rows][wide]
        upper = array.take(self.upper[rows] - first, axis=0)
        upper *= self.upper_weight[rows][wide]
        result += upper
        return result


def _interpolation(positions: NDArray[np.float64], length: int, reach: float) -> AxisMatrix:
    """Return a matrix whose rows weight ``length`` samples with a triangle around each position.

    Each row sums to one. Positions outside the first or last sample get the value of that sample.

    Args:
        positions: float64 ``[rows]``, in units of samples.
        length: number of samples.
        reach: half width of the triangle in samples.
    """
    if reach == 1.0:
        positions = np.clip(positions, 0, length - 1)
    first = np.floor(positions - reach).astype(np.int64) + 1
    taps = first[:, None] + np.arange(int(np.ceil(2 * reach)))
    weights = np.maximum(0.0, 1.0 - np.abs(taps - positions[:, None]) / reach)
    weights[(taps < 0) | (taps >= length)] = 0.0
    weights /= weights.sum(axis=1, keepdims=True)
    rows = np.broadcast_to(np.arange(len(positions))[:, None], taps.shape)
    used = weights > 0
    matrix: AxisMatrix = csr_array(
        (weights[used].astype(np.float32), (rows[used], taps[used])), shape=(len(positions), length)
    )
    return matrix


def columns_used(matrix: AxisMatrix, rows: slice) -> slice:
    """Return the smallest range of columns that contains all non-zero entries of a range of rows; may be empty."""
    columns = matrix.indices[matrix.indptr[rows.start] : matrix.indptr[rows.stop]]
    return slice(int(columns.min()), int(columns.max()) + 1) if columns.size else slice(0, 0)


def rows_using(matrix: AxisMatrix, columns: slice) -> slice:
    """Return the smallest range of rows that contains all non-zero entries of a range of columns; may be empty."""
    rows = np.flatnonzero(np.diff(matrix[:, columns].indptr))
    return slice(int(rows[0]), int(rows[-1]) + 1) if rows.size else slice(0, 0)


def interpolate_first_axis(matrix: AxisMatrix, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Interpolate along the first axis of an array. Each output value depends, bit for bit, only on its matrix row."""
    others = array.shape[1:]
    flat = np.ascontiguousarray(array).reshape(array.shape[0], math.prod(others))
    result: NDArray[np.float32] = matrix @ flat
    return result.reshape(matrix.shape[0], *others)
