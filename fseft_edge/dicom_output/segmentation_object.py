"""A mask as a DICOM Segmentation (PS3.3 section A.51), written with highdicom."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian

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
from fseft_edge.dicom_output.organ_codes import code_item
from fseft_edge.dicom_output.source_headers import SourceHeaders
from fseft_edge.dicom_output.source_planes import SourceSeries
from fseft_edge.runtime.scans.volume import LabelMap
from fseft_edge.runtime.system.atomic import check_writable

if TYPE_CHECKING:
    from highdicom.seg import Segmentation, SegmentDescription

    from fseft_edge.masks.result import SegmentedOrgan

_NO_DATE: Final = ("19000101", "000000")
"""Date and time for scans without a date, such as de-identified scans: a Segmentation must have a date."""

_GEOMETRY: Final = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)
"""All attributes of an image that the Segmentation needs, except those of patient and study."""


def write_dicom_segmentation(
    path: Path,
    labels: LabelMap,
    organs: Sequence[SegmentedOrgan],
    source: Sequence[Dataset],
    algorithm: SegmentationAlgorithm,
) -> WrittenDicom:
    """Write a mask as a DICOM Segmentation of type BINARY: one segment per organ, without empty frames.

    Equal masks of the same series by the same adapters and versions give equal bytes. A Segmentation cannot be empty:
    if the whole mask is empty, no file is written, and an existing file of that name is deleted.

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
        return WrittenDicom("seg", None, (), omitted, headers.warnings)
    write_instance(path, _segmentation(series, numbered, algorithm))
    return WrittenDicom("seg", path, tuple(organ.name for organ in numbered), omitted, headers.warnings)


def _segmentation(
    series: SourceSeries, organs: Sequence[NumberedOrgan], algorithm: SegmentationAlgorithm
) -> Segmentation:
    from highdicom.seg import Segmentation  # noqa: PLC0415 - slow to import

    date, time = _scan_date(series.first)
    segmentation = Segmentation(
        source_images=[_geometry(image, series.slice_spacing) for image in series.images],
        pixel_array=_segment_numbers(series.labels, organs),
        # The type LABELMAP of 2024 gives smaller files, but few programs can read it yet.
        segmentation_type="BINARY",
        segment_descriptions=[_description(organ, algorithm) for organ in organs],
        series_instance_uid=PENDING_UID,
        series_number=SERIES_NUMBERS["seg"],
        sop_instance_uid=PENDING_UID,
        instance_number=1,
        manufacturer=TOOLKIT,
        manufacturer_model_name=TOOLKIT,
        software_versions=algorithm.version,
        device_serial_number="none",  # must not be empty (PS3.3 section C.7.5.2), but software has no serial number
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_label="ORGANS",
        content_description=f"Organs, {algorithm.origin}",
        omit_empty_frames=True,
        series_description="Organs (fseft-edge)",
        content_date=date,
        content_time=time,
    )
    copy_patient_and_study(series.first, segmentation)
    name_private_codes(segmentation, organs)
    # The time of writing would make the bytes of every run different.
    for keyword in ("InstanceCreationDate", "InstanceCreationTime"):
        del segmentation[keyword]
    for item in segmentation.ContributingEquipmentSequence:
        del item["ContributionDateTime"]
    return segmentation


def _geometry(image: Dataset, slice_spacing: float) -> Dataset:
    """Return only the attributes of a header that highdicom needs, so that no other value can cause an error."""
    kept = Dataset()
    kept.Modality = "CT"
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"):
        setattr(kept, keyword, "")
    for keyword in ("AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
        setattr(kept, keyword, "")
    for keyword in _GEOMETRY:
        if keyword in image:
            kept[keyword] = image[keyword]
    if "PerFrameFunctionalGroupsSequence" in kept:
        kept = copy.deepcopy(kept)
        groups = [*kept.get("SharedFunctionalGroupsSequence", ()), *kept.PerFrameFunctionalGroupsSequence]
        measures = [item for group in groups for item in group.get("PixelMeasuresSequence", ())]
    else:
        measures = [kept]
    for item in measures:
        if not item.get("SliceThickness"):
            item.SliceThickness = f"{slice_spacing:.6g}"
    return kept


def _segment_numbers(
    planes: NDArray[np.unsignedinteger], organs: Sequence[NumberedOrgan]
) -> NDArray[np.unsignedinteger]:
    """Return segment numbers instead of label values. Segment numbers start at 1 and have no gaps."""
    numbers = np.zeros(np.iinfo(planes.dtype).max + 1, np.uint8 if len(organs) < 256 else np.uint16)
    for organ in organs:
        numbers[organ.label] = organ.number
    numbered: NDArray[np.unsignedinteger] = numbers[planes]
    return numbered


def _description(organ: NumberedOrgan, algorithm: SegmentationAlgorithm) -> SegmentDescription:
    from highdicom import AlgorithmIdentificationSequence  # noqa: PLC0415 - slow to import
    from highdicom.color import CIELabColor  # noqa: PLC0415 - slow to import
    from highdicom.seg import SegmentDescription  # noqa: PLC0415 - slow to import

    description = SegmentDescription(
        segment_number=organ.number,
        segment_label=organ.name,
        segmented_property_category=organ.code.category,
        segmented_property_type=organ.code.kind,
        algorithm_type=algorithm.kind,
        algorithm_identification=AlgorithmIdentificationSequence.from_sequence(
            DicomSequence([algorithm.item(organ.name)])
        ),
        display_color=CIELabColor.from_rgb(*organ.colour),
    )
    if organ.code.side is not None:
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [code_item(organ.code.side)]
    return description


def _scan_date(image: Dataset) -> tuple[str, str]:
    """Return date and time of the scan, because the mask shows the patient at that time."""
    for when in ("Series", "Study"):
        if image.get(f"{when}Date"):
            return str(image[f"{when}Date"].value), str(image.get(f"{when}Time") or _NO_DATE[1])
    return _NO_DATE
