"""A mask as an RT Structure Set (PS3.3 section A.19), for radiotherapy planning systems.

The object is written with pydicom only: neither highdicom nor another well-maintained library can write RT Structure
Sets (docs/dicom-output.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage

from fseft_edge.dicom_output.contours import closed_contours
from fseft_edge.dicom_output.instance import (
    PENDING_UID,
    SERIES_NUMBERS,
    TOOLKIT,
    NumberedOrgan,
    SegmentationAlgorithm,
    WrittenDicom,
    copy_patient_and_study,
    name_private_codes,
    present_organs,
    write_instance,
)
from fseft_edge.dicom_output.organ_codes import OrganCode, code_item
from fseft_edge.dicom_output.source_headers import SourceHeaders
from fseft_edge.dicom_output.source_planes import SourcePlane, SourceSeries
from fseft_edge.runtime.scans.volume import LabelMap
from fseft_edge.runtime.system.atomic import check_writable

if TYPE_CHECKING:
    from fseft_edge.masks.result import SegmentedOrgan

_DETACHED_STUDY: Final = "1.2.840.10008.3.1.2.3.1"
"""SOP class of the reference to a study. It is retired, but structure sets still use it and programs expect it."""

_CONTOUR_DATA: Final = Tag("ContourData")


def write_structure_set(
    path: Path,
    labels: LabelMap,
    organs: Sequence[SegmentedOrgan],
    source: Sequence[Dataset],
    algorithm: SegmentationAlgorithm,
) -> WrittenDicom:
    """Write a mask as an RT Structure Set: one ROI per organ, with CLOSED_PLANAR contours in the source planes.

    The contours come from :func:`fseft_edge.dicom_output.contours.closed_contours`. Coordinates are rounded to
    0.001 mm. Equal masks of the same series by the same adapters and versions give equal bytes. If the whole mask is
    empty, no file is written, and an existing file of that name is deleted.

    Args:
        path: path of the file; an existing file is replaced.
        labels: the mask, on the lattice of the source series.
        organs: every organ of the mask.
        source: headers of the CT images without pixel data, in any order, or the header of one multi-frame image.
        algorithm: encoder and adapters that made the mask.

    Raises:
        InputError: a header has no valid UID or no size, or the headers do not belong to one series.
        GeometryError: a header has no valid position, orientation or spacing, or the lattices of series and mask
            differ.
        LabelError: the mask contains a label value that does not belong to an organ.
        OutOfSpaceError: the disk is full or not writable.
    """
    check_writable(path)
    headers = SourceHeaders.of(source)
    series = SourceSeries.of(headers.images, labels)
    numbered, omitted = present_organs(series.labels, organs)
    if not numbered:
        path.unlink(missing_ok=True)
        return WrittenDicom("rtstruct", None, (), omitted, headers.warnings)
    write_instance(path, _structure_set(series, numbered, algorithm))
    return WrittenDicom("rtstruct", path, tuple(organ.name for organ in numbered), omitted, headers.warnings)


def _structure_set(series: SourceSeries, organs: Sequence[NumberedOrgan], algorithm: SegmentationAlgorithm) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    # Implicit VR, because explicit VR limits the coordinates of a contour to 64 KiB of text.
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    dataset.SOPClassUID = RTStructureSetStorage
    copy_patient_and_study(series.first, dataset)
    name_private_codes(dataset, organs)
    dataset.Modality = "RTSTRUCT"
    dataset.SeriesInstanceUID = PENDING_UID
    dataset.SeriesNumber = SERIES_NUMBERS["rtstruct"]
    dataset.SeriesDescription = "Organs (fseft-edge)"
    dataset.OperatorsName = ""
    dataset.InstanceNumber = 1
    dataset.Manufacturer = TOOLKIT
    dataset.ManufacturerModelName = TOOLKIT
    dataset.SoftwareVersions = algorithm.version
    dataset.FrameOfReferenceUID = series.first.FrameOfReferenceUID
    dataset.PositionReferenceIndicator = series.first.get("PositionReferenceIndicator", "")
    dataset.StructureSetLabel = "ORGANS"
    dataset.StructureSetDescription = f"Organs, {algorithm.origin}; to be checked before use"
    # May be empty; the time of writing would make the bytes of every run different.
    dataset.StructureSetDate = ""
    dataset.StructureSetTime = ""
    dataset.ApprovalStatus = "UNAPPROVED"
    dataset.ReferencedFrameOfReferenceSequence = [_referenced_series(series)]
    dataset.StructureSetROISequence = [_region(organ, series, algorithm) for organ in organs]
    dataset.ROIContourSequence = [_contours(organ, series) for organ in organs]
    dataset.RTROIObservationsSequence = [_observation(organ) for organ in organs]
    return dataset


def _referenced_series(series: SourceSeries) -> Dataset:
    images = Dataset()
    images.SeriesInstanceUID = series.first.SeriesInstanceUID
    images.ContourImageSequence = [_image(plane) for plane in series.planes]
    study = Dataset()
    study.ReferencedSOPClassUID = _DETACHED_STUDY
    study.ReferencedSOPInstanceUID = series.first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [images]
    frame_of_reference = Dataset()
    frame_of_reference.FrameOfReferenceUID = series.first.FrameOfReferenceUID
    frame_of_reference.RTReferencedStudySequence = [study]
    return frame_of_reference


def _image(plane: SourcePlane) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = plane.sop_class_uid
    item.ReferencedSOPInstanceUID = plane.sop_instance_uid
    if plane.frame is not None:
        item.ReferencedFrameNumber = plane.frame
    return item


def _region(organ: NumberedOrgan, series: SourceSeries, algorithm: SegmentationAlgorithm) -> Dataset:
    region = Dataset()
    region.ROINumber = organ.number
    region.ReferencedFrameOfReferenceUID = series.first.FrameOfReferenceUID
    region.ROIName = organ.name
    region.ROIGenerationAlgorithm = algorithm.kind
    region.ROIDerivationAlgorithmIdentificationSequence = [algorithm.item(organ.name)]
    return region


def _contours(organ: NumberedOrgan, series: SourceSeries) -> Dataset:
    contours = Dataset()
    contours.ROIDisplayColor = list(organ.colour)
    contours.ReferencedROINumber = organ.number
    contours.ContourSequence = [
        _contour(polygon, plane)
        for plane, values in zip(series.planes, series.labels, strict=True)
        for polygon in closed_contours(values == organ.label)
    ]
    return contours


def _contour(polygon: NDArray[np.float64], plane: SourcePlane) -> Dataset:
    contour = Dataset()
    contour.ContourImageSequence = [_image(plane)]
    contour.ContourGeometricType = "CLOSED_PLANAR"
    contour.NumberOfContourPoints = len(polygon)
    # Adding 0.0 changes a rounded -0.0 to 0.0.
    numbers = (plane.points(polygon).round(3) + 0.0).ravel().tolist()
    # Without pydicom's check of each number, which takes a third of the time for masks with many contours.
    texts = [f"{number:.3f}" for number in numbers]
    contour[_CONTOUR_DATA] = DataElement(_CONTOUR_DATA, "DS", texts, already_converted=True)
    return contour


def _observation(organ: NumberedOrgan) -> Dataset:
    observation = Dataset()
    observation.ObservationNumber = organ.number
    observation.ReferencedROINumber = organ.number
    observation.RTROIIdentificationCodeSequence = [_identification(organ.code)]
    observation.RTROIInterpretedType = "ORGAN"
    observation.ROIInterpreter = ""
    return observation


def _identification(code: OrganCode) -> Dataset:
    item = code_item(code.kind)
    if code.side is not None:
        item.SegmentedPropertyTypeModifierCodeSequence = [code_item(code.side)]
    return item
