"""Grid: the voxel lattice for an encoder, and resampling from a scan to the grid and from the grid to the scan.

The grid has the axes of the scan, permuted and flipped to the nearest anatomical directions, with the spacing of the
encoder. Every resampling is therefore linear interpolation along one axis after the other. MONAI's ``Orientation`` and
``Spacing`` compute the same lattice except for an offset: MONAI aligns the centres of the first voxels, this module
aligns the centres of the fields of view. HU are resampled to the grid, probabilities are resampled to the scan. Label
values are never interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.scans.axis_map import (
    AxisMap,
    AxisMatrix,
    columns_used,
    interpolate_first_axis,
    rows_using,
)
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.source_pieces import BackResampler, Decisive, SourcePiece
from fseft_edge.runtime.scans.volume import Volume

CROP_MARGIN_MM = 10.0

_BLOCK_SLICES = 8


@dataclass(frozen=True, eq=False)
class Grid:
    """Voxel lattice of a scan after preprocessing. Data stream along the z axis of the grid.

    The field of view of the grid has the same centre as the scan (or its crop), and its lengths are rounded to whole
    grid voxels. All 48 storage orders of the axes of a scan give the same grid voxels, bit for bit.

    Attributes:
        preprocessing: preprocessing settings of the encoder.
        source_shape: shape of the scan in its own axis order.
        source_affine: affine of the scan, voxel index to RAS+ mm.
        axes: for each axis of the grid, its relation to an axis of the scan.
    """

    preprocessing: Preprocessing
    source_shape: tuple[int, int, int]
    source_affine: NDArray[np.float64]
    axes: tuple[AxisMap, AxisMap, AxisMap]

    @classmethod
    def of(cls, volume: Volume, preprocessing: Preprocessing) -> Grid:
        """Return the grid of a scan. Only with ``crop_below_hu`` this function reads the voxels of the scan."""
        box = [slice(0, length) for length in volume.shape]
        if preprocessing.crop_below_hu is not None:
            box = _bounding_box_above(volume, preprocessing.crop_below_hu)
        stored = nib.orientations.io_orientation(volume.affine)
        wanted = nib.orientations.axcodes2ornt(tuple(preprocessing.axcodes))
        axes = []
        for (anatomical, direction), spacing in zip(wanted, preprocessing.spacing, strict=True):
            axis = int(np.flatnonzero(stored[:, 0] == anatomical)[0])
            flipped = bool(stored[axis, 1] != direction)
            whole = AxisMap(axis, flipped, volume.shape[axis], volume.spacing[axis], 0, volume.shape[axis], spacing)
            part = whole.flip_range(box[axis])
            axes.append(replace(whole, start=part.start, stop=part.stop))
        x, y, z = axes
        return cls(preprocessing, volume.shape, volume.affine, (x, y, z))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of grid voxels along x, y, z."""
        x, y, z = (axis.length for axis in self.axes)
        return x, y, z

    @property
    def stored_order(self) -> tuple[int, int, int]:
        """The axes that make an array ``[z, y, x]`` of the grid's axes an array in the axis order of the scan."""
        x, y, z = (2 - int(axis) for axis in np.argsort([axis.source_axis for axis in self.axes]))
        return x, y, z

    @cached_property
    def affine(self) -> NDArray[np.float64]:
        """Affine of the grid, float64 4x4, voxel index to RAS+ mm."""
        to_source = np.zeros((4, 4))
        to_source[3, 3] = 1.0
        for column, axis in enumerate(self.axes):
            first = axis.source_positions()[0]
            direction = -1.0 if axis.flipped else 1.0
            to_source[axis.source_axis, column] = direction * axis.spacing / axis.source_spacing
            to_source[axis.source_axis, 3] = axis.source_length - 1 - first if axis.flipped else first
        affine: NDArray[np.float64] = self.source_affine @ to_source
        return affine

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one grid voxel in mm³."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def section(self, volume: Volume, z0: int, z1: int) -> NDArray[np.float32]:
        """Return the encoder input for grid slices ``z0`` to ``z1``: float32 ``[X, Y, z1 - z0]`` in [0, 1].

        HU are first interpolated, then clipped to the HU window and scaled, as for the published models.
        Only the required slices of the scan are read; their memory is released afterwards.

        Raises:
            ValueError: a slice is outside the grid, or the shape of the volume is not ``source_shape``.
        """
        if volume.shape != self.source_shape or not 0 <= z0 < z1 <= self.shape[2]:
            raise ValueError(
                f"slices {z0}:{z1} of a scan of shape {volume.shape} are not on this grid of shape {self.shape}, "
                f"which belongs to a scan of shape {self.source_shape}"
            )
        low, high = self.preprocessing.hu_window
        section = self._interpolated(volume.hu, self._to_grid, slice(z0, z1))
        volume.release()
        np.clip(section, low, high, out=section)
        section -= np.float32(low)
        section /= np.float32(high - low)
        return section

    def occupancy(self, mask: NDArray[np.bool_] | NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the fraction of each grid voxel that an organ of the scan fills: float32 ``[X, Y, Z]`` in [0, 1].

        The mask is interpolated linearly, with the antialiasing filter where the grid is coarser than the scan, so that
        thin organs keep their volume.

        Args:
            mask: the organ on the scan ``[X, Y, Z]``: bool, or the share of each voxel that the organ fills.

        Raises:
            ValueError: the mask and the scan have different shapes.
        """
        if mask.shape != self.source_shape:
            raise ValueError(f"a mask of shape {mask.shape} does not fit a scan of shape {self.source_shape}")
        occupancy = np.zeros(self.shape, dtype=np.float32)
        filled = self._to_grid_order([_nonzero_range(mask, axis) for axis in range(3)])
        matrices = [axis.to_grid(antialias=True) for axis in self.axes]
        x, y, z = (rows_using(matrix, extent) for matrix, extent in zip(matrices, filled, strict=True))
        if min(part.stop - part.start for part in (x, y, z)) > 0:
            in_reach = (matrices[0][x], matrices[1][y], matrices[2])
            occupancy[x, y, z] = self._interpolated(lambda part: mask[part].astype(np.float32), in_reach, z)
        return occupancy

    def to_source(
        self,
        sections: Iterator[tuple[int, NDArray[np.float32]]],
        decisive: Decisive | None = None,
        *,
        complete: bool = True,
    ) -> Iterator[SourcePiece]:
        """Resample probabilities from the grid to the scan, piece by piece.

        Args:
            sections: tuples ``(z0, float32 [K, X, Y, n])`` that cover the grid in order without gaps.
            decisive: tells where the probabilities of each class can have an effect, for the parts of the pieces. None
                stands for everywhere.
            complete: pieces also hold all probabilities of all classes. Otherwise only their parts are computed.

        Yields:
            Pieces that cover the scan exactly once, in the order of the z axis of the grid; this order is descending if
            the scan stores that axis in the opposite direction. Complete pieces have at most 32 MiB (at least one
            slice), others one slice. Between the outermost grid voxel centres and the edge of the scan, the outermost
            value is repeated. Outside a cropped grid, the probability is 0.

        Raises:
            ValueError: the sections have a gap, are out of order, or do not fit the grid.
        """
        yield from BackResampler(self.axes, self.stored_order, decisive, complete=complete).pieces(sections)

    @cached_property
    def _to_grid(self) -> tuple[AxisMatrix, AxisMatrix, AxisMatrix]:
        x, y, z = (axis.to_grid(antialias=self.preprocessing.antialias) for axis in self.axes)
        return x, y, z

    def _interpolated(
        self,
        read: Callable[[tuple[slice, slice, slice]], NDArray[np.float32]],
        matrices: tuple[AxisMatrix, AxisMatrix, AxisMatrix],
        z: slice,
    ) -> NDArray[np.float32]:
        """Return the values on grid slices ``z``, float32 ``[X, Y, n]``.

        Args:
            read: function that returns a part of the scan in the axis order of the scan.
            matrices: interpolation matrices from scan to grid for the x, y and z axis of the grid.
            z: range of grid slices.
        """
        along_x, along_y, along_z = matrices
        in_plane = [columns_used(matrix, slice(0, matrix.shape[0])) for matrix in (along_x, along_y)]
        along_x, along_y = along_x[:, in_plane[0]], along_y[:, in_plane[1]]
        result = np.empty((along_x.shape[0], along_y.shape[0], z.stop - z.start), dtype=np.float32)
        for start in range(z.start, z.stop, _BLOCK_SLICES):
            rows = slice(start, min(start + _BLOCK_SLICES, z.stop))
            depth = columns_used(along_z, rows)
            x, y, depth_in_scan = self._to_scan_order([*in_plane, depth])
            block = self._in_grid_order(read((x, y, depth_in_scan)))
            for index, plane in enumerate(interpolate_first_axis(along_z[rows, depth], block.T), start - z.start):
                result[:, :, index] = interpolate_first_axis(along_x, interpolate_first_axis(along_y, plane).T)
        return result

    def _in_grid_order(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a view of a part of the scan with its axes permuted and flipped to the axes of the grid."""
        permuted = array.transpose([axis.source_axis for axis in self.axes])
        return np.flip(permuted, tuple(index for index, axis in enumerate(self.axes) if axis.flipped))

    def _to_grid_order(self, box: list[slice]) -> list[slice]:
        return [axis.flip_range(box[axis.source_axis]) for axis in self.axes]

    def _to_scan_order(self, box: list[slice]) -> tuple[slice, slice, slice]:
        by_source = sorted(zip(self.axes, box, strict=True), key=lambda pair: pair[0].source_axis)
        x, y, z = (axis.flip_range(part) for axis, part in by_source)
        return x, y, z


def _nonzero_range(array: NDArray[Any], axis: int) -> slice:
    """Return the smallest range along one axis that contains all non-zero values."""
    others = tuple(index for index in range(array.ndim) if index != axis)
    filled = np.flatnonzero(array.any(axis=others))
    if not filled.size:
        return slice(0, 0)
    return slice(int(filled[0]), int(filled[-1]) + 1)


def _bounding_box_above(volume: Volume, threshold_hu: float) -> list[slice]:
    """Return the bounding box of all voxels above a threshold plus ``CROP_MARGIN_MM``, or the whole scan if none is."""
    x, y, z = volume.shape
    above = [np.zeros(length, dtype=bool) for length in volume.shape]
    for start in range(0, z, _BLOCK_SLICES):
        part = slice(start, min(start + _BLOCK_SLICES, z))
        filled = volume.hu((slice(0, x), slice(0, y), part)) > threshold_hu
        above[0] |= filled.any(axis=(1, 2))
        above[1] |= filled.any(axis=(0, 2))
        above[2][part] = filled.any(axis=(0, 1))
        volume.release()
    if not above[0].any():
        return [slice(0, length) for length in volume.shape]
    box = []
    for filled_along, spacing in zip(above, volume.spacing, strict=True):
        margin = int(np.ceil(CROP_MARGIN_MM / spacing))
        first, last = np.flatnonzero(filled_along)[[0, -1]]
        box.append(slice(max(0, int(first) - margin), min(len(filled_along), int(last) + 1 + margin)))
    return box
