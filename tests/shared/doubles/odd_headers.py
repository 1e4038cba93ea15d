"""Changes of DICOM headers that scanners, archives and anonymisers are known to make, and DICOM does not allow.

Every secret value contains ``Secretname`` or ``1949``, so that a test can find it in messages and results.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from doubles.dicom import Change


def raw(keyword: str, value: bytes) -> Change:
    """Return a change that puts bytes into an element of every slice, without any check."""

    def change(dataset: Dataset, _: int) -> None:
        put(dataset, keyword, value)

    return change


def put(dataset: Dataset, keyword: str, value: bytes) -> None:
    """Put bytes into an element, without any check."""
    tag = Tag(tag_for_keyword(keyword) or 0)
    even = value + b" " * (len(value) % 2)
    dataset._dict[tag] = RawDataElement(tag, dictionary_VR(tag), len(even), even, 0, False, True)


def without(keyword: str) -> Change:
    """Return a change that deletes an element."""

    def change(dataset: Dataset, _: int) -> None:
        del dataset[keyword]

    return change


def both(*changes: Change) -> Change:
    """Return several changes as one."""

    def change(dataset: Dataset, place: int) -> None:
        for one in changes:
            one(dataset, place)

    return change


def _same_instance(dataset: Dataset, _: int) -> None:
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.826.0.1.1949"


LEFT_OUT: dict[str, tuple[Change, Sequence[str]]] = {
    "a date that does not exist": (raw("StudyDate", b"19490231"), ["StudyDate (0008,0020)"]),
    "a date in words": (raw("StudyDate", b"Secretname"), ["StudyDate (0008,0020)"]),
    "two dates": (raw("StudyDate", b"19490101\\19490102"), ["StudyDate (0008,0020)"]),
    "a time in words": (raw("StudyTime", b"Secretname"), ["StudyTime (0008,0030)"]),
    "a date of birth in words": (raw("PatientBirthDate", b"Secretname"), ["PatientBirthDate (0010,0030)"]),
    "a sex in words": (raw("PatientSex", b"Secretname"), ["PatientSex (0010,0040)"]),
    "a slice thickness with its unit": (raw("SliceThickness", b"1949mm"), ["SliceThickness (0018,0050)"]),
    "a compression ratio in words": (
        both(raw("LossyImageCompression", b"01"), raw("LossyImageCompressionRatio", b"Secretname")),
        ["LossyImageCompressionRatio (0028,2112)"],
    ),
    "a study ID that is too long": (raw("StudyID", b"Secretname" * 4), ["StudyID (0020,0010)"]),
    "an accession number that is too long": (raw("AccessionNumber", b"Secretname" * 4), ["AccessionNumber"]),
    "an unknown character set": (
        both(raw("SpecificCharacterSet", b"KOI8-R-X"), raw("PatientName", b"Secretname\xcd")),
        ["SpecificCharacterSet (0008,0005)", "PatientName (0010,0010)"],
    ),
    "bytes of another character set": (
        both(raw("SpecificCharacterSet", b"ISO_IR 192"), raw("PatientName", b"Secretname\xfc")),
        ["PatientName (0010,0010)"],
    ),
    "an identity in words": (raw("PatientIdentityRemoved", b"SECRETNAME"), ["PatientIdentityRemoved (0012,0062)"]),
    "a series date in words": (raw("SeriesDate", b"Secretname"), ["SeriesDate (0008,0021)"]),
    "a UID with a leading zero": (raw("StudyInstanceUID", b"1.2.0826.1949"), ["StudyInstanceUID (0020,000D)"]),
}
"""Changes that a DICOM result survives, with the elements that a warning names."""

REFUSED: dict[str, tuple[Change, str]] = {
    "no study UID": (without("StudyInstanceUID"), "StudyInstanceUID"),
    "no frame of reference": (without("FrameOfReferenceUID"), "FrameOfReferenceUID"),
    "a study UID with letters": (raw("StudyInstanceUID", b"1.2.Secretname"), "StudyInstanceUID (0020,000D)"),
    "a study UID that is too long": (raw("StudyInstanceUID", b"1." * 32 + b"1949"), "StudyInstanceUID (0020,000D)"),
    "a frame of reference in words": (raw("FrameOfReferenceUID", b"Secretname"), "FrameOfReferenceUID (0020,0052)"),
    "one instance UID for all slices": (_same_instance, "SOPInstanceUID (0008,0018)"),
}
"""Changes after which a DICOM result cannot refer to its series, with the element that the refusal names."""
