"""What a Segmentation and an RT Structure Set have in common: whose it is, what made it, its UIDs, its file."""

from __future__ import annotations

import colorsys
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
from fseft_edge.runtime.errors import LabelError
from fseft_edge.runtime.system.atomic import atomic_path

if TYPE_CHECKING:
    from fseft_edge.adapters.file import AdapterFile
    from fseft_edge.masks.result import SegmentedOrgan

TOOLKIT: Final = "fseft-edge"
DicomKind = Literal["seg", "rtstruct"]

SERIES_NUMBERS: Final[dict[DicomKind, int]] = {"seg": 9901, "rtstruct": 9902}
"""Far from those that a scanner gives, so that results stand at the end of a study."""

PENDING_UID: Final = UID("2.25.0")
"""Stands in for a UID that is derived from the content once that is complete."""

_PATIENT_AND_STUDY: Final = (
    "SpecificCharacterSet",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "StudyDescription",
)
_REQUIRED: Final = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
)
"""Type 2 in the Patient and General Study modules (PS3.3 C.7.1.1, C.7.2.1): there, though perhaps empty."""


@dataclass(frozen=True)
class SegmentationAlgorithm:
    """What made a mask, as its DICOM objects tell it.

    Attributes:
        encoder_id: of the encoder bundle.
        adapters: of each organ, by name, the sha256 of the adapter file that it came from.
        transductive: whether the adapters were refitted to the scan.
        version: of the toolkit.
    """

    encoder_id: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    transductive: bool = False
    version: str = __version__

    @classmethod
    def of(cls, encoder_id: str, files: Sequence[AdapterFile], *, transductive: bool = False) -> SegmentationAlgorithm:
        """Return the algorithm that these adapters on this encoder are."""
        adapters = {organ.name: file.sha256 or "" for file in files for organ in file.description.organs}
        return cls(encoder_id, adapters, transductive)

    def item(self, organ: str) -> Dataset:
        """Return an item of the Algorithm Identification Macro (PS3.3 section 10.16) for one organ."""
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
    """What became of a mask as one DICOM object.

    Attributes:
        kind: which object.
        path: the file; None where the whole mask is empty and no file was written.
        organs: names of those in the file, in the order of their numbers in it, from 1.
        omitted: names of organs without a voxel, which the file does not mention.
    """

    kind: DicomKind
    path: Path | None
    organs: tuple[str, ...]
    omitted: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class NumberedOrgan:
    """An organ that goes into the file: its number there, from 1, its label in the mask, its code and its colour."""

    number: int
    name: str
    label: int
    code: OrganCode
    colour: tuple[int, int, int]


def present_organs(
    planes: NDArray[np.unsignedinteger], organs: Sequence[SegmentedOrgan]
) -> tuple[tuple[NumberedOrgan, ...], tuple[str, ...]]:
    """Return the organs that have a voxel, numbered in the order given, and the names of those that have none.

    Args:
        planes: label values ``[planes, rows, columns]``.
        organs: every organ of the mask.

    Raises:
        LabelError: the mask holds a value that is no organ's.
    """
    held = np.zeros(np.iinfo(planes.dtype).max + 1, bool)
    for plane in planes:
        held[plane] = True
    present = [organ for organ in organs if held[organ.label]]
    unknown = set(np.flatnonzero(held).tolist()) - {0} - {organ.label for organ in organs}
    if unknown:
        raise LabelError(
            f"The mask holds the value {min(unknown)}, which stands for no organ.",
            remedy="Give every organ of the mask, each with its label.",
        )
    numbered = tuple(
        NumberedOrgan(number, organ.name, organ.label, organ_code(organ.name), _colour(number))
        for number, organ in enumerate(present, start=1)
    )
    return numbered, tuple(organ.name for organ in organs if not held[organ.label])


def copy_patient_and_study(source: Dataset, target: Dataset) -> None:
    """Put the source's patient and study into a dataset, unchanged: the new object belongs to the same ones."""
    for keyword in _PATIENT_AND_STUDY:
        if keyword in source:
            target[keyword] = source[keyword]
        elif keyword in _REQUIRED:
            setattr(target, keyword, "")


def name_private_codes(dataset: Dataset, organs: Sequence[NumberedOrgan]) -> None:
    """Say whose the private coding scheme is, where a code of it is used (PS3.3 C.12.1)."""
    if any(organ.code.private for organ in organs):
        scheme = Dataset()
        scheme.CodingSchemeDesignator = PRIVATE_SCHEME
        scheme.CodingSchemeName = "Names of organs given by users of fseft-edge"
        dataset.CodingSchemeIdentificationSequence = [scheme]


def write_instance(path: Path, dataset: Dataset) -> None:
    """Give a finished dataset its UIDs and write it; the same content gives the same UIDs and the same bytes.

    The UIDs of instance, series and dimension organization come from a hash of all else in the dataset: source images,
    mask, names, adapters, versions. So two files of one SOP Instance UID never differ.

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


def _colour(number: int) -> tuple[int, int, int]:
    """Return a colour that is far from those of the numbers before it: hues a golden section apart."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(number * 0.618034 % 1.0, 0.75, 1.0))
    return red, green, blue
