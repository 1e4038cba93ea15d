"""AxisMap: how one axis of a grid lies over one axis of a scan, and linear interpolation along it both ways.

A grid keeps the scan's own axes, so that resampling in three dimensions is one sparse matrix an axis, applied in turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

AxisMatrix: TypeAlias = csr_array[np.float32, tuple[int, int]]
"""Float32 ``[voxels out, voxels in]``."""


@dataclass(frozen=True)
class AxisMap:
    """One axis of the grid over one axis of the scan; positions are counted along the grid's direction.

    The grid's field of view is centred on the field of view of the scan's voxels ``start`` to ``stop`` and as long to
    the nearest whole voxel; so the edges agree to a quarter of a grid voxel, and exactly where the spacing divides.

    Attributes:
        source_axis: which array axis of the scan it is.
        flipped: whether the scan stores it in the opposite direction.
        source_length: voxels of the scan along it.
        source_spacing: mm between them.
        start, stop: the part of the scan the grid covers.
        spacing: mm between grid voxels.
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
        """Grid voxels along the axis."""
        return max(1, int(np.floor((self.stop - self.start) * self.source_spacing / self.spacing + 0.5)))

    def other_way(self, part: slice) -> slice:
        """A range in the scan's storage order as a range in the grid's direction, and back again."""
        if not self.flipped:
            return part
        return slice(self.source_length - part.stop, self.source_length - part.start)

    def source_positions(self) -> NDArray[np.float64]:
        """Where each grid voxel's centre lies, in scan voxels (0 is the centre of the first one)."""
        offsets = np.arange(self.length, dtype=np.float64) - (self.length - 1) / 2
        return offsets * (self.spacing / self.source_spacing) + (self.start + self.stop - 1) / 2

    def grid_positions(self) -> NDArray[np.float64]:
        """Where each scan voxel's centre lies, in grid voxels."""
        offsets = np.arange(self.source_length, dtype=np.float64) - (self.start + self.stop - 1) / 2
        return offsets * (self.source_spacing / self.spacing) + (self.length - 1) / 2

    def to_grid(self, *, antialias: bool) -> AxisMatrix:
        """Matrix ``[length, source_length]``: linear interpolation, clamped at the scan's outermost voxel centres.

        With ``antialias``, the triangle of a coarser grid is as wide as the grid's spacing on either side.
        """
        reach = max(1.0, self.spacing / self.source_spacing) if antialias else 1.0
        return _interpolation(self.source_positions(), self.source_length, reach)

    def to_source(self) -> AxisMatrix:
        """Matrix ``[source_length, length]``: linear interpolation, clamped at the grid's outermost voxel centres.

        Rows of scan voxels outside ``start`` to ``stop`` are empty: there is nothing there.
        """
        matrix = _interpolation(self.grid_positions(), self.length, 1.0)
        inside = np.zeros(self.source_length, dtype=np.float32)
        inside[self.start : self.stop] = 1.0
        matrix.data *= np.repeat(inside, np.diff(matrix.indptr))
        matrix.eliminate_zeros()
        return matrix


def _interpolation(positions: NDArray[np.float64], length: int, reach: float) -> AxisMatrix:
    """Rows that weigh ``length`` samples by a triangle around each position, ``reach`` samples to either side.

    Each row sums to one; positions beyond the first or last sample take the value there.
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


def drawn_on(matrix: AxisMatrix, rows: slice) -> slice:
    """The contiguous range of samples (columns) that a range of rows draws on; empty when they draw on none."""
    columns = matrix.indices[matrix.indptr[rows.start] : matrix.indptr[rows.stop]]
    return slice(int(columns.min()), int(columns.max()) + 1) if columns.size else slice(0, 0)


def last_drawn_on(matrix: AxisMatrix) -> NDArray[np.int64]:
    """For each row the last sample that it or any row before it draws on; 0 where none of them does."""
    filled = np.diff(matrix.indptr) > 0
    last = np.zeros(matrix.shape[0], dtype=np.int64)
    last[filled] = matrix.indices[matrix.indptr[1:][filled] - 1]
    return np.maximum.accumulate(last)


def reaching(matrix: AxisMatrix, columns: slice) -> slice:
    """The contiguous range of rows that draw on a range of samples (columns); empty when none does."""
    rows = np.flatnonzero(np.diff(matrix[:, columns].indptr))
    return slice(int(rows[0]), int(rows[-1]) + 1) if rows.size else slice(0, 0)


def apply_first(matrix: AxisMatrix, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Interpolate along an array's first axis; every output value depends on its own row alone, to the last bit."""
    others = array.shape[1:]
    flat = np.ascontiguousarray(array).reshape(array.shape[0], math.prod(others))
    result: NDArray[np.float32] = matrix @ flat
    return result.reshape(matrix.shape[0], *others)
