"""Stack of slices: order, affine, and check of equal distances (PS3.3 C.7.6.2.1.1)."""

from __future__ import annotations

from collections.abc import Sequence
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
from fseft_edge.runtime.scans.dicom.headers import SliceHeader

SAME_POSITION_MM = 0.01
"""Slices closer than this distance are at the same position, because no CT has such a small slice distance."""

SLICE_TOLERANCE_SHARE, SLICE_TOLERANCE_MM = 0.1, 0.1
"""Largest accepted deviation of a slice from its position: this share of the slice distance, and at most this many mm.

Positions are decimal strings, which scanners round to one to six decimals. Rounding to one decimal moves the first, the
last and any other slice by up to 0.05 mm each. The deviation from the line between first and last slice is then up to
0.1 mm.
"""

TILT_DEGREES = 0.1
"""Largest accepted angle between the direction of a stack and the slice normal.

A stack is tilted only if two limits are exceeded: the angle is larger than ``TILT_DEGREES``, and the sideways shift of
the last slice relative to the first slice is larger than ``SLICE_TOLERANCE_MM``.
"""

_COSINE_TOLERANCE = 1e-3
"""Largest error of length and angle of direction cosines. It allows for rounding to three decimals."""

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def normal_of(slice_: SliceHeader) -> NDArray[np.float64]:
    """Return the normal of a slice, LPS+: the cross product of row and column direction, not scaled to length one."""
    return np.cross((slice_.orientation or ())[:3], (slice_.orientation or ())[3:])


def sort_slices(slices: Sequence[SliceHeader]) -> tuple[SliceHeader, ...]:
    """Return the slices sorted along the normal, or by file and frame if a position or orientation is missing."""
    given = sorted(slices, key=lambda slice_: (slice_.file.path, slice_.file.member or "", slice_.frame))
    if any(slice_.position is None or slice_.orientation is None for slice_ in slices):
        return tuple(given)
    normal = normal_of(slices[0])
    return tuple(sorted(given, key=lambda slice_: float(np.dot(normal, slice_.position or ()))))


def affine_of(slices: Sequence[SliceHeader]) -> NDArray[np.float64]:
    """Return the affine of sorted slices, float64 4x4, voxel index to RAS+ mm. :func:`check_stack` must have succeeded.

    The slice step is the vector from the first to the last slice divided by the number of steps, so that both slices
    have exactly the positions in their headers.
    """
    first = slices[0]
    row_spacing, column_spacing = first.spacing or ()
    along_row, along_column = np.array((first.orientation or ())[:3]), np.array((first.orientation or ())[3:])
    start, stop = (np.array(slice_.position) for slice_ in (first, slices[-1]))
    affine = np.eye(4)
    affine[:3, 0] = _LPS_TO_RAS @ (along_row * column_spacing)
    affine[:3, 1] = _LPS_TO_RAS @ (along_column * row_spacing)
    affine[:3, 2] = _LPS_TO_RAS @ ((stop - start) / (len(slices) - 1))
    affine[:3, 3] = _LPS_TO_RAS @ start
    return affine + 0.0  # no negative zeros


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
    normal = normal_of(stack[0])
    normal /= np.linalg.norm(normal)
    gaps = np.diff(positions @ normal)
    same = int((gaps < SAME_POSITION_MM).sum())
    if same:
        raise DuplicateSliceError(
            f"The series in {path} has {count} slices at only {count - same} positions. It contains copies, or several "
            "phases of a dynamic scan.",
            remedy="Delete the copies, or export each phase as a separate series.",
        )
    across = positions[-1] - positions[0]
    height = float(across @ normal)
    sideways = float(np.linalg.norm(across - height * normal))
    if sideways > max(SLICE_TOLERANCE_MM, height * np.tan(np.radians(TILT_DEGREES))):
        raise GantryTiltError(
            f"The series in {path} was acquired with a gantry tilt of "
            f"{np.degrees(np.arctan2(sideways, height)):.1f} degrees: each slice is shifted relative to the next.",
            remedy="Export a reformatted series without tilt from the PACS.",
        )
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


def _check_geometry(slices: Sequence[SliceHeader], path: Path) -> None:
    remedy = "Export the original series again from the PACS."
    attributes = {
        "ImagePositionPatient": [slice_.position for slice_ in slices],
        "ImageOrientationPatient": [slice_.orientation for slice_ in slices],
        "PixelSpacing": [slice_.spacing for slice_ in slices],
    }
    missing = [name for name, values in attributes.items() if None in values]
    if missing:
        raise GeometryError(
            f"At least one slice of the series in {path} has no valid {' or '.join(missing)}.", remedy=remedy
        )
    if any(slice_.quadruped for slice_ in slices):
        raise GeometryError(
            f"The series in {path} is a CT of a four-footed animal, which has other anatomical directions.",
            remedy="Give a CT of a person.",
        )
    first = slices[0]
    row, column = np.array((first.orientation or ())[:3]), np.array((first.orientation or ())[3:])
    errors = [float(abs(error)) for error in (np.linalg.norm(row) - 1, np.linalg.norm(column) - 1, row @ column)]
    if not max(errors) <= _COSINE_TOLERANCE:
        raise GeometryError(
            f"The ImageOrientationPatient of the series in {path} is invalid: its axes must be perpendicular and "
            "have the length 1.",
            remedy=remedy,
        )
