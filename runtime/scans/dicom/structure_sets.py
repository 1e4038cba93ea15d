"""RT Structure Sets (PS3.3 section A.19): their regions of interest (ROIs) as contours.

Contours are closed polygons in a plane (PS3.3 section C.8.8.6). Their coordinates are read from the bytes of the file
as float64, also if a number has more than the 16 characters that a decimal string may have.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fseft_edge.runtime.errors import GeometryError, InputError
from fseft_edge.runtime.scans.contours import Contour, extent_of, share_of
from fseft_edge.runtime.scans.dicom.annotation_objects import (
    AnnotationObject,
    Texts,
    damaged,
    items_of,
    read_data_set,
    uids,
)
from fseft_edge.runtime.scans.dicom.elements import element_name
from fseft_edge.runtime.scans.dicom.files import DicomFile, DicomSource
from fseft_edge.runtime.scans.structures import BoxedShare, Lattice, StructureSummary

_CLOSED = {"CLOSED_PLANAR": False, "CLOSEDPLANAR_XOR": True}
"""Geometric types of closed contours, and whether those of a plane are combined by exclusive or (C.8.8.6.3)."""
_TYPE = re.compile(r"[A-Z_]{1,16}")
_APPROVALS = frozenset({"APPROVED", "UNAPPROVED", "REJECTED"})
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
_LARGEST_MM = 1e6
_TOOLKIT = "fseft-edge"
"""ManufacturerModelName of the structure sets that this toolkit writes."""
_REDRAW = "Export the structure set again, or leave this ROI out."


def read_structure_set(file: DicomFile, source: DicomSource, *, interpolate: bool = True) -> AnnotationObject:
    """Read an RT Structure Set.

    Args:
        file: place of the file.
        source: the file, folder or archive that the user gave, opened.
        interpolate: whether a ROI with contours on every second (third, ...) slice is filled between them.

    Raises:
        UnreadableFileError: the file is truncated, damaged or too large, or contains no ROI.
        InputError: two ROIs have the same number.
        ArchiveError: the archive is damaged.
    """
    dataset = read_data_set(file, source)
    texts = Texts(dataset)
    # The contours of a mask are complete: a slice without them is a gap in the mask.
    interpolate = interpolate and texts(dataset, "ManufacturerModelName") != _TOOLKIT
    regions = items_of(dataset, "StructureSetROISequence")
    if not regions:
        raise damaged(source.path, f"it has no item in {element_name('StructureSetROISequence')}")
    numbers = [_whole(texts(region, "ROINumber")) for region in regions]
    if None in numbers or len(set(numbers)) < len(numbers):
        raise InputError(
            f"A structure set in {source.path} has ROIs without a number, or with the same number, so that it is not "
            "known which contours belong to which of them.",
            remedy="Export the structure set again from the planning system.",
        )
    contours: dict[int | None, list[_RawContour]] = {number: [] for number in numbers}
    stray = 0
    for item in items_of(dataset, "ROIContourSequence"):
        number = _whole(texts(item, "ReferencedROINumber"))
        found = [_RawContour.of(contour, texts) for contour in items_of(item, "ContourSequence")]
        if number in contours:
            contours[number] += found
        else:
            stray += len(found)
    frames = items_of(dataset, "ReferencedFrameOfReferenceSequence")
    own = texts(dataset, "FrameOfReferenceUID")
    named = uids(frames, "FrameOfReferenceUID", texts)
    structures = [
        RegionOfInterest(
            name=texts(region, "ROIName"),
            number=number or 0,
            frame_of_reference=texts(region, "ReferencedFrameOfReferenceUID") or own or (named[0] if named else ""),
            interpolate=interpolate,
            contours=tuple(contours[number]),
        )
        for number, region in zip(numbers, regions, strict=True)
    ]
    images, series = _references(frames, texts)
    images.update(image for region in structures for contour in region.contours for image in contour.images)
    approval = texts(dataset, "ApprovalStatus").upper()
    every_frame = [*(region.frame_of_reference for region in structures), *named, own]
    return AnnotationObject(
        kind="rtstruct",
        file=file,
        sop_instance_uid=texts(dataset, "SOPInstanceUID"),
        series_uid=texts(dataset, "SeriesInstanceUID"),
        study_uid=texts(dataset, "StudyInstanceUID"),
        frames_of_reference=tuple(frame for frame in dict.fromkeys(every_frame) if frame),
        images=frozenset(images),
        series=frozenset(series),
        label=texts(dataset, "StructureSetLabel"),
        date=texts(dataset, "StructureSetDate"),
        time=texts(dataset, "StructureSetTime"),
        approval=approval if approval in _APPROVALS else "",
        structures=structures,
        warnings=tuple(_said_of_whole(stray, images)),
    )


def _said_of_whole(stray: int, images: set[str]) -> Iterator[str]:
    if stray:
        yield f"{stray} contour{'s' * (stray > 1)} without a ROI were left out."
    if not images:
        yield "The structure set names no images: its CT can be found by the frame of reference alone."


def _references(frames: Sequence[Dataset], texts: Texts) -> tuple[set[str], set[str]]:
    """Return the SOP Instance UIDs and Series Instance UIDs in ReferencedFrameOfReferenceSequence."""
    studies = [study for frame in frames for study in items_of(frame, "RTReferencedStudySequence")]
    series = [item for study in studies for item in items_of(study, "RTReferencedSeriesSequence")]
    images = [image for item in series for image in items_of(item, "ContourImageSequence")]
    return set(uids(images, "ReferencedSOPInstanceUID", texts)), set(uids(series, "SeriesInstanceUID", texts))


@dataclass(frozen=True, eq=False)
class _RawContour:
    """One contour as stored.

    Attributes:
        form: ContourGeometricType in capitals; empty if missing.
        data: bytes of ContourData.
        count: NumberOfContourPoints; None if missing or no number.
        shifted: whether ContourOffsetVector moves the contour.
        images: SOP Instance UIDs of its images.
    """

    form: str
    data: bytes
    count: int | None
    shifted: bool
    images: tuple[str, ...]

    @classmethod
    def of(cls, item: Dataset, texts: Texts) -> _RawContour:
        """Return an item of ContourSequence."""
        raw = getattr(item.get_item("ContourData"), "value", None)
        offset = texts(item, "ContourOffsetVector")
        return cls(
            form=texts(item, "ContourGeometricType").upper(),
            data=raw.strip(b" \0") if isinstance(raw, bytes) else b"",
            count=_whole(texts(item, "NumberOfContourPoints")),
            shifted=bool(offset.strip("0.\\ +-")),
            images=tuple(uids(items_of(item, "ContourImageSequence"), "ReferencedSOPInstanceUID", texts)),
        )

    @property
    def is_closed(self) -> bool:
        """Whether the contour encloses a region and has points."""
        return self.form in _CLOSED and bool(self.data)

    @property
    def points_in_data(self) -> float:
        """Number of points in ContourData."""
        return (self.data.count(b"\\") + 1) / 3

    def points(self) -> NDArray[np.float64] | None:
        """Return vertices, float64 ``[n, 3]``, RAS+ mm; None if the coordinates are not valid."""
        try:
            numbers = np.array(self.data.replace(b",", b".").split(b"\\")).astype(np.float64)
        except ValueError:
            return None
        if len(numbers) % 3 or not np.isfinite(numbers).all() or np.abs(numbers).max() > _LARGEST_MM:
            return None
        points: NDArray[np.float64] = numbers.reshape(-1, 3) * _LPS_TO_RAS
        return points


@dataclass(frozen=True, eq=False)
class RegionOfInterest:
    """One ROI of an RT Structure Set.

    Attributes:
        name: ROIName. It may contain a patient's name.
        number: ROINumber.
        frame_of_reference: UID of its frame of reference; empty if the file names none.
        interpolate: whether slices between contours on every second (third, ...) slice are filled.
        contours: its contours as stored.
    """

    name: str = field(repr=False)
    number: int
    frame_of_reference: str
    interpolate: bool
    contours: tuple[_RawContour, ...] = field(repr=False)

    @property
    def is_empty(self) -> bool:
        """Whether the ROI has no closed contour, so that it counts as not annotated."""
        return not any(contour.is_closed for contour in self.contours)

    def summary(self) -> StructureSummary:
        """Return number of contours and planes, volume and warnings, as far as the file tells without the CT.

        Raises:
            GeometryError: coordinates are not valid.
        """
        extent = extent_of(self._closed(), self._title)
        forms = tuple(dict.fromkeys(_shown(contour.form) for contour in self.contours))
        warnings = (*self._warnings(), *extent.warnings)
        return StructureSummary(len(self.contours), extent.planes, extent.volume_ml, forms, warnings)

    def share(self, lattice: Lattice) -> tuple[BoxedShare, tuple[str, ...]]:
        """Return the share of each voxel of a CT that the ROI fills, and warnings (:func:`share_of`).

        Raises:
            GeometryError: coordinates are not valid; or the contours are not on the slices, lie outside the scan, or
                leave out single slices.
        """
        share, warnings = share_of(self._closed(), lattice, self._title, interpolate=self.interpolate)
        return share, (*self._warnings(), *warnings)

    @property
    def _title(self) -> str:
        return f"ROI {self.number}"

    def _closed(self) -> list[Contour]:
        found = []
        for number, contour in enumerate(self.contours, start=1):
            if contour.is_closed:
                points = contour.points()
                if points is None or contour.shifted:
                    what = (
                        "is moved by ContourOffsetVector, which is not supported"
                        if contour.shifted
                        else ("has coordinates that are no finite numbers, three for each point")
                    )
                    raise GeometryError(
                        f"Contour {number} of {len(self.contours)} of {self._title} {what}.", remedy=_REDRAW
                    )
                found.append(Contour(points, _CLOSED[contour.form]))
        return found

    def _warnings(self) -> tuple[str, ...]:
        said = []
        left_out = Counter(_shown(contour.form) for contour in self.contours if contour.form not in _CLOSED)
        for form, count in sorted(left_out.items()):
            said.append(f"{count} contour{'s' * (count > 1)} of the type {form} were left out")
        closed = [contour for contour in self.contours if contour.is_closed]
        if empty := sum(contour.form in _CLOSED for contour in self.contours) - len(closed):
            said.append(f"{empty} contour{'s' * (empty > 1)} without points were left out")
        if commas := sum(b"," in contour.data for contour in closed):
            said.append(f"decimal commas in {commas} contour{'s' * (commas > 1)} were read as decimal points")
        if wrong := sum(contour.count not in (None, contour.points_in_data) for contour in closed):
            said.append(f"{wrong} contour{'s' * (wrong > 1)} have another number of points than NumberOfContourPoints")
        if self.is_empty:
            said.append("it has no closed contour and counts as not annotated")
        return tuple(f"{self._title}: {text}." for text in said)


def _shown(form: str) -> str:
    """Return a geometric type for a message."""
    return form if _TYPE.fullmatch(form) else "(unknown)"


def _whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
