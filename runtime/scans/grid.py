"""Grid: the lattice an encoder works on, and the exact way there and back.

The grid keeps the scan's own axes, permuted and flipped to the nearest anatomical directions and sampled at the spacing
asked for, so that every resampling is linear interpolation along one axis after another. MONAI's ``Orientation`` and
``Spacing`` do the same up to where the first voxel lies: theirs shares the centre of the scan's first voxel, ours
centres the field of view. Going there resamples HU, coming back resamples probabilities; labels are never resampled as
labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.scans.axis_map import AxisMap, AxisMatrix, apply_first, drawn_on, last_drawn_on, reaching
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import Volume

CROP_MARGIN_MM = 10.0

_BLOCK_SLICES = 8
PIECE_BYTES = 32 << 20


class SourcePiece(NamedTuple):
    """Probabilities on part of the scan's own lattice.

    Attributes:
        axis: the scan's array axis that is cut.
        start, stop: from where to where, in the scan's voxels.
        probabilities: float32 ``[K, x, y, z]`` in the scan's axis order, that axis ``stop - start`` long; strides are
            positive but need not be C order.
    """

    axis: int
    start: int
    stop: int
    probabilities: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Grid:
    """A scan's lattice after preprocessing; z is the axis that streams.

    The field of view of the grid is centred on that of the scan (or of its crop) and as long to the nearest whole
    voxel. All 48 ways to store the same scan give the same grid voxels, bit for bit.

    Attributes:
        preprocessing: what it was made by.
        source_shape: voxels of the scan, in its own axis order.
        source_affine: the scan's affine, voxel to RAS+ mm.
        axes: for each axis of the grid, how it lies over one of the scan.
    """

    preprocessing: Preprocessing
    source_shape: tuple[int, int, int]
    source_affine: NDArray[np.float64]
    axes: tuple[AxisMap, AxisMap, AxisMap]

    @classmethod
    def of(cls, volume: Volume, preprocessing: Preprocessing) -> Grid:
        """The grid of a scan. With ``crop_below_hu`` the scan is read through once, else only its geometry counts."""
        box = [slice(0, length) for length in volume.shape]
        if preprocessing.crop_below_hu is not None:
            box = _box_above(volume, preprocessing.crop_below_hu)
        stored = nib.orientations.io_orientation(volume.affine)
        wanted = nib.orientations.axcodes2ornt(tuple(preprocessing.axcodes))
        axes = []
        for (anatomical, direction), spacing in zip(wanted, preprocessing.spacing, strict=True):
            axis = int(np.flatnonzero(stored[:, 0] == anatomical)[0])
            flipped = bool(stored[axis, 1] != direction)
            whole = AxisMap(axis, flipped, volume.shape[axis], volume.spacing[axis], 0, volume.shape[axis], spacing)
            part = whole.other_way(box[axis])
            axes.append(replace(whole, start=part.start, stop=part.stop))
        x, y, z = axes
        return cls(preprocessing, volume.shape, volume.affine, (x, y, z))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Grid voxels along x, y, z."""
        x, y, z = (axis.length for axis in self.axes)
        return x, y, z

    @cached_property
    def affine(self) -> NDArray[np.float64]:
        """Float64 4x4, grid voxel to RAS+ mm."""
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
        """Volume of one grid voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def section(self, volume: Volume, z0: int, z1: int) -> NDArray[np.float32]:
        """Encoder input: grid slices ``z0`` to ``z1``, float32 ``[X, Y, z1 - z0]`` in [0, 1].

        HU are interpolated first, then clipped to the window and scaled, as the published models' pipelines do.
        Reads only the scan's slices that these need and lets go of them afterwards.

        Raises:
            ValueError: the slices are not all on the grid, or the volume is not the grid's.
        """
        if volume.shape != self.source_shape or not 0 <= z0 < z1 <= self.shape[2]:
            raise ValueError(
                f"no slices {z0}:{z1} of a {volume.shape} scan on this {self.shape} grid of a {self.source_shape} one"
            )
        low, high = self.preprocessing.hu_window
        section = self._interpolated(volume.hu, self._to_grid, slice(z0, z1))
        volume.release()
        np.clip(section, low, high, out=section)
        section -= np.float32(low)
        section /= np.float32(high - low)
        return section

    def occupancy(self, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        """How much of each grid voxel a mask on the scan's lattice fills: float32 ``[X, Y, Z]`` in [0, 1].

        Linear interpolation, widened to the grid's spacing where the grid is coarser, so that thin organs keep their
        volume.

        Raises:
            ValueError: the mask's shape is not the scan's.
        """
        if mask.shape != self.source_shape:
            raise ValueError(f"mask of shape {mask.shape} on a scan of shape {self.source_shape}")
        occupancy = np.zeros(self.shape, dtype=np.float32)
        filled = self._to_grid_order([_extent(mask, axis) for axis in range(3)])
        matrices = [axis.to_grid(antialias=True) for axis in self.axes]
        x, y, z = (reaching(matrix, extent) for matrix, extent in zip(matrices, filled, strict=True))
        if min(part.stop - part.start for part in (x, y, z)) > 0:
            in_reach = (matrices[0][x], matrices[1][y], matrices[2])
            occupancy[x, y, z] = self._interpolated(lambda part: mask[part].astype(np.float32), in_reach, z)
        return occupancy

    def to_source(
        self, sections: Iterator[tuple[int, NDArray[np.float32]]], least: float = 0.0
    ) -> Iterator[SourcePiece]:
        """Carry probabilities from the grid to the scan's own lattice, piece by piece.

        Args:
            sections: ``(z0, float32 [K, X, Y, n])`` of the whole grid, each beginning where the last one ended.
            least: what does not matter: a class may be 0 where its interpolated probability would not exceed this.
                Where it does, it is the same to the last bit. Far from every organ nothing is computed.

        Yields:
            Pieces of at most 32 MiB (at least one slice) that cover the scan once, in the order of the grid's z:
            descending where the scan stores that axis the other way round. Between the outermost grid voxel centres and
            the scan's edge the outermost value holds; outside a cropped grid the probability is 0.

        Raises:
            ValueError: the sections leave a gap, are out of order, or do not fit the grid.
        """
        along_z = self._to_scan[2]
        needed = last_drawn_on(along_z)

        done = arrived = kept_from = 0
        kept: NDArray[np.float32] | None = None
        for z0, section in sections:
            if z0 != arrived or section.ndim != 4 or section.shape[1:3] != self.shape[:2]:
                raise ValueError(f"section of shape {section.shape} at {z0} where {arrived} of {self.shape} was next")
            kept = _slices_first(section, after=kept)
            arrived += section.shape[3]
            ready = int(np.searchsorted(needed, arrived))
            step = self._slices_in_a_piece(section.shape[0])
            for start in range(done, ready, step):
                rows = slice(start, min(start + step, ready))
                used = drawn_on(along_z, rows)
                slices = kept[used.start - kept_from : used.stop - kept_from]
                yield self._piece(along_z[rows, used], slices, rows, least)
            done = ready
            to_come = drawn_on(along_z, slice(ready, along_z.shape[0]))
            needed_from = min(to_come.start, arrived) if to_come.stop else arrived
            kept = kept[needed_from - kept_from :].copy()
            kept_from = needed_from
        if arrived != self.shape[2]:
            raise ValueError(f"sections end at {arrived} of {self.shape[2]} grid slices")

    @cached_property
    def _to_grid(self) -> tuple[AxisMatrix, AxisMatrix, AxisMatrix]:
        x, y, z = (axis.to_grid(antialias=self.preprocessing.antialias) for axis in self.axes)
        return x, y, z

    @cached_property
    def _to_scan(self) -> tuple[AxisMatrix, AxisMatrix, AxisMatrix]:
        x, y, z = (axis.to_source() for axis in self.axes)
        return x, y, z

    def _slices_in_a_piece(self, classes: int) -> int:
        x, y, _ = (axis.source_length for axis in self.axes)
        return max(1, PIECE_BYTES // (4 * classes * x * y))

    def _interpolated(
        self,
        read: Callable[[tuple[slice, slice, slice]], NDArray[np.float32]],
        matrices: tuple[AxisMatrix, AxisMatrix, AxisMatrix],
        z: slice,
    ) -> NDArray[np.float32]:
        """Values on the grid's slices ``z``, float32 ``[X, Y, n]``; ``read`` gives parts of the scan in its axes."""
        along_x, along_y, along_z = matrices
        in_plane = [drawn_on(matrix, slice(0, matrix.shape[0])) for matrix in (along_x, along_y)]
        along_x, along_y = along_x[:, in_plane[0]], along_y[:, in_plane[1]]
        result = np.empty((along_x.shape[0], along_y.shape[0], z.stop - z.start), dtype=np.float32)
        for start in range(z.start, z.stop, _BLOCK_SLICES):
            rows = slice(start, min(start + _BLOCK_SLICES, z.stop))
            depth = drawn_on(along_z, rows)
            x, y, depth_in_scan = self._to_scan_order([*in_plane, depth])
            block = self._in_grid_order(read((x, y, depth_in_scan)))
            for index, plane in enumerate(apply_first(along_z[rows, depth], block.T), start - z.start):
                result[:, :, index] = apply_first(along_x, apply_first(along_y, plane).T)
        return result

    def _piece(self, along_z: AxisMatrix, slices: NDArray[np.float32], rows: slice, least: float) -> SourcePiece:
        """The scan's slices ``rows`` (counted along the grid's z) out of the grid slices ``[n, K, X, Y]`` they draw on.

        Only the rectangle in which an organ exceeds ``least`` is interpolated, with the voxels around it: what is
        interpolated draws on two neighbours along each axis, and exceeds ``least`` only where one of them does.
        """
        x, y, z = self.axes
        along_x, along_y, _ = self._to_scan
        classes = slices.shape[1]
        stored = np.zeros((classes, rows.stop - rows.start, y.source_length, x.source_length), dtype=np.float32)
        flipped = tuple(axis for axis, along in ((1, z), (2, y), (3, x)) if along.flipped)
        piece = np.flip(stored, flipped)
        for organ in range(classes):
            filled: NDArray[np.bool_] = np.any(slices[:, organ] > least, axis=0)
            from_x, from_y = (_extent(filled, axis, margin=1) for axis in (0, 1))
            to_x, to_y = reaching(along_x, from_x), reaching(along_y, from_y)
            planes = apply_first(along_z, slices[:, organ, from_x, from_y])
            for index, plane in enumerate(planes):
                on_x = apply_first(along_x[to_x, from_x], plane)
                piece[organ, index, to_y, to_x] = apply_first(along_y[to_y, from_y], on_x.T)
        order = np.argsort([axis.source_axis for axis in self.axes])
        probabilities = stored.transpose(0, *(3 - order))
        cut = z.other_way(rows)
        return SourcePiece(z.source_axis, cut.start, cut.stop, probabilities)

    def _in_grid_order(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """A view of a part of the scan with its axes permuted and flipped to the grid's."""
        permuted = array.transpose([axis.source_axis for axis in self.axes])
        return np.flip(permuted, tuple(index for index, axis in enumerate(self.axes) if axis.flipped))

    def _to_grid_order(self, box: list[slice]) -> list[slice]:
        return [axis.other_way(box[axis.source_axis]) for axis in self.axes]

    def _to_scan_order(self, box: list[slice]) -> tuple[slice, slice, slice]:
        by_source = sorted(zip(self.axes, box, strict=True), key=lambda pair: pair[0].source_axis)
        x, y, z = (axis.other_way(part) for axis, part in by_source)
        return x, y, z


def _slices_first(section: NDArray[np.float32], *, after: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """``[K, X, Y, n]`` as ``[n, K, X, Y]``, appended to earlier slices.

    Row by row, so that what is read and what is written stay in the processor's cache: four times as fast as one
    transposed copy.
    """
    classes, x, y, n = section.shape
    before = 0 if after is None else len(after)
    slices = np.empty((before + n, classes, x, y), dtype=np.float32)
    if after is not None:
        slices[:before] = after
    for organ, row in np.ndindex(classes, x):
        slices[before:, organ, row] = section[organ, row].T
    return slices


def _extent(array: NDArray[Any], axis: int, margin: int = 0) -> slice:
    """The smallest range along one axis that holds everything but zeros, and a margin as far as there is one."""
    others = tuple(index for index in range(array.ndim) if index != axis)
    filled = np.flatnonzero(array.any(axis=others))
    if not filled.size:
        return slice(0, 0)
    return slice(max(int(filled[0]) - margin, 0), min(int(filled[-1]) + 1 + margin, array.shape[axis]))


def _box_above(volume: Volume, threshold_hu: float) -> list[slice]:
    """Bounding box of the voxels above a HU value with ``CROP_MARGIN_MM`` around; the whole scan if there are none."""
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
