"""RT Structure Sets of invented ROIs, written with pydicom: ordinary ones, and odd ones of careless programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian, generate_uid

STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
Points = NDArray[np.float64]


@dataclass(frozen=True)
class Roi:
    """A ROI to write.

    Attributes:
        name: ROIName.
        contours: vertices of each contour, LPS+ mm ``[n, 3]``.
        form: ContourGeometricType of all contours, or of each one.
        number: ROINumber.
        has_item: False to leave its item of ROIContourSequence out.
    """

    name: str
    contours: Sequence[Points] = ()
    form: str | Sequence[str] = "CLOSED_PLANAR"
    number: int = 1
    has_item: bool = True

    @property
    def forms(self) -> list[str]:
        return [self.form] * len(self.contours) if isinstance(self.form, str) else list(self.form)


def structure_set(rois: Sequence[Roi], images: Sequence[Dataset] = (), *, decimals: int = 4) -> FileDataset:
    """Return a structure set that refers to CT images; without images, it has a frame of reference of its own."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ImplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = STRUCTURE_SET
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["structure set", *(roi.name for roi in rois)])
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = STRUCTURE_SET, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PatientName, dataset.PatientID = "RTSTRUCT", "Secretname^Ada", "id-4711"
    dataset.StudyInstanceUID = images[0].StudyInstanceUID if images else generate_uid(entropy_srcs=["study"])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=["series of structures"])
    dataset.StructureSetLabel, dataset.StructureSetDate, dataset.StructureSetTime = "PLAN", "20240229", "101530"
    dataset.ApprovalStatus = "APPROVED"
    frame = images[0].FrameOfReferenceUID if images else generate_uid(entropy_srcs=["frame"])
    dataset.ReferencedFrameOfReferenceSequence = [_references(images, frame)]
    dataset.StructureSetROISequence = [_region(roi, frame) for roi in rois]
    dataset.ROIContourSequence = [_contours(roi, images, decimals) for roi in rois if roi.has_item]
    dataset.RTROIObservationsSequence = [_observation(roi) for roi in rois]
    return dataset


def circle(centre: Sequence[float], radius: float, height: float = 0.0, *, points: int = 400) -> Points:
    """Return a circle in an axial plane, LPS+ mm."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    x, y = centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)
    return np.stack([x, y, np.full(points, height)], axis=1)


def rectangle(low: Sequence[float], high: Sequence[float], height: float = 0.0) -> Points:
    """Return a rectangle in an axial plane, LPS+ mm."""
    (a, b), (c, d) = low, high
    return np.array([[a, b, height], [c, b, height], [c, d, height], [a, d, height]], float)


def keyhole(outer: Points, inner: Points) -> Points:
    """Return one contour of two, joined by a channel of zero width."""
    return np.concatenate([outer, outer[:1], inner[:1], inner[:0:-1], inner[:1]])


def _references(images: Sequence[Dataset], frame: str) -> Dataset:
    found, study, series = Dataset(), Dataset(), Dataset()
    found.FrameOfReferenceUID = frame
    if images:
        series.SeriesInstanceUID = images[0].SeriesInstanceUID
        series.ContourImageSequence = [_image(image) for image in images]
        study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"
        study.ReferencedSOPInstanceUID = images[0].StudyInstanceUID
        study.RTReferencedSeriesSequence = [series]
        found.RTReferencedStudySequence = [study]
    return found


def _image(image: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    return item


def _region(roi: Roi, frame: str) -> Dataset:
    item = Dataset()
    item.ROINumber, item.ReferencedFrameOfReferenceUID, item.ROIName = roi.number, frame, roi.name
    item.ROIGenerationAlgorithm = "MANUAL"
    return item


def _contours(roi: Roi, images: Sequence[Dataset], decimals: int) -> Dataset:
    item = Dataset()
    item.ReferencedROINumber = roi.number
    item.ROIDisplayColor = [255, 0, 0]
    item.ContourSequence = list(_items(roi, images, decimals))
    return item


def _items(roi: Roi, images: Sequence[Dataset], decimals: int) -> Iterator[Dataset]:
    for points, form in zip(roi.contours, roi.forms, strict=True):
        contour = Dataset()
        if images:
            heights = [_height(image, np.array(image.ImagePositionPatient, float)) for image in images]
            place = _height(images[0], points[0]) if len(points) else heights[0]
            contour.ContourImageSequence = [_image(images[int(np.abs(np.array(heights) - place).argmin())])]
        contour.ContourGeometricType = form
        contour.NumberOfContourPoints = len(points)
        set_coordinates(contour, "\\".join(f"{value:.{decimals}f}" for value in points.ravel()))
        yield contour


def _height(image: Dataset, point: Points) -> float:
    cosines = np.array(image.ImageOrientationPatient, float)
    return float(np.cross(cosines[:3], cosines[3:]) @ point)


def set_coordinates(contour: Dataset, text: str) -> None:
    """Write ContourData as it is, unchecked."""
    data = text.encode("ascii")
    data += b" " * (len(data) % 2)
    tag = Tag("ContourData")
    contour[tag] = RawDataElement(tag, "DS", len(data), data, 0, True, True)


def _observation(roi: Roi) -> Dataset:
    item = Dataset()
    item.ObservationNumber, item.ReferencedROINumber = roi.number, roi.number
    item.RTROIInterpretedType, item.ROIInterpreter = "ORGAN", ""
    return item
