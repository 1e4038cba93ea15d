"""Volume and LabelMap: voxels, the lattice they lie on, and where they came from."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import GeometryError, LabelError, NotACtError

LATTICE_TOLERANCE_MM = 1e-3
"""Two lattices are the same when all eight corner voxels agree to this distance."""

PLAUSIBLE_SPACING_MM = (0.01, 100.0)
"""Voxels outside this range are in another unit, or no voxels of a patient."""

_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, eq=False)
class Volume:
    """One CT: ``array[x, y, z]`` as stored, with HU = ``slope * array + intercept``.

    Attributes:
        array: ``[X, Y, Z]`` in the file's own dtype; may be a read-only memory map. Never rescaled as a whole.
        affine: float64 4x4, voxel index to RAS+ world coordinates in millimetres.
        slope: HU per stored unit (NIfTI ``scl_slope``, DICOM RescaleSlope).
        intercept: HU of a stored zero (NIfTI ``scl_inter``, DICOM RescaleIntercept).
        source: the file or folder it was read from.

    Raises:
        NotACtError: the array is not three-dimensional and numeric, or an axis has fewer than two voxels.
        GeometryError: the affine is not 4x4, not finite, singular, or its voxels have an implausible size.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    slope: float = 1.0
    intercept: float = 0.0
    source: Path | None = None

    def __post_init__(self) -> None:
        name = self.source or "This volume"
        if self.array.ndim != 3:
            raise NotACtError(
                f"{name} has {self.array.ndim} dimensions, shape {self.array.shape}.",
                remedy="Give one three-dimensional CT; split a time series into its phases.",
            )
        if self.array.dtype.kind not in "iuf":
            raise NotACtError(
                f"{name} holds {self.array.dtype} values, not intensities.",
                remedy="Give the CT itself, not a colour rendering or a complex image.",
            )
        if min(self.array.shape) < 2:
            raise NotACtError(
                f"{name} has shape {self.array.shape}: fewer than two slices.",
                remedy="Give a whole CT series, not a single slice.",
            )
        if not (np.isfinite(self.slope) and np.isfinite(self.intercept)) or self.slope == 0:
            raise NotACtError(
                f"{name} has rescale slope {self.slope} and intercept {self.intercept}.",
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
        """Distance in mm between neighbouring voxel centres along x, y, z."""
        return spacing_of(self.affine)

    @property
    def axcodes(self) -> str:
        """Where each array axis points, nearest anatomical direction: ``"RAS"``, ``"LPS"``, ..."""
        return "".join(nib.orientations.aff2axcodes(self.affine))

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def hu(self, selection: tuple[slice, slice, slice]) -> NDArray[np.float32]:
        """HU of a part of the scan, float32, in the array's own axis order; only that part is read."""
        hu: NDArray[np.float32] = self.array[selection].astype(np.float32)
        if self.slope != 1.0:
            hu *= np.float32(self.slope)
        if self.intercept != 0.0:
            hu += np.float32(self.intercept)
        return hu

    def chunks(self) -> Iterator[NDArray[Any]]:
        """Stored values in pieces ``[n, Y, X]``, slices in order, each C-contiguous and little-endian.

        Joined, the pieces' bytes are the voxels in NIfTI's own order (x fastest, then y, then z) whatever the array's
        memory layout or byte order, so that a running hash of them depends on the values and the dtype alone.
        Memory-mapped pages are given back after each piece.
        """
        for piece in slabs(self.array):
            yield np.ascontiguousarray(piece.T, dtype=piece.dtype.newbyteorder("<"))
            self.release()

    def release(self) -> None:
        """Let go of the memory-mapped pages read so far; they are read again when next touched."""
        base: object = self.array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and not self.array.flags.writeable:
            base.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Annotations of a scan, or a segmentation of it: one whole number per voxel, 0 where there is none.

    Attributes:
        array: ``[X, Y, Z]``, unsigned integers.
        affine: float64 4x4, voxel index to RAS+ world coordinates in millimetres.
        source: the file it was read from.

    Raises:
        LabelError: the array is not three-dimensional or not of unsigned integers.
        GeometryError: the affine is not 4x4, not finite, singular, or its voxels have an implausible size.
    """

    array: NDArray[np.unsignedinteger[Any]]
    affine: NDArray[np.float64]
    source: Path | None = None

    def __post_init__(self) -> None:
        name = self.source or "This label map"
        if self.array.ndim != 3:
            raise LabelError(
                f"{name} has {self.array.ndim} dimensions, shape {self.array.shape}.",
                remedy="Give one three-dimensional label map in which every organ has its own value.",
            )
        if self.array.dtype.kind != "u":
            raise LabelError(
                f"{name} holds {self.array.dtype} values, not unsigned integers.",
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


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Lengths in mm of an affine's three voxel steps."""
    # A column at a time, so that permuting or flipping axes changes no bit of a step's length.
    x, y, z = (float(np.sqrt(a * a + b * b + c * c)) for a, b, c in affine[:3, :3].T)
    return x, y, z


def slabs(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Consecutive views ``array[:, :, a:b]`` of at most 8 MiB each (at least one slice)."""
    slice_bytes = array.itemsize * array.shape[0] * array.shape[1]
    depth = max(1, _CHUNK_BYTES // slice_bytes)
    for start in range(0, array.shape[2], depth):
        yield array[:, :, start : start + depth]


def same_lattice(a: Volume | LabelMap, b: Volume | LabelMap) -> bool:
    """Whether both have the same shape and their eight corner voxels coincide to ``LATTICE_TOLERANCE_MM``."""
    if a.shape != b.shape:
        return False
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*((0.0, n - 1.0) for n in a.shape))])
    distances = np.linalg.norm(corners @ (a.affine - b.affine).T, axis=1)
    return bool(distances.max() <= LATTICE_TOLERANCE_MM)


def check_labels_match(volume: Volume, labels: LabelMap) -> None:
    """Make sure that a scan and its annotations lie on the same lattice.

    Raises:
        GeometryError: they do not; the message names both files and says in what they differ.
    """
    if same_lattice(volume, labels):
        return
    if volume.shape != labels.shape:
        difference = f"shape {volume.shape} against {labels.shape}"
    else:
        difference = f"affine {_printed(volume.affine)} against {_printed(labels.affine)}"
    raise GeometryError(
        f"The scan {volume.source or '(unnamed)'} and the labels {labels.source or '(unnamed)'} "
        f"lie on different lattices: {difference}.",
        remedy="Resample the labels onto the scan (nearest neighbour), or pair each scan with its own labels.",
    )


def _printed(affine: NDArray[np.float64]) -> str:
    return str(np.round(affine[:3], 4).tolist())


def _checked_affine(affine: NDArray[np.float64], name: object) -> NDArray[np.float64]:
    checked = np.array(affine, dtype=np.float64)
    remedy = "Convert the original DICOM series again with a tool that keeps its geometry."
    if checked.shape != (4, 4) or not np.isfinite(checked).all():
        raise GeometryError(f"{name} has an affine that is not a finite 4x4 matrix.", remedy=remedy)
    spacing = spacing_of(checked)
    if min(spacing) < PLAUSIBLE_SPACING_MM[0] or max(spacing) > PLAUSIBLE_SPACING_MM[1]:
        raise GeometryError(f"{name} has voxels of {spacing} mm, which no CT has.", remedy=remedy)
    # The determinant relative to the steps' lengths: 1 for perpendicular axes, 0 for axes in one plane.
    if abs(np.linalg.det(checked[:3, :3])) < 1e-3 * np.prod(spacing):
        raise GeometryError(f"{name} has a singular affine: its axes do not span space.", remedy=remedy)
    checked.flags.writeable = False
    return checked
