"""AxisMap: relation between one axis of a grid and one axis of a scan, and linear interpolation in both directions.

A grid has the axes of the scan. Resampling in three dimensions is therefore one sparse matrix for each axis, applied
one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

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


def last_column_used(matrix: AxisMatrix) -> NDArray[np.int64]:
    """Return, for each row, the last column with a non-zero entry in this row or an earlier row; 0 if there is none."""
    filled = np.diff(matrix.indptr) > 0
    last = np.zeros(matrix.shape[0], dtype=np.int64)
    last[filled] = matrix.indices[matrix.indptr[1:][filled] - 1]
    return np.maximum.accumulate(last)


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
