"""Volume and LabelMap: voxel arrays with an affine and the path of their file."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import GeometryError, LabelError, NotACtError
from fseft_edge.runtime.scans.lattice import PLAUSIBLE_SPACING_MM, deviation
from fseft_edge.runtime.scans.nifti_forms import NiftiForms

_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, eq=False)
class Volume:
    """One CT with stored values ``array[x, y, z]`` and HU = ``slope * array + intercept``.

    Attributes:
        array: stored values ``[X, Y, Z]`` with the dtype of the file; may be a read-only memory map. Only the requested
            parts are ever rescaled.
        affine: float64 4x4, voxel index to RAS+ world coordinates in mm.
        slope: HU per stored unit (NIfTI ``scl_slope``, DICOM RescaleSlope).
        intercept: HU of a stored zero (NIfTI ``scl_inter``, DICOM RescaleIntercept).
        source: file or folder of the scan; None for a volume without a file.
        warnings: everything that the reader left out, corrected or assumed, one sentence each. ``segment`` shows these
            sentences and writes them into the JSON file of the case; the report of a batch shows them too. They contain
            no file name and no header text that could identify a patient.
        forms: the geometry of the NIfTI file as stored, which masks repeat; None for a scan from another source.

    Raises:
        NotACtError: the array is not three-dimensional and numeric, an axis has fewer than two voxels, or the slope or
            intercept is invalid.
        GeometryError: the affine is not 4x4, not finite, or singular, or the voxel spacing is implausible.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    slope: float = 1.0
    intercept: float = 0.0
    source: Path | None = None
    warnings: tuple[str, ...] = ()
    forms: NiftiForms | None = None

    def __post_init__(self) -> None:
        name = self.source or "This volume"
        if self.array.ndim != 3:
            raise NotACtError(
                f"{name} has {self.array.ndim} dimensions instead of 3: its shape is {self.array.shape}.",
                remedy="Give one three-dimensional CT. Split a time series into single phases.",
            )
        if self.array.dtype.kind not in "iuf":
            raise NotACtError(
                f"{name} contains values of type {self.array.dtype}, which are not intensities.",
                remedy="Give the original CT, not a colour image or a complex image.",
            )
        if min(self.array.shape) < 2:
            raise NotACtError(
                f"{name} has the shape {self.array.shape}, but a CT has at least two voxels along each axis.",
                remedy="Give a complete CT series, not a single slice.",
            )
        if not (np.isfinite(self.slope) and np.isfinite(self.intercept)) or self.slope == 0:
            raise NotACtError(
                f"{name} has the invalid rescale slope {self.slope} or intercept {self.intercept}.",
                remedy="Export the series again from the PACS.",
            )
        object.__setattr__(self, "affine", _checked_affine(self.affine, name))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along x, y, z."""
        x, y, z = self.array.shape
        return x, y, z

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between adjacent voxel centres along x, y, z."""
        return spacing_of(self.affine)

    @property
    def axcodes(self) -> str:
        """Nearest anatomical direction of each array axis: ``"RAS"``, ``"LPS"``, ..."""
        return "".join(nib.orientations.aff2axcodes(self.affine))

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def label_map(self, array: NDArray[np.unsignedinteger[Any]]) -> LabelMap:
        """Return label values ``[X, Y, Z]`` as a label map on the lattice of this scan."""
        return LabelMap(array, self.affine, forms=self.forms)

    def hu(self, selection: tuple[slice, slice, slice]) -> NDArray[np.float32]:
        """Return the HU of a part of the scan, float32, in the axis order of the array. Only that part is read."""
        return self.in_hu(self.array[selection])

    def in_hu(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Return stored values of the scan in HU, float32."""
        hu: NDArray[np.float32] = stored.astype(np.float32)
        if self.slope != 1.0:
            hu *= np.float32(self.slope)
        if self.intercept != 0.0:
            hu += np.float32(self.intercept)
        return hu

    def chunks(self) -> Iterator[NDArray[Any]]:
        """Yield the stored values in pieces ``[n, Y, X]``, slices in order, C-contiguous and little-endian.

        The concatenated bytes of all pieces are the voxels in NIfTI order (x fastest, then y, then z), independent of
        the memory layout and byte order of the array. A hash of the pieces therefore depends only on the values and the
        dtype. Memory-mapped pages are released after each piece.
        """
        for piece in slabs(self.array):
            yield np.ascontiguousarray(piece.T, dtype=piece.dtype.newbyteorder("<"))
            self.release()

    def release(self) -> None:
        """Release the resident memory-mapped pages. The operating system reads them again at the next access."""
        base: object = self.array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and not self.array.flags.writeable:
            base.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Annotation or mask of a scan: one label value for each voxel, 0 for the background.

    Attributes:
        array: label values ``[X, Y, Z]``, unsigned integers.
        affine: float64 4x4, voxel index to RAS+ world coordinates in mm.
        source: file of the label map; None for a label map without a file.
        forms: the geometry of the scan's NIfTI file as stored; None computes sform and qform from the affine.

    Raises:
        LabelError: the array is not three-dimensional, or its dtype is not an unsigned integer.
        GeometryError: the affine is not 4x4, not finite, or singular, or the voxel spacing is implausible.
    """

    array: NDArray[np.unsignedinteger[Any]]
    affine: NDArray[np.float64]
    source: Path | None = None
    forms: NiftiForms | None = None

    def __post_init__(self) -> None:
        name = self.source or "This label map"
        if self.array.ndim != 3:
            raise LabelError(
                f"{name} has {self.array.ndim} dimensions instead of 3: its shape is {self.array.shape}.",
                remedy="Give one three-dimensional label map, with one label value for each organ.",
            )
        if self.array.dtype.kind != "u":
            raise LabelError(
                f"{name} contains values of type {self.array.dtype} instead of unsigned integers.",
                remedy="Store the label map as unsigned integers.",
            )
        object.__setattr__(self, "affine", _checked_affine(self.affine, name))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along x, y, z."""
        x, y, z = self.array.shape
        return x, y, z

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def contains(self, label: int) -> bool:
        """Return whether a voxel has this label value."""
        return any(bool((piece == label).any()) for piece in slabs(self.array))

    def mask(self, label: int) -> NDArray[np.bool_]:
        """Return the voxels with this label value, bool ``[X, Y, Z]``."""
        mask: NDArray[np.bool_] = self.array == label
        return mask

    def shares(self, label: int) -> NDArray[np.bool_]:
        """Return the share of each voxel that the organ with this label value fills: all or nothing."""
        return self.mask(label)


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the voxel spacing of an affine along x, y, z in mm."""
    # Column by column, so that a permutation or flip of axes changes no bit of the spacing.
    x, y, z = (float(np.sqrt(a * a + b * b + c * c)) for a, b, c in affine[:3, :3].T)
    return x, y, z


def slabs(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield consecutive views ``array[:, :, a:b]`` of at most 8 MiB each (at least one slice)."""
    slice_bytes = array.itemsize * array.shape[0] * array.shape[1]
    depth = max(1, _CHUNK_BYTES // slice_bytes)
    for start in range(0, array.shape[2], depth):
        yield array[:, :, start : start + depth]


def labels_on(
    reference: Volume | LabelMap, labels: LabelMap, words: tuple[str, str] = ("scan", "label map")
) -> LabelMap:
    """Return a label map in the axis order of a reference, voxel by voxel, with the affine of the reference.

    Programs store the same lattice in up to 48 ways: axes in another order, or in the opposite direction. The label map
    is reordered without interpolation. Both lattices are the same if every corner voxel agrees within a tenth of the
    voxel spacing along each axis (:data:`fseft_edge.runtime.scans.lattice.LATTICE_TOLERANCE`).

    Args:
        reference: scan or label map whose lattice is wanted.
        labels: label map on the same lattice.
        words: what the messages call ``reference`` and ``labels``.

    Raises:
        GeometryError: the lattices differ; the message names both files and states the difference.
    """
    order, flipped = _stored_order(reference.affine, labels.affine)
    difference = None
    if reference.shape != tuple(labels.shape[axis] for axis in order):
        difference = f"the {words[0]} has {reference.shape} voxels, and the {words[1]} has {labels.shape} voxels"
    else:
        to_labels = np.zeros((4, 4))  # from a voxel index of the reference to a voxel index of the label map
        to_labels[3, 3] = 1.0
        for axis, stored in enumerate(order):
            to_labels[stored, axis] = -1.0 if flipped[axis] else 1.0
            to_labels[stored, 3] = labels.shape[stored] - 1 if flipped[axis] else 0
        apart = deviation(reference.affine, labels.affine @ to_labels, reference.shape)
        if not apart.is_rounding:
            difference = f"the same voxel differs in place by up to {apart}"
    if difference is not None:
        first, second = words
        raise GeometryError(
            f"The {first} {reference.source or '(unnamed)'} and the {second} {labels.source or '(unnamed)'} "
            f"have different lattices: {difference}.",
            remedy=f"Give a {first} and a {second} that belong together, or resample the {second} to the {first} with "
            "nearest neighbour.",
        )
    array = labels.array
    if order != (0, 1, 2) or any(flipped):
        axes = tuple(axis for axis in range(3) if flipped[axis])
        array = np.asfortranarray(np.flip(array.transpose(order), axes))
    return LabelMap(array, reference.affine, labels.source, reference.forms)


def _stored_order(
    reference: NDArray[np.float64], stored: NDArray[np.float64]
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Return the axis of ``stored`` along each axis of ``reference``, and whether it runs in the opposite direction.

    Axes that correspond to no axis of the reference keep their order, so that a message can state how far off they are.
    """
    steps = np.rint(np.linalg.solve(reference[:3, :3], stored[:3, :3]))
    found = [tuple(np.flatnonzero(row).tolist()) for row in steps]
    if sorted(found) != [(0,), (1,), (2,)] or np.abs(steps).max() > 1:
        return (0, 1, 2), (False, False, False)
    (x,), (y,), (z,) = found
    return (x, y, z), (bool(steps[0, x] < 0), bool(steps[1, y] < 0), bool(steps[2, z] < 0))


def _checked_affine(affine: NDArray[np.float64], name: object) -> NDArray[np.float64]:
    checked = np.array(affine, dtype=np.float64)
    remedy = "Convert the original DICOM series again with a program that keeps the geometry."
    if checked.shape != (4, 4) or not np.isfinite(checked).all():
        raise GeometryError(f"{name} has an affine that is not a finite 4x4 matrix.", remedy=remedy)
    spacing = spacing_of(checked)
    if min(spacing) < PLAUSIBLE_SPACING_MM[0] or max(spacing) > PLAUSIBLE_SPACING_MM[1]:
        low, high = PLAUSIBLE_SPACING_MM
        raise GeometryError(
            f"{name} has a voxel spacing of {spacing} mm, but a CT has a spacing between {low:g} and {high:g} mm.",
            remedy=remedy,
        )
    # The determinant divided by the product of the spacings is 1 for perpendicular axes and 0 for axes in one plane.
    if abs(np.linalg.det(checked[:3, :3])) < 1e-3 * np.prod(spacing):
        raise GeometryError(f"{name} has a singular affine: its axes are in one plane.", remedy=remedy)
    checked.flags.writeable = False
    return checked
