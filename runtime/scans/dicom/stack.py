"""Stack of slices: order, affine, and check of equal distances (PS3.3 C.7.6.2.1.1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import (
    DuplicateSliceError,
    GantryTiltError,
    GeometryError,
    MissingSliceError,
    UnevenSlicesError,
)
from fseft_edge.runtime.scans.dicom.elements import element_name
from fseft_edge.runtime.scans.dicom.headers import SliceHeader
from fseft_edge.runtime.scans.dicom.pixels import fault_counts

SAME_POSITION_MM = 0.01
"""Slices closer than this distance are at the same position, because no CT has such a small slice distance."""

SLICE_TOLERANCE_SHARE, SLICE_TOLERANCE_MM = 0.1, 0.1
"""Largest accepted deviation of a slice from its position: this share of the slice distance, and at most this many mm.

Positions are decimal strings, which scanners round to one to six decimals. Rounding to one decimal moves the first, the
last and any other slice by up to 0.05 mm each. The deviation from the line between first and last slice is then up to
0.1 mm.
"""

SAME_DIRECTION = 3.5e-3
"""Largest difference of direction cosines within one stack, 0.2 degrees. It allows for rounding to three decimals."""

CORNER_VOXELS = 0.1
"""Largest accepted distance, in pixels, between a corner of a slice and the same corner according to the mean
ImageOrientationPatient and PixelSpacing of the stack. Scanners round both, sometimes differently from slice to slice.
"""

STRAIGHTENED_VOXELS, STRAIGHTENED_MM = 0.1, 0.08
"""Largest distance by which a voxel moves when axes become perpendicular: this part of the smallest voxel spacing, and
at most this many mm. DICOM results accept 0.1 mm between a slice and its voxels."""

TILT_DEGREES = 0.1
"""Largest angle between the direction of a stack and the slice normal that is always accepted."""

DRIFT_DEGREES, DRIFT_VOXELS = 1.0, 0.1
"""A sideways movement of the table is accepted up to this angle and up to this part of a pixel from slice to slice.

The affine of the stack contains a movement that is larger than rounding. Gantries are tilted by larger angles, or
state the angle in GantryDetectorTilt.
"""

_PERPENDICULAR = 1e-6
"""Largest cosine of an angle that counts as a right angle. ITK 5.4 refuses NIfTI files above about 4e-4 (measured)."""

_COSINE_TOLERANCE = 1e-3
"""Largest error of length and angle of direction cosines. It allows for rounding to three decimals."""

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def normal_of(slices: Sequence[SliceHeader]) -> NDArray[np.float64]:
    """Return the normal of slices, LPS+, of length about one: the cross product of their mean row and column."""
    row, column = np.array([slice_.orientation for slice_ in slices], float).mean(axis=0).reshape(2, 3)
    return np.cross(row, column)


def sort_slices(slices: Sequence[SliceHeader]) -> tuple[SliceHeader, ...]:
    """Return the slices sorted along the normal, or by file and frame if a position or orientation is missing."""
    given = sorted(slices, key=lambda slice_: (slice_.file.path, slice_.file.member or "", slice_.frame))
    if any(slice_.position is None or slice_.orientation is None for slice_ in slices):
        return tuple(given)
    normal = normal_of(slices)
    return tuple(sorted(given, key=lambda slice_: float(np.dot(normal, slice_.position or ()))))


def same_plane(a: SliceHeader, b: SliceHeader) -> bool:
    """Return True if two slices of equal matrix can lie in one stack: orientation and spacing agree but for rounding.

    Missing numbers agree with all numbers, so that a slice without them stays in its series, and the series is refused.
    """
    if a.orientation and b.orientation and np.abs(np.subtract(a.orientation, b.orientation)).max() > SAME_DIRECTION:
        return False
    if not (a.spacing and b.spacing):
        return True
    off = np.abs(np.subtract(a.spacing, b.spacing)) * (max(a.rows - 1, 0), max(a.columns - 1, 0))
    return bool((off <= CORNER_VOXELS * min(*a.spacing, *b.spacing)).all())


def affine_of(slices: Sequence[SliceHeader]) -> NDArray[np.float64]:
    """Return the affine of sorted slices, float64 4x4, voxel index to RAS+ mm. :func:`check_stack` must have succeeded.

    The slice step is the vector from the first to the last slice divided by the number of steps. The steps within a
    slice are those of the headers, or their mean. If rounding or a small drift of the table is the reason why the three
    steps are not perpendicular, they become perpendicular, because programs based on ITK refuse other images: no voxel
    moves by more than ``STRAIGHTENED_VOXELS`` and ``STRAIGHTENED_MM``. Other stacks keep their steps.
    """
    start, stop = (np.array(slice_.position) for slice_ in (slices[0], slices[-1]))
    steps = _steps(slices)
    within = steps[0] if (steps == steps[0]).all() else steps.mean(axis=0)
    affine = np.eye(4)
    affine[:3, 0] = _LPS_TO_RAS @ within[0]
    affine[:3, 1] = _LPS_TO_RAS @ within[1]
    affine[:3, 2] = _LPS_TO_RAS @ ((stop - start) / (len(slices) - 1))
    affine[:3, 3] = _LPS_TO_RAS @ start
    if not perpendicular(affine):
        affine = _straightened(affine, (slices[0].columns, slices[0].rows, len(slices)))
    return affine + 0.0  # no negative zeros


def perpendicular(affine: NDArray[np.float64]) -> bool:
    """Return True if the axes of an affine are perpendicular, as exactly as programs based on ITK demand."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() <= _PERPENDICULAR)


def _straightened(affine: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """Return an affine with perpendicular axes, and with equal plane and centre; the same affine if a corner moves far.

    The directions of rows and columns become perpendicular within their plane, and the slice step becomes the normal.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :2] / spacing[:2], full_matrices=False)
    within = left @ right
    normal = np.cross(within[:, 0], within[:, 1])
    straight = np.eye(4)
    straight[:3, :3] = np.column_stack([within * spacing[:2], normal * (affine[:3, 2] @ normal)])
    centre = (np.array(shape) - 1) / 2
    straight[:3, 3] = affine[:3, 3] + (affine - straight)[:3, :3] @ centre
    corners = np.array(list(product((-1, 1), repeat=3))) * centre
    moved = np.linalg.norm(corners @ (affine - straight)[:3, :3].T, axis=1).max()
    limit = min(STRAIGHTENED_VOXELS * float(spacing.min()), STRAIGHTENED_MM)
    return straight if moved <= limit else affine


def _steps(slices: Sequence[SliceHeader]) -> NDArray[np.float64]:
    """Return the steps ``[slices, 2, 3]`` from column to column and from row to row of each slice, LPS+ mm."""
    directions = np.array([slice_.orientation for slice_ in slices]).reshape(len(slices), 2, 3)
    spacings = np.array([(slice_.spacing or ())[::-1] for slice_ in slices])  # between columns, between rows
    steps: NDArray[np.float64] = directions * spacings[:, :, None]
    return steps


def drift_of(slices: Sequence[SliceHeader]) -> float:
    """Return the sideways shift in mm of the last sorted slice relative to the first one."""
    return _tilt(slices)[0]


def _tilt(stack: Sequence[SliceHeader]) -> tuple[float, float, float]:
    """Return the sideways shift of the last sorted slice in mm, the angle in degrees, and the pixel spacing in mm."""
    normal = normal_of(stack)
    normal /= np.linalg.norm(normal)
    across = np.subtract(stack[-1].position or (), stack[0].position or ())
    height = float(across @ normal)
    sideways = float(np.linalg.norm(across - height * normal))
    return sideways, float(np.degrees(np.arctan2(sideways, height))), min(stack[0].spacing or ())


def _tolerated_shift(pixel: float) -> float:
    return max(SLICE_TOLERANCE_MM, CORNER_VOXELS * pixel)


def check_stack(slices: Sequence[SliceHeader], path: Path) -> None:
    """Check that slices, in any order, form one stack with equal distances.

    Raises:
        GeometryError: position, orientation or spacing is missing or invalid, or the patient is an animal.
        DuplicateSliceError: several slices have the same position.
        GantryTiltError: the stack is tilted against the slice normal.
        MissingSliceError: one distance is a multiple of the usual slice distance.
        UnevenSlicesError: the distances are unequal, or slices are shifted sideways.
    """
    _check_geometry(slices, path)
    stack, count = sort_slices(slices), len(slices)
    positions = np.array([slice_.position for slice_ in stack])
    normal = normal_of(stack)
    normal /= np.linalg.norm(normal)
    gaps = np.diff(positions @ normal)
    same = int((gaps < SAME_POSITION_MM).sum())
    if same:
        raise DuplicateSliceError(
            f"The series in {path} has {count} slices at only {count - same} positions. It contains copies, or several "
            "phases of a dynamic scan.",
            remedy="Delete the copies, or export each phase as a separate series.",
        )
    _check_tilt(stack, path)
    across = positions[-1] - positions[0]
    distance = float(np.median(gaps))
    tolerance = min(SLICE_TOLERANCE_SHARE * distance, SLICE_TOLERANCE_MM)
    wide = int(np.argmax(gaps))
    missing = round(gaps[wide] / distance) - 1
    if missing and abs(gaps[wide] - (missing + 1) * distance) <= 2 * tolerance:
        raise MissingSliceError(
            f"Slices are missing in the series in {path}: the distance between slices {wide + 1} and {wide + 2} of "
            f"{count} is {gaps[wide]:g} mm instead of {distance:g} mm.",
            remedy="Export the complete series again from the PACS.",
        )
    line = positions[0] + np.outer(np.arange(count), across / (count - 1))
    off = np.linalg.norm(positions - line, axis=1)
    if off.max() > tolerance:
        raise UnevenSlicesError(
            f"The slices of the series in {path} are not evenly spaced: slice {int(off.argmax()) + 1} of {count} "
            f"deviates {off.max():.3g} mm from its position, and the distances range from {gaps.min():g} to "
            f"{gaps.max():g} mm.",
            remedy="Give a series with equal slice distances, or export each evenly spaced part as a separate series.",
        )


def _check_tilt(stack: Sequence[SliceHeader], path: Path) -> None:
    sideways, degrees, pixel = _tilt(stack)
    if sideways <= _tolerated_shift(pixel) or degrees <= TILT_DEGREES:
        return
    stated = any(abs(slice_.tilt or 0.0) > TILT_DEGREES for slice_ in stack)
    if stated or degrees > DRIFT_DEGREES or sideways / (len(stack) - 1) > DRIFT_VOXELS * pixel:
        raise GantryTiltError(
            f"The series in {path} was acquired with a gantry tilt of {degrees:.1f} degrees: each slice is shifted "
            "relative to the next.",
            remedy="Export a reformatted series without tilt from the PACS.",
        )


def _check_geometry(slices: Sequence[SliceHeader], path: Path) -> None:
    remedy = "Export the original series again from the PACS."
    attributes = {
        "ImagePositionPatient": [slice_.position for slice_ in slices],
        "ImageOrientationPatient": [slice_.orientation for slice_ in slices],
        "PixelSpacing": [slice_.spacing for slice_ in slices],
    }
    if found := fault_counts(slices, tuple(attributes)):
        raise GeometryError(f"The series in {path} has a wrong header: {found}.", remedy=remedy)
    missing = [element_name(name) for name, values in attributes.items() if None in values]
    if missing:
        raise GeometryError(
            f"At least one slice of the series in {path} has no valid {' or '.join(missing)}.", remedy=remedy
        )
    if any(slice_.quadruped for slice_ in slices):
        raise GeometryError(
            f"The series in {path} is a CT of a four-footed animal, which has other anatomical directions.",
            remedy="Give a CT of a person.",
        )
    for row, column in {slice_.orientation: np.reshape(slice_.orientation or (), (2, 3)) for slice_ in slices}.values():
        errors = [float(abs(error)) for error in (np.linalg.norm(row) - 1, np.linalg.norm(column) - 1, row @ column)]
        if not max(errors) <= _COSINE_TOLERANCE:
            raise GeometryError(
                f"The {element_name('ImageOrientationPatient')} of the series in {path} is invalid: its axes must be "
                "perpendicular and have the length 1.",
                remedy=remedy,
            )
    _check_same_plane(slices, path)


def _check_same_plane(slices: Sequence[SliceHeader], path: Path) -> None:
    steps = _steps(slices)
    size = np.array([slices[0].columns - 1, slices[0].rows - 1])
    edges = (steps - steps.mean(axis=0)) * size[:, None]
    off = float(np.linalg.norm([*edges[:, 0], *edges[:, 1], *edges.sum(axis=1)], axis=1).max())
    limit = CORNER_VOXELS * min(slices[0].spacing or ())
    if off > limit:
        raise GeometryError(
            f"The slices of the series in {path} are not parallel: because of different values of "
            f"{element_name('ImageOrientationPatient')} or {element_name('PixelSpacing')}, a corner of a slice is "
            f"{off:.3g} mm from its place, but the limit is a tenth of a pixel, {limit:.3g} mm.",
            remedy="Export a reformatted series of parallel slices from the PACS.",
        )
