"""DICOM Segmentations (PS3.3 section A.51): their segments as shares of voxels.

highdicom decodes the frames. A frame is placed by its position and orientation, never by its order in the file, because
frames without voxels may be omitted and segments may be mixed (PS3.3 section C.8.20).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fseft_edge.runtime.errors import GeometryError, InputError
from fseft_edge.runtime.scans.dicom.annotation_objects import (
    AnnotationObject,
    Texts,
    damaged,
    items_of,
    read_data_set,
    uids,
    whole_number,
)
from fseft_edge.runtime.scans.dicom.files import DicomFile, DicomSource
from fseft_edge.runtime.scans.lattice import LATTICE_TOLERANCE
from fseft_edge.runtime.scans.resampled_shares import resampled
from fseft_edge.runtime.scans.structures import BoxedShare, Lattice, StructureSummary

if TYPE_CHECKING:
    from highdicom import Image

_TYPES = ("BINARY", "FRACTIONAL", "LABELMAP")
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
_SAME_PLANE_MM = 0.01
_OFF_MM = 0.1
NEGLIGIBLE_OUTSIDE = 1e-4
_OTHER_CT = "Give the CT on which the segmentation was made."
_EXPORT = "Export the segmentation again as frames in planes of the scan, or as an RT Structure Set."


def read_segmentation(file: DicomFile, source: DicomSource) -> AnnotationObject:
    """Read a DICOM Segmentation of type BINARY, FRACTIONAL or LABELMAP.

    Args:
        file: place of the file.
        source: the file, folder or archive that the user gave, opened.

    Raises:
        UnreadableFileError: the file is truncated, damaged or too large, or contains no segment.
        GeometryError: the segmentation is of a slide, tiled, or has frames without a place.
        InputError: the type of the segmentation is unknown, or two segments have the same number.
        ArchiveError: the archive is damaged.
    """
    dataset = read_data_set(file, source)
    texts = Texts(dataset)
    form = texts(dataset, "SegmentationType").upper()
    if form not in _TYPES:
        raise InputError(
            f"A segmentation in {source.path} is of an unknown type.",
            remedy=f"Export it again as one of the types {', '.join(_TYPES)}.",
        )
    described = items_of(dataset, "SegmentSequence")
    numbers = [whole_number(item, "SegmentNumber") or 0 for item in described]
    names = [texts(item, "SegmentLabel") for item in described]
    segments = [(number, name) for number, name in zip(numbers, names, strict=True) if number > 0]
    if not segments:
        raise damaged(source.path, "it describes no segment")
    if len(set(numbers)) < len(numbers):
        raise InputError(
            f"A segmentation in {source.path} has several segments with the same number.",
            remedy="Export the segmentation again.",
        )
    places = tuple(_frames(dataset, texts, source))
    images, series = _references(dataset, texts)
    frame_of_reference = texts(dataset, "FrameOfReferenceUID")
    frames = _Frames(places, _image(dataset, source), form, whole_number(dataset, "MaximumFractionalValue") or 255)
    said = []
    if form == "FRACTIONAL" and texts(dataset, "SegmentationFractionalType").upper() == "PROBABILITY":
        said.append("The segmentation contains probabilities, which are read as shares of voxels.")
    if not images:
        said.append("The segmentation names no images: its CT can be found by the frame of reference alone.")
    return AnnotationObject(
        kind="seg",
        file=file,
        sop_instance_uid=texts(dataset, "SOPInstanceUID"),
        series_uid=texts(dataset, "SeriesInstanceUID"),
        study_uid=texts(dataset, "StudyInstanceUID"),
        frames_of_reference=(frame_of_reference,) if frame_of_reference else (),
        images=frozenset(images),
        series=frozenset(series),
        label=texts(dataset, "ContentLabel"),
        date=texts(dataset, "ContentDate"),
        time=texts(dataset, "ContentTime"),
        approval="",
        structures=[
            Segment(name=name, number=number, frame_of_reference=frame_of_reference, frames=frames)
            for number, name in segments
        ],
        warnings=tuple(said),
    )


@dataclass(frozen=True, eq=False)
class _Frame:
    """Place of one frame.

    Attributes:
        index: its index in the file, from 0.
        segment: number of its segment; 0 in a label map.
        position: centre of the first pixel, float64 ``[3]``, RAS+ mm.
        steps: step from one column to the next, and from one row to the next, float64 ``[2, 3]``, RAS+ mm.
        spacing: SpacingBetweenSlices in mm; 0 if missing.
        thickness: SliceThickness in mm; 0 if missing.
    """

    index: int
    segment: int
    position: NDArray[np.float64]
    steps: NDArray[np.float64]
    spacing: float
    thickness: float

    @property
    def height(self) -> float:
        """Position along the normal of the frame in mm."""
        normal = np.cross(self.steps[0], self.steps[1])
        return float(self.position @ normal / np.linalg.norm(normal))


def _frames(dataset: Dataset, texts: Texts, source: DicomSource) -> Iterator[_Frame]:
    """Yield the place of each frame (functional groups, PS3.3 section C.7.6.16)."""
    tiled = texts(dataset, "DimensionOrganizationType") == "TILED_FULL" or "TotalPixelMatrixColumns" in dataset
    shared = (items_of(dataset, "SharedFunctionalGroupsSequence") or [Dataset()])[0]
    own = items_of(dataset, "PerFrameFunctionalGroupsSequence")
    if tiled or not own:
        raise GeometryError(
            f"A segmentation in {source.path} is tiled, as for slides, or does not say where its frames lie.",
            remedy=_EXPORT,
        )
    if len(own) != whole_number(dataset, "NumberOfFrames"):
        raise damaged(source.path, "the number of frames differs from the number of their places")
    for index, item in enumerate(own):
        position, orientation, measures, segment = (
            (items_of(item, keyword) or items_of(shared, keyword) or [Dataset()])[0]
            for keyword in (
                "PlanePositionSequence",
                "PlaneOrientationSequence",
                "PixelMeasuresSequence",
                "SegmentIdentificationSequence",
            )
        )
        try:
            at = np.array(position.ImagePositionPatient, float).reshape(3)
            cosines = np.array(orientation.ImageOrientationPatient, float).reshape(2, 3)
            between_rows, between_columns = np.array(measures.PixelSpacing, float).reshape(2)
            spacing, thickness = (
                abs(float(measures.get(word) or 0)) for word in ("SpacingBetweenSlices", "SliceThickness")
            )
            number = int(segment.get("ReferencedSegmentNumber") or 0)
        except Exception:  # pydicom raises many kinds of exception for an element that is not valid
            raise GeometryError(
                f"In a segmentation in {source.path}, frame {index + 1} has no valid position, orientation or pixel "
                "spacing.",
                remedy=_EXPORT,
            ) from None
        steps = cosines * np.array([[between_columns], [between_rows]])
        yield _Frame(index, number, at * _LPS_TO_RAS, steps * _LPS_TO_RAS, spacing, thickness)


def _references(dataset: Dataset, texts: Texts) -> tuple[set[str], set[str]]:
    """Return the SOP Instance UIDs and Series Instance UIDs to which a segmentation refers."""
    series = items_of(dataset, "ReferencedSeriesSequence")
    instances = [instance for item in series for instance in items_of(item, "ReferencedInstanceSequence")]
    groups = [
        *items_of(dataset, "SharedFunctionalGroupsSequence"),
        *items_of(dataset, "PerFrameFunctionalGroupsSequence"),
    ]
    derived = [item for group in groups for item in items_of(group, "DerivationImageSequence")]
    sources = [image for item in (*derived, dataset) for image in items_of(item, "SourceImageSequence")]
    images = uids([*instances, *sources], "ReferencedSOPInstanceUID", texts)
    return set(images), set(uids(series, "SeriesInstanceUID", texts))


def _image(dataset: Dataset, source: DicomSource) -> Image:
    """Return the image whose frames highdicom decodes."""
    from highdicom import Image  # noqa: PLC0415 - slow to import

    try:
        bits = int(dataset.get("NumberOfFrames") or 1) * dataset.Rows * dataset.Columns * dataset.BitsAllocated
        if not dataset.file_meta.TransferSyntaxUID.is_compressed and 8 * len(dataset.PixelData) < bits:
            raise EOFError
        return Image.from_dataset(dataset, copy=False)
    except Exception:  # highdicom raises many kinds of exception, whose messages quote header values
        raise damaged(source.path, "it is not a valid segmentation, or its pixel data are cut off") from None


@dataclass(frozen=True, eq=False)
class _Frames:
    """All frames of a segmentation.

    Attributes:
        places: the place of each frame.
        image: the image, whose frames highdicom decodes.
        form: type of the segmentation.
        largest: value of a voxel that is completely filled, for the type FRACTIONAL.
    """

    places: tuple[_Frame, ...]
    image: Image
    form: str
    largest: int

    def slices(self, number: int) -> list[_Slice]:
        """Return the smallest boxes that contain a segment on each slice, along the normal of the frames.

        Raises:
            InputError: the pixels cannot be decoded, or two frames show the segment at the same place.
        """
        found: list[_Slice] = []
        before: _Frame | None = None
        for frame in sorted(self.places, key=lambda frame: frame.height):
            if self.form != "LABELMAP" and frame.segment != number:
                continue
            shares = self._shares(frame, number)
            if not shares.any():
                continue
            if before is not None and np.abs(before.position - frame.position).max() <= _SAME_PLANE_MM:
                raise InputError(
                    f"Two frames of a segmentation show segment {number} at the same place.",
                    remedy="Export the segmentation again, each phase of a scan by itself.",
                )
            found.append(_Slice(frame, shares).smallest())
            before = frame
        return found

    def _shares(self, frame: _Frame, number: int) -> NDArray[np.float32]:
        """Return the share of each pixel of a frame that a segment fills, float32 ``[rows, columns]``."""
        try:
            stored = self.image.get_stored_frame(frame.index, as_index=True)
        except Exception:  # decoders raise many kinds of exception, and their messages may quote the header
            raise InputError(
                f"Frame {frame.index + 1} of a segmentation is damaged, or compressed in a way that is not supported.",
                remedy="Copy the segmentation again from its source, or export it without compression.",
            ) from None
        if self.form == "FRACTIONAL":
            shares: NDArray[np.float32] = np.clip(stored.astype(np.float32) / np.float32(self.largest), 0, 1)
            return shares
        filled: NDArray[np.bool_] = stored == number if self.form == "LABELMAP" else stored > 0
        return filled.astype(np.float32)

    def are_as_far_apart_as(self, distance: float) -> bool:
        """Return whether frames can be slices of a CT with this slice distance in mm, and not thicker or thinner ones.

        SpacingBetweenSlices decides. Without it, the frames of a segmentation on each slice are as far apart as the
        slices; where some are omitted, SliceThickness may be that of the slices. One plane alone says nothing.
        """
        first = self.places[0]
        gaps = np.diff(sorted(frame.height for frame in self.places))
        gaps = gaps[gaps > _SAME_PLANE_MM]
        if first.spacing:
            stated = [first.spacing]
        elif gaps.size:
            stated = [float(gaps.min()), first.thickness]
        else:
            return True
        return any(abs(one - distance) <= LATTICE_TOLERANCE * distance for one in stated)

    @cached_property
    def affine(self) -> NDArray[np.float64]:
        """Affine from column, row and slice of the frames to RAS+ mm, float64 4x4.

        Slices are counted from the lowest frame along the normal. Their distance is SpacingBetweenSlices if the frames
        agree with it, else the smallest distance between two frames; SliceThickness if all frames are on one plane.

        Raises:
            GeometryError: the frames are not parallel, or not at multiples of one distance.
        """
        frames = sorted(self.places, key=lambda frame: frame.height)
        first, last = frames[0], frames[-1]
        apart = max(float(np.abs(frame.steps - first.steps).max()) for frame in frames)
        size = max(self.image.Rows, self.image.Columns)
        heights = np.array([frame.height for frame in frames])
        normal = np.cross(first.steps[0], first.steps[1])
        step = normal / np.linalg.norm(normal) * (first.spacing or first.thickness)
        gaps = np.diff(heights)
        gaps = gaps[gaps > _SAME_PLANE_MM]
        if gaps.size:
            distance = next(
                (stated for stated in (first.spacing, float(gaps.min())) if stated and _are_multiples(gaps, stated)),
                0.0,
            )
            count = max(1, round((heights[-1] - heights[0]) / distance)) if distance else 1
            step = (last.position - first.position) / count
            numbers = np.rint((heights - heights[0]) / distance) if distance else np.zeros(len(frames))
            line = first.position + np.outer(numbers, step)
            off = float(np.abs(np.array([frame.position for frame in frames]) - line).max())
        if not step.any() or apart * size > _OFF_MM or (gaps.size and off > _OFF_MM):
            raise GeometryError(
                "The frames of a segmentation do not form a lattice: they are not parallel, or not at multiples of one "
                "distance.",
                remedy=_OTHER_CT,
            )
        affine = np.eye(4)
        affine[:3, :3] = np.stack([first.steps[0], first.steps[1], step], axis=1)
        affine[:3, 3] = first.position
        return affine


def _are_multiples(gaps: NDArray[np.float64], distance: float) -> bool:
    counts = gaps / distance
    return bool((np.abs(counts - np.maximum(np.rint(counts), 1)) <= LATTICE_TOLERANCE).all())


@dataclass(frozen=True, eq=False)
class _Slice:
    """Shares of a segment on one plane, float32 ``[rows, columns]``, and the place of the first of these pixels."""

    frame: _Frame
    shares: NDArray[np.float32]

    def smallest(self) -> _Slice:
        """Return the smallest box that contains all shares above 0, of which there is at least one."""
        rows, columns = (np.flatnonzero(self.shares.any(axis=axis)) for axis in (1, 0))
        first = self.frame.position + np.array([columns[0], rows[0]]) @ self.frame.steps
        box = self.shares[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
        return _Slice(replace(self.frame, position=first), box)

    def placed(self, lattice: Lattice) -> tuple[tuple[int, int, int], int, NDArray[np.float32], tuple[int, int]] | None:
        """Return the slice on the lattice of a CT; None if its pixels are not those of a slice of the lattice.

        Returns:
            The two axes of the lattice within the slice in ascending order and the slice axis; the index of the slice;
            the shares ``[first, second]`` of all pixels within the scan, and the pixel at which they begin.
        """
        into = np.linalg.inv(lattice.affine)
        at = into[:3, :3] @ self.frame.position + into[:3, 3]
        steps = self.frame.steps @ into[:3, :3].T
        ways = np.rint(steps)
        columns, rows = (int(np.abs(way).argmax()) for way in ways)
        extent = np.array(self.shares.shape[::-1]) - 1
        first = np.rint(at)
        off = np.abs(at - first) + extent @ np.abs(steps - ways)
        if columns == rows or (np.abs(ways).sum(axis=1) != 1).any() or off.max() > LATTICE_TOLERANCE:
            return None
        shares = self.shares.T
        start = [int(first[axis]) for axis in (columns, rows)]
        for number, (axis, way) in enumerate(zip((columns, rows), ways, strict=True)):
            if way[axis] < 0:
                start[number] -= int(extent[number])
                shares = np.flip(shares, number)
        axes = [columns, rows]
        if columns > rows:
            shares, start, axes = shares.T, start[::-1], axes[::-1]
        slices_axis = 3 - columns - rows
        low = [max(0, -begin) for begin in start]
        high = [max(0, lattice.shape[axis] - begin) for axis, begin in zip(axes, start, strict=True)]
        index = int(first[slices_axis])
        if not 0 <= index < lattice.shape[slices_axis]:
            high = [0, 0]
        within = shares[low[0] : high[0], low[1] : high[1]]
        return (axes[0], axes[1], slices_axis), index, within, (start[0] + low[0], start[1] + low[1])


@dataclass(frozen=True, eq=False)
class Segment:
    """One segment of a DICOM Segmentation.

    Attributes:
        name: SegmentLabel. It may contain a patient's name.
        number: SegmentNumber.
        frame_of_reference: UID of its frame of reference; empty if the file names none.
        frames: all frames of the segmentation.
    """

    name: str = field(repr=False)
    number: int
    frame_of_reference: str
    frames: _Frames = field(repr=False)

    @property
    def is_empty(self) -> bool:
        """Whether no frame shows the segment, so that it counts as not annotated.

        Raises:
            InputError: the pixels cannot be decoded.
        """
        return not self._slices

    @cached_property
    def _slices(self) -> list[_Slice]:
        return self.frames.slices(self.number)

    def summary(self) -> StructureSummary:
        """Return number of slices and volume as the file states them.

        Raises:
            InputError: the pixels cannot be decoded.
        """
        slices = self._slices
        try:
            volume: float | None = _voxels(slices) * abs(float(np.linalg.det(self.frames.affine[:3, :3]))) / 1000
        except GeometryError:
            volume = None
        warnings = () if slices else (self._said_of_empty(),)
        return StructureSummary(0, len(slices), volume, (self.frames.form,), warnings)

    def share(self, lattice: Lattice) -> tuple[BoxedShare, tuple[str, ...]]:
        """Return the share of each voxel of a CT that the segment fills, and warnings.

        Frames on the lattice of the CT are placed pixel by pixel. Others are resampled: the share of a voxel is the
        volume that it has in common with the voxels of the segmentation.

        Raises:
            InputError: the pixels cannot be decoded.
            GeometryError: the segment is outside the scan, or its frames do not form a lattice.
        """
        slices = self._slices
        if not slices:
            return BoxedShare.of_slices({}, (0, 1, 2), lattice.shape), (self._said_of_empty(),)
        said = []
        share = self._placed(lattice)
        if share is not None:
            inside = share.voxels / _voxels(slices)
        else:
            share = self._resampled(lattice)
            before = _voxels(slices) * abs(float(np.linalg.det(self.frames.affine[:3, :3]))) / 1000
            after = share.voxels * lattice.voxel_volume_mm3 / 1000
            inside = after / before
            said.append(
                f"Segment {self.number} is on another lattice than the scan and was resampled as shares of voxels: its "
                f"volume was {before:.4g} ml and is {after:.4g} ml."
            )
        if not share.inside.size:
            raise GeometryError(f"Segment {self.number} is outside the scan.", remedy=_OTHER_CT)
        if inside < 1 - NEGLIGIBLE_OUTSIDE:
            said.append(
                f"Segment {self.number} is only partly within the scan: {100 * (1 - inside):.2g} % of its volume were "
                "left out."
            )
        return share, tuple(said)

    def _placed(self, lattice: Lattice) -> BoxedShare | None:
        """Return the segment if its frames are slices of the CT; None if one of them is not."""
        found: dict[int, tuple[NDArray[np.float32], tuple[int, int]]] = {}
        every_axes = set()
        for slice_ in self._slices:
            placed = slice_.placed(lattice)
            if placed is None:
                return None
            axes, index, shares, start = placed
            every_axes.add(axes)
            found[index] = (shares, start)
        axes = every_axes.pop()
        distance = 1 / float(np.linalg.norm(np.linalg.inv(lattice.affine)[axes[2], :3]))
        if every_axes or len(found) < len(self._slices) or not self.frames.are_as_far_apart_as(distance):
            return None
        return BoxedShare.of_slices(found, axes, lattice.shape)

    def _resampled(self, lattice: Lattice) -> BoxedShare:
        affine = self.frames.affine
        into = np.linalg.inv(affine)
        starts = np.array([into[:3, :3] @ slice_.frame.position + into[:3, 3] for slice_ in self._slices])
        starts = np.rint(starts).astype(int)
        low = starts.min(axis=0)
        ends = [
            start + np.array([*slice_.shares.shape[::-1], 1])
            for start, slice_ in zip(starts, self._slices, strict=True)
        ]
        array = np.zeros(np.max(ends, axis=0) - low, np.float32)
        for (column, row, plane), slice_ in zip(starts - low, self._slices, strict=True):
            rows, columns = slice_.shares.shape
            array[column : column + columns, row : row + rows, plane] = slice_.shares.T
        first = affine.copy()
        first[:3, 3] += affine[:3, :3] @ low
        return resampled(array, first, lattice)

    def _said_of_empty(self) -> str:
        return f"Segment {self.number} has no voxel and counts as not annotated."


def _voxels(slices: Sequence[_Slice]) -> float:
    return sum(float(slice_.shares.sum(dtype=np.float64)) for slice_ in slices)
