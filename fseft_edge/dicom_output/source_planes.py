"""The planes of a CT series, and where each lies in a label map; found by their positions, never by their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fseft_edge.runtime.errors import GeometryError, InputError
from fseft_edge.runtime.volume import LabelMap

AGREEMENT_MM: Final = 0.1
"""A plane's corner pixels may lie this far from the voxels they stand for: room for positions rounded in the header."""

_LPS_TO_RAS: Final = np.array([-1.0, -1.0, 1.0])
_ANOTHER_SERIES = "Give the very series that was segmented, with all of its slices and no others."
_EXPORT_AGAIN = "Export the series again from the PACS, complete and with its headers unchanged."


@dataclass(frozen=True, eq=False)
class SourcePlane:
    """One slice of the series.

    Attributes:
        sop_class_uid: of the image that holds it.
        sop_instance_uid: of the same.
        frame: its number in a multi-frame image, from 1; None in a single-frame one.
        position: float64 ``[3]``, centre of its first pixel, LPS+ mm (ImagePositionPatient).
        along_row: float64 ``[3]``, step from a column to the next, LPS+ mm.
        along_column: float64 ``[3]``, step from a row to the next, LPS+ mm.
        slice_index: where it lies along the label map's slice axis.
    """

    sop_class_uid: str
    sop_instance_uid: str
    frame: int | None
    position: NDArray[np.float64]
    along_row: NDArray[np.float64]
    along_column: NDArray[np.float64]
    slice_index: int

    def points(self, columns_and_rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return LPS+ mm ``[n, 3]`` of positions ``[n, 2]`` in the image, in pixels: column first, centres at wholes."""
        steps = np.stack([self.along_row, self.along_column])
        placed: NDArray[np.float64] = self.position + columns_and_rows @ steps
        return placed


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """A CT series on whose lattice a label map lies.

    Attributes:
        planes: every slice once. Of single-frame images along the label map's slice axis; of a multi-frame image in the
            order of its frames.
        images: the header of each plane's image in the same order, or the one multi-frame header.
        labels: ``[planes, rows, columns]``, a view of the label map or a copy of it.
        slice_spacing: distance between neighbouring planes, mm.
    """

    planes: tuple[SourcePlane, ...]
    images: tuple[Dataset, ...]
    labels: NDArray[np.unsignedinteger]
    slice_spacing: float

    @property
    def first(self) -> Dataset:
        """The header that patient, study and frame of reference are taken from."""
        return self.images[0]

    @classmethod
    def of(cls, source: Sequence[Dataset], labels: LabelMap) -> SourceSeries:
        """Find the planes of a series in a label map.

        Args:
            source: headers of the CT images, in any order; or that of one multi-frame image.
            labels: the label map, its axes in any of the 48 orders and directions.

        Raises:
            InputError: a header lacks what identifies it, or the headers are not of one series.
            GeometryError: a header lacks its place in space, or series and label map do not agree.
        """
        _check_one_series(source)
        multi_frame = len(source) == 1 and "PerFrameFunctionalGroupsSequence" in source[0]
        headers = list(_frames(source[0])) if multi_frame else [(image, None, image, image, image) for image in source]
        located = []
        for image, number, positions, orientations, measures in headers:
            located.append((_located(image, number, positions, orientations, measures, labels), image))
        axes = located[0][0][1]
        if any(found != axes for (_, found), _ in located):
            raise GeometryError("The slices of the series are not parallel.", remedy=_ANOTHER_SERIES)
        planes = [(plane, image) for (plane, _), image in located]
        if not multi_frame:
            planes.sort(key=lambda pair: pair[0].slice_index)
        slices = [plane.slice_index for plane, _ in planes]
        depth = labels.shape[axes[0][0]]
        if sorted(slices) != list(range(depth)):
            raise GeometryError(
                f"The series has {len(slices)} slices, {len(set(slices))} of them in different places, and the label map "
                f"has {depth}.",
                remedy=_ANOTHER_SERIES,
            )
        order = tuple(axis for axis, _ in axes)
        view = np.transpose(labels.array, order)[:, :: axes[1][1], :: axes[2][1]]
        return cls(
            tuple(plane for plane, _ in planes),
            (source[0],) if multi_frame else tuple(image for _, image in planes),
            view if slices == list(range(depth)) else view[slices],
            float(np.linalg.norm(labels.affine[:3, order[0]])),
        )


_Axes = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def _check_one_series(source: Sequence[Dataset]) -> None:
    if not source:
        raise InputError("No header of the source series was given.", remedy=_ANOTHER_SERIES)
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns"):
        if any(not image.get(keyword) for image in source):
            raise InputError(f"The source series has an image without {keyword}.", remedy=_EXPORT_AGAIN)
    if any(not image.get("FrameOfReferenceUID") for image in source):
        raise GeometryError(
            "The source series has no FrameOfReferenceUID, so nothing can be placed in its space.",
            remedy=_EXPORT_AGAIN,
        )
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Rows", "Columns"):
        if len({image[keyword].value for image in source}) > 1:
            raise InputError(f"The source images differ in {keyword}: they are not one series.", remedy=_ANOTHER_SERIES)


_Header = tuple[Dataset, int | None, Dataset, Dataset, Dataset]


def _frames(image: Dataset) -> Iterable[_Header]:
    """Yield image, frame number and the items that tell position, orientation and spacing (PS3.3 C.7.6.16.2)."""
    shared = (image.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for number, own in enumerate(image.PerFrameFunctionalGroupsSequence, start=1):
        items = [
            (own.get(keyword) or shared.get(keyword) or [Dataset()])[0]
            for keyword in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
        ]
        yield image, number, items[0], items[1], items[2]


def _located(
    image: Dataset,
    number: int | None,
    positions: Dataset,
    orientations: Dataset,
    measures: Dataset,
    labels: LabelMap,
) -> tuple[SourcePlane, _Axes]:
    """Return a plane, and for slices, rows and columns the label map's axis and its direction (1 or -1)."""
    position = _numbers(positions, "ImagePositionPatient", 3)
    orientation = _numbers(orientations, "ImageOrientationPatient", 6)
    spacing = _numbers(measures, "PixelSpacing", 2)
    along_row, along_column = orientation[:3] * spacing[1], orientation[3:] * spacing[0]
    into = np.linalg.inv(labels.affine)
    row_step, column_step = (into[:3, :3] @ (step * _LPS_TO_RAS) for step in (along_column, along_row))
    row_axis, column_axis = (int(np.abs(step).argmax()) for step in (row_step, column_step))
    if row_axis == column_axis or (labels.shape[row_axis], labels.shape[column_axis]) != (image.Rows, image.Columns):
        raise GeometryError(
            f"The source images have {image.Rows} rows and {image.Columns} columns, which the label map of shape "
            f"{labels.shape} has not in that place.",
            remedy=_ANOTHER_SERIES,
        )
    slice_axis = 3 - row_axis - column_axis
    row_way, column_way = (1 if step[axis] > 0 else -1 for step, axis in ((row_step, row_axis), (column_step, column_axis)))
    index = int(round(float((into[:3, :3] @ (position * _LPS_TO_RAS) + into[:3, 3])[slice_axis])))
    plane = SourcePlane(
        str(image.SOPClassUID), str(image.SOPInstanceUID), number, position, along_row, along_column, index
    )
    corners = np.array([[column, row] for column in (0, image.Columns - 1) for row in (0, image.Rows - 1)], np.float64)
    voxels = np.empty((4, 3))
    voxels[:, slice_axis] = index
    for axis, way, place in ((column_axis, column_way, corners[:, 0]), (row_axis, row_way, corners[:, 1])):
        voxels[:, axis] = place if way > 0 else labels.shape[axis] - 1 - place
    expected = voxels @ labels.affine[:3, :3].T + labels.affine[:3, 3]
    distance = float(np.linalg.norm(plane.points(corners) * _LPS_TO_RAS - expected, axis=1).max())
    if not 0 <= index < labels.shape[slice_axis]:
        raise GeometryError("A slice of the source series lies outside the label map.", remedy=_ANOTHER_SERIES)
    if distance > AGREEMENT_MM:
        raise GeometryError(
            f"Source series and label map do not agree: a slice lies {distance:.3g} mm from the voxels it would stand "
            f"for, and {AGREEMENT_MM} mm are allowed.",
            remedy=_ANOTHER_SERIES,
        )
    # The direction of the slice axis is that of the label map; the planes are sorted by it.
    return plane, ((slice_axis, 1), (row_axis, row_way), (column_axis, column_way))


def _numbers(dataset: Dataset, keyword: str, count: int) -> NDArray[np.float64]:
    try:
        values = np.array(dataset.get(keyword), dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise GeometryError(f"A source image has no usable {keyword}.", remedy=_EXPORT_AGAIN)
    return values
