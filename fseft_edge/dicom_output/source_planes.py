"""The planes of a CT series and their slices in a label map, matched by position and never by order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fseft_edge.runtime.errors import GeometryError, InputError
from fseft_edge.runtime.scans.volume import LabelMap

AGREEMENT_MM: Final = 0.1
"""Largest distance of a corner pixel from its voxel, in mm; positions in headers can be rounded."""

_LPS_TO_RAS: Final = np.array([-1.0, -1.0, 1.0])
_GIVE_SEGMENTED_SERIES = "Give the series that was segmented, with all its slices and without other images."
_EXPORT_AGAIN = "Export the series from the PACS again, with all slices and with unchanged headers."


@dataclass(frozen=True, eq=False)
class SourcePlane:
    """One slice of the series.

    Attributes:
        sop_class_uid: SOP Class UID of the image that contains the slice.
        sop_instance_uid: SOP Instance UID of the image that contains the slice.
        frame: frame number in a multi-frame image, from 1; None in a single-frame image.
        position: float64 ``[3]``, centre of the first pixel, LPS+ mm (ImagePositionPatient).
        along_row: float64 ``[3]``, step from one column to the next, LPS+ mm.
        along_column: float64 ``[3]``, step from one row to the next, LPS+ mm.
    """

    sop_class_uid: str
    sop_instance_uid: str
    frame: int | None
    position: NDArray[np.float64]
    along_row: NDArray[np.float64]
    along_column: NDArray[np.float64]

    def points(self, columns_and_rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return LPS+ mm ``[n, 3]`` of points ``[n, 2]`` (column, row); pixel centres have integer coordinates."""
        steps = np.stack([self.along_row, self.along_column])
        placed: NDArray[np.float64] = self.position + columns_and_rows @ steps
        return placed


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """A CT series, and a label map on its lattice.

    Attributes:
        planes: every slice once. Single-frame images are sorted by position along the cross product of row and column
            direction; frames of a multi-frame image keep their order.
        images: the header of the image of each plane, in the order of ``planes``, or the one multi-frame header.
        labels: label values ``[planes, rows, columns]``, a view or a copy of the label map.
        slice_spacing: distance between neighbouring planes, mm.
    """

    planes: tuple[SourcePlane, ...]
    images: tuple[Dataset, ...]
    labels: NDArray[np.unsignedinteger]
    slice_spacing: float

    @property
    def first(self) -> Dataset:
        """The header from which patient, study and frame of reference are copied."""
        return self.images[0]

    @classmethod
    def of(cls, source: Sequence[Dataset], labels: LabelMap) -> SourceSeries:
        """Match the planes of a series with the slices of a label map.

        Args:
            source: headers of the CT images, in any order, or the header of one multi-frame image.
            labels: the label map, with its axes in any of the 48 orders and directions.

        Raises:
            InputError: a header has no UID or no size, or the headers do not belong to one series.
            GeometryError: a header has no position, orientation or spacing, or series and label map have different
                lattices.
        """
        _check_one_series(source)
        multi_frame = len(source) == 1 and "PerFrameFunctionalGroupsSequence" in source[0]
        frames = list(_frames_within(source[0]) if multi_frame else map(_frame_of, source))
        if not multi_frame:
            # Sorting by position makes the file independent of the order of the headers and of the label map's axes.
            frames.sort(key=_Frame.height)
        axes = _Axes.of(frames[0], labels)
        slices = [axes.slice_index(frame, labels) for frame in frames]
        depth = labels.shape[axes.slices]
        if sorted(slices) != list(range(depth)):
            raise GeometryError(
                f"The source series has {len(slices)} slices at {len(set(slices))} different positions, but the label "
                f"map has {depth} slices.",
                remedy=_GIVE_SEGMENTED_SERIES,
            )
        return cls(
            tuple(frame.plane for frame in frames),
            (source[0],) if multi_frame else tuple(frame.image for frame in frames),
            _reordered(axes.view(labels), slices),
            float(np.linalg.norm(labels.affine[:3, axes.slices])),
        )


def _check_one_series(source: Sequence[Dataset]) -> None:
    if not source:
        raise InputError("The source series contains no image.", remedy=_GIVE_SEGMENTED_SERIES)
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns"):
        if any(not image.get(keyword) for image in source):
            raise InputError(f"An image of the source series has no {keyword}.", remedy=_EXPORT_AGAIN)
    if any(not image.get("FrameOfReferenceUID") for image in source):
        raise GeometryError(
            "An image of the source series has no FrameOfReferenceUID, which a DICOM mask object has to contain.",
            remedy=_EXPORT_AGAIN,
        )
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Rows", "Columns"):
        if len({image[keyword].value for image in source}) > 1:
            raise InputError(
                f"The source images have different values of {keyword}, so they are not one series.",
                remedy=_GIVE_SEGMENTED_SERIES,
            )


@dataclass(frozen=True, eq=False)
class _Frame:
    """A plane, and the header of its image."""

    plane: SourcePlane
    image: Dataset

    def height(self) -> float:
        """Return the position along the cross product of row and column direction, in a unit common to the series."""
        return float(self.plane.position @ np.cross(self.plane.along_row, self.plane.along_column))


def _frame_of(image: Dataset) -> _Frame:
    return _Frame(_plane(image, None, position=image, orientation=image, measures=image), image)


def _frames_within(image: Dataset) -> Iterator[_Frame]:
    """Yield the frames of a multi-frame image (functional groups, PS3.3 section C.7.6.16)."""
    shared = (image.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for number, own in enumerate(image.PerFrameFunctionalGroupsSequence, start=1):
        position, orientation, measures = (
            (own.get(keyword) or shared.get(keyword) or [Dataset()])[0]
            for keyword in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
        )
        yield _Frame(_plane(image, number, position=position, orientation=orientation, measures=measures), image)


def _plane(
    image: Dataset, number: int | None, *, position: Dataset, orientation: Dataset, measures: Dataset
) -> SourcePlane:
    """Return a plane with its geometry from the given items (Image Plane Module, PS3.3 section C.7.6.2)."""
    cosines = _numbers(orientation, "ImageOrientationPatient", 6)
    between_rows, between_columns = _numbers(measures, "PixelSpacing", 2)
    return SourcePlane(
        str(image.SOPClassUID),
        str(image.SOPInstanceUID),
        number,
        _numbers(position, "ImagePositionPatient", 3),
        cosines[:3] * between_columns,
        cosines[3:] * between_rows,
    )


@dataclass(frozen=True)
class _Axes:
    """Axes of a label map along the slices, rows and columns of a series; direction of rows and columns, +1 or -1."""

    slices: int
    rows: int
    columns: int
    rows_way: int
    columns_way: int

    @classmethod
    def of(cls, frame: _Frame, labels: LabelMap) -> _Axes:
        into = np.linalg.inv(labels.affine[:3, :3])
        row_step, column_step = (
            into @ (step * _LPS_TO_RAS) for step in (frame.plane.along_column, frame.plane.along_row)
        )
        rows, columns = int(np.abs(row_step).argmax()), int(np.abs(column_step).argmax())
        size = frame.image.Rows, frame.image.Columns
        if rows == columns or (labels.shape[rows], labels.shape[columns]) != size:
            raise GeometryError(
                f"The source images have {size[0]} rows and {size[1]} columns, which does not agree with the label map "
                f"of shape {labels.shape}.",
                remedy=_GIVE_SEGMENTED_SERIES,
            )
        return cls(
            3 - rows - columns,
            rows,
            columns,
            *(1 if step > 0 else -1 for step in (row_step[rows], column_step[columns])),
        )

    def slice_index(self, frame: _Frame, labels: LabelMap) -> int:
        """Return the index of a plane along the slice axis of the label map, after a check of its four corners."""
        place = np.linalg.inv(labels.affine) @ [*frame.plane.position * _LPS_TO_RAS, 1.0]
        index = round(float(place[self.slices]))
        if not 0 <= index < labels.shape[self.slices]:
            raise GeometryError("A slice of the source series is outside the label map.", remedy=_GIVE_SEGMENTED_SERIES)
        corners = np.array(list(product((0, labels.shape[self.columns] - 1), (0, labels.shape[self.rows] - 1))), float)
        voxels = np.empty((4, 3))
        voxels[:, self.slices] = index
        for number, axis, way in ((0, self.columns, self.columns_way), (1, self.rows, self.rows_way)):
            voxels[:, axis] = corners[:, number] if way > 0 else labels.shape[axis] - 1 - corners[:, number]
        expected = voxels @ labels.affine[:3, :3].T + labels.affine[:3, 3]
        distance = float(np.linalg.norm(frame.plane.points(corners) * _LPS_TO_RAS - expected, axis=1).max())
        if distance > AGREEMENT_MM:
            raise GeometryError(
                f"Source series and label map have different lattices: a slice is {distance:.3g} mm from its voxels, "
                f"but at most {AGREEMENT_MM} mm are allowed.",
                remedy=_GIVE_SEGMENTED_SERIES,
            )
        return index

    def view(self, labels: LabelMap) -> NDArray[np.unsignedinteger]:
        """Return the label map as ``[slices, rows, columns]``, rows and columns in the direction of the images."""
        turned = np.transpose(labels.array, (self.slices, self.rows, self.columns))
        return turned[:, :: self.rows_way, :: self.columns_way]


def _reordered(planes: NDArray[np.unsignedinteger], order: list[int]) -> NDArray[np.unsignedinteger]:
    """Return planes in another order; ascending or descending order gives a view, so a large mask is not copied."""
    ascending = list(range(len(planes)))
    if order == ascending:
        return planes
    return planes[::-1] if order == ascending[::-1] else planes[order]


def _numbers(dataset: Dataset, keyword: str, count: int) -> NDArray[np.float64]:
    try:
        values = np.array(dataset.get(keyword), dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise GeometryError(f"An image of the source series has no valid {keyword}.", remedy=_EXPORT_AGAIN)
    return values
