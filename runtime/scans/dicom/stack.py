"""Slices as one even stack: their order, what is wrong with it, and the affine (PS3.3 C.7.6.2.1.1)."""

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

SAME_PLACE_MM = 0.01
"""Slices closer than this lie at the same place; no CT is reconstructed so finely."""

EVEN_SHARE, EVEN_MM = 0.1, 0.1
"""A slice may be off its place by this share of the distance between slices, and by this many mm at most.

Positions are decimal strings, which scanners round to between one and six decimals. Rounding to one decimal moves the
first slice, the last and the one between by 0.05 mm each, which is 0.1 mm against the line through the ends.
"""

TILT_DEGREES = 0.1
"""A stack leans when the line through it and the normal of its slices differ by more than this, and by ``EVEN_MM``."""

_UNIT = 1e-3
"""Largest error of length and angle of direction cosines: what rounding to three decimals does."""

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def normal_of(slice_: SliceHeader) -> NDArray[np.float64]:
    """Return the direction in which a slice faces, LPS+: row x column; it need not be of length one."""
    return np.cross((slice_.orientation or ())[:3], (slice_.orientation or ())[3:])


def ordered(slices: Sequence[SliceHeader]) -> tuple[SliceHeader, ...]:
    """Return the slices by their place along the normal, and by file and frame where they have no place."""
    given = sorted(slices, key=lambda slice_: (slice_.file.path, slice_.file.member or "", slice_.frame))
    if any(slice_.position is None or slice_.orientation is None for slice_ in slices):
        return tuple(given)
    normal = normal_of(slices[0])
    return tuple(sorted(given, key=lambda slice_: float(np.dot(normal, slice_.position or ()))))


def affine_of(slices: Sequence[SliceHeader]) -> NDArray[np.float64]:
    """Return the affine of ordered slices that :func:`check_stack` has passed: voxel index to RAS+ mm, 4x4.

    The step between slices is that from the first to the last, so that both lie exactly where their headers say.
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
    """Make sure that slices are one even stack, whatever their order.

    Raises:
        GeometryError: place, orientation or spacing is missing or impossible, or not in the patient's coordinates.
        DuplicateSliceError: several slices at one place.
        GantryTiltError: the stack leans.
        MissingSliceError: a gap of a whole number of slices.
        UnevenSlicesError: other uneven distances.
    """
    _check_geometry(slices, path)
    stack, count = ordered(slices), len(slices)
    positions = np.array([slice_.position for slice_ in stack])
    normal = normal_of(stack[0])
    normal /= np.linalg.norm(normal)
    gaps = np.diff(positions @ normal)
    same = int((gaps < SAME_PLACE_MM).sum())
    if same:
        raise DuplicateSliceError(
            f"The series in {path} has {count} slices at {count - same} places: copies, or phases of a dynamic scan.",
            remedy="Remove the copies, or export each phase as a series of its own.",
        )
    across = positions[-1] - positions[0]
    height = float(across @ normal)
    sideways = float(np.linalg.norm(across - height * normal))
    if sideways > max(EVEN_MM, height * np.tan(np.radians(TILT_DEGREES))):
        raise GantryTiltError(
            f"The series in {path} was made with a tilted gantry: its slices are shifted against one another, by "
            f"{np.degrees(np.arctan2(sideways, height)):.1f} degrees.",
            remedy="Export it from the PACS reformatted to upright slices.",
        )
    distance = float(np.median(gaps))
    tolerance = min(EVEN_SHARE * distance, EVEN_MM)
    wide = int(np.argmax(gaps))
    missing = round(gaps[wide] / distance) - 1
    if missing and abs(gaps[wide] - (missing + 1) * distance) <= 2 * tolerance:
        raise MissingSliceError(
            f"The series in {path} lacks slices: between slice {wide + 1} and slice {wide + 2} of {count} there are "
            f"{gaps[wide]:g} mm instead of {distance:g} mm.",
            remedy="Export the whole series again from the PACS.",
        )
    line = positions[0] + np.outer(np.arange(count), across / (count - 1))
    off = np.linalg.norm(positions - line, axis=1)
    if off.max() > tolerance:
        raise UnevenSlicesError(
            f"The series in {path} is uneven: slice {int(off.argmax()) + 1} of {count} is {off.max():.3g} mm off its "
            f"place, and distances reach from {gaps.min():g} to {gaps.max():g} mm.",
            remedy="Give a series of evenly spaced slices, or export its evenly spaced parts as series of their own.",
        )


def _check_geometry(slices: Sequence[SliceHeader], path: Path) -> None:
    remedy = "Export the original series again from the PACS."
    if any(slice_.position is None or slice_.orientation is None or slice_.spacing is None for slice_ in slices):
        raise GeometryError(
            f"The series in {path} does not say where its slices lie in the patient: position, orientation or pixel "
            "spacing is missing.",
            remedy=remedy,
        )
    if any(slice_.quadruped for slice_ in slices):
        raise GeometryError(
            f"The series in {path} is of an animal on four feet, whose directions are others.",
            remedy="Only CTs of people are read.",
        )
    first = slices[0]
    row, column = np.array((first.orientation or ())[:3]), np.array((first.orientation or ())[3:])
    errors = [float(abs(error)) for error in (np.linalg.norm(row) - 1, np.linalg.norm(column) - 1, row @ column)]
    if not max(errors) <= _UNIT:
        raise GeometryError(
            f"The series in {path} has an orientation whose axes are not of length one and perpendicular.",
            remedy=remedy,
        )
