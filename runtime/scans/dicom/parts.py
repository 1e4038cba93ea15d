"""Images that share the SeriesInstanceUID of the selected series but are not in its stack of slices.

A scanner or an archive may give one SeriesInstanceUID to slices of several geometries. The rest of such a series is
either part of the scan, so that the scan is incomplete without it, or another picture, such as a localiser.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fseft_edge.runtime.scans.dicom.elements import element_name
from fseft_edge.runtime.scans.dicom.kinds import is_ct, is_localiser
from fseft_edge.runtime.scans.dicom.series import DicomSeries
from fseft_edge.runtime.scans.dicom.stack import normal_of, same_plane

_OTHER_PLANE_DEGREES = 10.0
"""Slices in a plane that differs by more than this angle do not continue a stack."""

_NEXT_SLICE = 1.5
"""A single slice continues a stack if it is at most this many slice distances beyond its end."""

_INTERLEAVED = 0.5
"""Slices are between the slices of a stack if more than this part of them is off by a quarter of the distance."""

_SAME_PLACE = 0.1
"""Slices of another series continue a stack if the nearest is off its place by at most this part of the distance."""

_LEAST_NORMAL = 0.5
"""Shorter cross products of row and column direction mean an invalid ImageOrientationPatient."""


def related(chosen: DicomSeries, series: Sequence[DicomSeries]) -> list[DicomSeries]:
    """Return the other series with the SeriesInstanceUID of a series; a missing UID in the same study may be equal."""
    return [
        other
        for other in series
        if other is not chosen
        and (
            (chosen.uid and other.uid == chosen.uid)
            or (not (chosen.uid and other.uid) and other.study_uid == chosen.study_uid and is_ct(other.slices[0]))
        )
    ]


def may_be_missing(chosen: DicomSeries, other: DicomSeries) -> bool:
    """Return True if a related series may be a part of the scan of which ``chosen`` is another part.

    It is no part if it is of another kind, has one sheet without position and orientation, lies in another plane, or
    shows only the places of the chosen slices.
    """
    first = other.slices[0]
    if not is_ct(first) or is_localiser(first) or chosen.problem is not None:
        return False
    if not first.placed:
        return len(other.slices) > 1 and "SECONDARY" not in first.image_type
    frames = {one for one in (first.frame_of_reference_uid, chosen.frame_of_reference_uid) if one}
    if len(frames) > 1 or any(slice_.position is None or slice_.orientation is None for slice_ in other.slices):
        return True
    return _continues(chosen, other)


def _continues(chosen: DicomSeries, other: DicomSeries) -> bool:
    """Return True if slices lie beyond the end of the chosen stack or between its slices, about parallel to it."""
    normal, other_normal = normal_of(chosen.slices), normal_of(other.slices[:1])
    length = float(np.linalg.norm(other_normal))
    if not length > _LEAST_NORMAL:
        return True
    if abs(normal @ other_normal) / length < np.cos(np.radians(_OTHER_PLANE_DEGREES)):
        return False
    heights, others = (np.array([slice_.position for slice_ in one.slices]) @ normal for one in (chosen, other))
    distance = float(np.median(np.diff(heights)))
    beyond = max(heights.min() - others.min(), others.max() - heights.max())
    if len(others) == 1:
        return bool(distance / 2 < beyond <= _NEXT_SLICE * distance)
    off = np.abs(others[:, None] - heights).min(axis=1)
    return bool(beyond > distance / 2 or (off > distance / 4).mean() > _INTERLEAVED)


def follows(chosen: DicomSeries, other: DicomSeries) -> bool:
    """Return True if the slices of another series continue a stack exactly, so that they may belong to the scan.

    The modality does not matter: damaged headers change it, and hardly any picture of another one continues the stack.
    """
    first, last = chosen.slices[0], chosen.slices[-1]
    near, place = other.slices[0], other.slices[0].position
    if other is chosen or is_localiser(near) or place is None or near.orientation is None:
        return False
    if (near.rows, near.columns) != (first.rows, first.columns) or not same_plane(near, first):
        return False
    if (near.study_uid, near.frame_of_reference_uid) != (first.study_uid, first.frame_of_reference_uid):
        return False
    step = np.subtract(last.position or (), first.position or ()) / (len(chosen.slices) - 1)
    ends = (
        (other.slices[0].position, np.add(last.position or (), step)),
        (other.slices[-1].position, np.subtract(first.position or (), step)),
    )
    return any(
        at is not None and float(np.linalg.norm(np.subtract(at, expected))) <= _SAME_PLACE * np.linalg.norm(step)
        for at, expected in ends
    )


def continued(other: DicomSeries) -> str:
    """Return the sentence of the warning that another series continues the scan."""
    count = len(other.slices)
    return (
        f"{count} image{'s' * (count > 1)} with another SeriesInstanceUID (0020,000E) {'were' if count > 1 else 'was'} "
        "left out, but would continue the stack of slices."
    )


def differences(chosen: DicomSeries, other: DicomSeries) -> str:
    """Return the elements in which two series with one SeriesInstanceUID differ, with the faults of the other one."""
    a, b = chosen.slices[0], other.slices[0]
    pairs = {
        "SeriesInstanceUID": (a.series_uid, b.series_uid),
        "SOPClassUID": (a.sop_class, b.sop_class),
        "Modality": (a.modality, b.modality),
        "ImageType": (is_localiser(a), is_localiser(b)),
        "Rows": (a.rows, b.rows),
        "Columns": (a.columns, b.columns),
        "PixelSpacing": (a.spacing, b.spacing),
        "ImageOrientationPatient": (a.orientation, b.orientation),
        "FrameOfReferenceUID": (a.frame_of_reference_uid, b.frame_of_reference_uid),
    }
    return " and ".join(element_name(keyword) for keyword, (one, two) in pairs.items() if one != two)


def left_out(chosen: DicomSeries, other: DicomSeries) -> str:
    """Return the sentence of the warning that a related series was left out."""
    count, first = len(other.slices), other.slices[0]
    subject = f"{count} image{'s' * (count > 1)} with the SeriesInstanceUID (0020,000E) of the scan"
    they, differ = ("they", "differ in") if count > 1 else ("it", "differs in")
    differ = f"{differ} {differences(chosen, other)}"
    if is_localiser(first):
        reason = "a localiser is no part of the scan"
    elif not is_ct(first):
        reason = "other kinds of image are no part of the scan"
    elif not first.placed:
        reason = f"{they} {'state' if count > 1 else 'states'} no position and no orientation"
    elif may_be_missing(chosen, other):
        reason = f"{they} {differ}, and may belong to the scan"
    else:
        reason = f"{they} {differ}, and {'do' if count > 1 else 'does'} not continue the stack of slices"
    return f"{subject} {'were' if count > 1 else 'was'} left out: {reason}."
