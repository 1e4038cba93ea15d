"""Common parts of Segmentation and RT Structure Set: patient and study, algorithm, organs, UIDs, writing the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID, generate_uid

from fseft_edge._version import __version__
from fseft_edge.dicom_output.organ_codes import PRIVATE_SCHEME, OrganCode, code_item, organ_code
from fseft_edge.dicom_output.source_headers import MAY_BE_EMPTY, PATIENT_AND_STUDY
from fseft_edge.runtime.errors import LabelError
from fseft_edge.runtime.scans.organs import organ_colour
from fseft_edge.runtime.system.atomic import atomic_path

if TYPE_CHECKING:
    from fseft_edge.adapters.file import AdapterFile
    from fseft_edge.masks.result import SegmentedOrgan

TOOLKIT: Final = "fseft-edge"
DicomKind = Literal["seg", "rtstruct"]

SERIES_NUMBERS: Final[dict[DicomKind, int]] = {"seg": 9901, "rtstruct": 9902}
"""Larger than the series numbers of scanners, so that results are at the end of a study."""

PENDING_UID: Final = UID("2.25.0")
"""Placeholder of a UID that is computed from the content when the content is complete."""


@dataclass(frozen=True)
class SegmentationAlgorithm:
    """Description of the algorithm that made a mask, for its DICOM objects.

    Attributes:
        encoder_id: id of the encoder bundle.
        adapters: sha256 of the adapter file of each organ, by organ name.
        transductive: whether the adapters were refitted to the scan.
        version: version of the toolkit.
        corrected: whether a person corrected the mask afterwards.
    """

    encoder_id: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    transductive: bool = False
    version: str = __version__
    corrected: bool = False

    @classmethod
    def of(cls, encoder_id: str, files: Sequence[AdapterFile], *, transductive: bool = False) -> SegmentationAlgorithm:
        """Return the description of these adapters on this encoder."""
        adapters = {organ.name: file.sha256 or "" for file in files for organ in file.description.organs}
        return cls(encoder_id, adapters, transductive)

    @property
    def kind(self) -> str:
        """SegmentAlgorithmType (PS3.3 section C.8.20.2) and ROIGenerationAlgorithm (C.8.8.5), which share terms."""
        # The annotations that an adapter learned from belong to other scans, so they are no contribution of a person.
        return "SEMIAUTOMATIC" if self.corrected else "AUTOMATIC"

    @property
    def origin(self) -> str:
        """What made the mask, in words for the description of an object."""
        return "segmented automatically" + (", then corrected by a person" if self.corrected else "")

    def item(self, organ: str) -> Dataset:
        """Return the item of the Algorithm Identification Macro (PS3.3 section 10.16) for one organ."""
        parameters = {
            "encoder_id": self.encoder_id,
            "adapter_sha256": self.adapters.get(organ, ""),
            "transductive": "yes" if self.transductive else "no",
        }
        item = Dataset()
        item.AlgorithmFamilyCodeSequence = [code_item(codes.CID7162.ArtificialIntelligence)]
        item.AlgorithmName = TOOLKIT
        item.AlgorithmVersion = self.version
        item.AlgorithmParameters = ",".join(f"{key}={value}" for key, value in parameters.items())
        return item


@dataclass(frozen=True)
class WrittenDicom:
    """Result of writing a mask as one DICOM object.

    Attributes:
        kind: kind of the object.
        path: path of the file; None if the whole mask is empty, so that no file was written.
        organs: names of the organs in the file, in the order of their numbers, which start at 1.
        omitted: names of the organs without voxels, which are not in the file.
        warnings: what was left out of the file or corrected in it, because an element of the series is not valid.
    """

    kind: DicomKind
    path: Path | None
    organs: tuple[str, ...]
    omitted: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class NumberedOrgan:
    """An organ in the file: its number in the file, from 1, its label value in the mask, its code and its colour."""

    number: int
    name: str
    label: int
    code: OrganCode
    colour: tuple[int, int, int]


def present_organs(
    planes: NDArray[np.unsignedinteger], organs: Sequence[SegmentedOrgan]
) -> tuple[tuple[NumberedOrgan, ...], tuple[str, ...]]:
    """Return the organs that have voxels, numbered in the given order, and the names of the organs without voxels.

    Args:
        planes: label values ``[planes, rows, columns]``.
        organs: every organ of the mask.

    Raises:
        LabelError: the mask contains a label value that does not belong to an organ.
    """
    used = np.zeros(np.iinfo(planes.dtype).max + 1, bool)
    for plane in planes:
        used[plane] = True
    present = [organ for organ in organs if used[organ.label]]
    unknown = set(np.flatnonzero(used).tolist()) - {0} - {organ.label for organ in organs}
    if unknown:
        raise LabelError(
            f"The mask contains the label value {min(unknown)}, which does not belong to any of the given organs.",
            remedy="Give every organ of the mask with its label value.",
        )
    numbered = tuple(
        NumberedOrgan(number, organ.name, organ.label, organ_code(organ.name), organ_colour(number))
        for number, organ in enumerate(present, start=1)
    )
    return numbered, tuple(organ.name for organ in organs if not used[organ.label])


def copy_patient_and_study(source: Dataset, target: Dataset) -> None:
    """Copy the attributes of patient and study from the source to a dataset of the same study."""
    for keyword in ("SpecificCharacterSet", "StudyInstanceUID", *PATIENT_AND_STUDY):
        if keyword in source:
            target[keyword] = source[keyword]
        elif keyword in MAY_BE_EMPTY:
            setattr(target, keyword, "")


def name_private_codes(dataset: Dataset, organs: Sequence[NumberedOrgan]) -> None:
    """Declare the private coding scheme if an organ has a code of that scheme (PS3.3 section C.12.1)."""
    if any(organ.code.private for organ in organs):
        scheme = Dataset()
        scheme.CodingSchemeDesignator = PRIVATE_SCHEME
        scheme.CodingSchemeName = "Names of organs given by users of fseft-edge"
        dataset.CodingSchemeIdentificationSequence = [scheme]


def write_instance(path: Path, dataset: Dataset) -> None:
    """Set the UIDs of a complete dataset and write it. Equal content gives equal UIDs and equal bytes.

    The UIDs of instance, series and dimension organization are computed from a hash of everything else in the dataset:
    source images, mask, names, adapters, versions. Two files with the same SOP Instance UID are therefore identical.

    Raises:
        OutOfSpaceError: the disk is full or not writable.
    """
    dataset.SOPInstanceUID = dataset.SeriesInstanceUID = PENDING_UID
    dataset.file_meta.MediaStorageSOPInstanceUID = PENDING_UID
    for item in _dimension_items(dataset):
        item.DimensionOrganizationUID = PENDING_UID
    content = BytesIO()
    dataset.save_as(content, enforce_file_format=True)
    digest = hashlib.sha256(content.getbuffer()).hexdigest()
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[digest, "instance"])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[digest, "series"])
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    for item in _dimension_items(dataset):
        item.DimensionOrganizationUID = generate_uid(entropy_srcs=[digest, "dimensions"])
    with atomic_path(path) as temporary:
        dataset.save_as(temporary, enforce_file_format=True)


def _dimension_items(dataset: Dataset) -> Iterator[Dataset]:
    for keyword in ("DimensionOrganizationSequence", "DimensionIndexSequence"):
        yield from dataset.get(keyword, ())
