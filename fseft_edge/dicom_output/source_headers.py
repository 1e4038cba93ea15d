"""The headers of a CT series as DICOM results need them: valid elements only, checked before the segmentation.

Scanners, archives and anonymisers write values that DICOM does not allow, such as the date ``2020-01-01``. An element
that a result does not need is left out, or left empty, with a warning. An element without which a result cannot refer
to its series is refused. No message contains a value, because a value can identify the patient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import numpy as np
from pydicom import charset, config
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.valuerep import DSfloat, validate_value

from fseft_edge.dicom_output.source_planes import SourceSeries
from fseft_edge.runtime.errors import GeometryError, InputError
from fseft_edge.runtime.scans.volume import Volume

PATIENT_AND_STUDY: Final = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "StudyDescription",
)
"""Elements of the Patient and General Study modules that are copied, besides StudyInstanceUID."""

MAY_BE_EMPTY: Final = (
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
"""Type 2 in the Patient and General Study modules (PS3.3 C.7.1.1, C.7.2.1): must be present, but may be empty."""

_OTHERS: Final = ("PositionReferenceIndicator", "SeriesDate", "SeriesTime", "LossyImageCompression")
_UIDS: Final = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
_DEFINED_TERMS: Final = {
    "PatientSex": {"M", "F", "O"},
    "PatientIdentityRemoved": {"YES", "NO"},
    "LossyImageCompression": {"00", "01"},
}
_PLACEMENT: Final = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
_GROUPS: Final = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
_LONGEST_UID, _LONGEST_DS = 64, 16
_REMEDY: Final = "Correct this element in the files of the series, or segment the series without --dicom."


@dataclass(frozen=True, eq=False)
class SourceHeaders:
    """The headers of a series with the elements that a DICOM result needs, all of them valid.

    Attributes:
        images: one header for each image, without pixel data, in the order of the given headers.
        warnings: what was left out or corrected, one sentence for each element.
    """

    images: tuple[Dataset, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, headers: Iterable[Dataset]) -> SourceHeaders:
        """Return the valid elements of headers.

        Raises:
            InputError: a UID, or the size of an image, is not valid, or two images have the same SOPInstanceUID.
            GeometryError: a position, an orientation or a pixel spacing is not valid.
        """
        warnings: dict[str, None] = {}
        images = tuple(_Cleaned(header, warnings).image() for header in headers)
        instances = [image.SOPInstanceUID for image in images if "SOPInstanceUID" in image]
        if len(set(instances)) < len(instances):
            raise InputError(
                f"Two images of the series have the same {_named('SOPInstanceUID')}, so a DICOM result cannot refer to "
                "one of them.",
                remedy=_REMEDY,
            )
        return cls(images, tuple(warnings))

    @classmethod
    def checked(cls, headers: Iterable[Dataset], scan: Volume) -> SourceHeaders:
        """Return the valid elements of headers, after a check that a mask of the scan can refer to these images.

        Raises:
            InputError: a UID is missing or not valid, the size of an image is not valid, or the headers do not belong
                to one series.
            GeometryError: an element of the geometry is missing or not valid, or the lattices differ.
        """
        found = cls.of(headers)
        empty = np.broadcast_to(np.zeros((), np.uint8), scan.shape)
        SourceSeries.of(found.images, scan.label_map(empty))
        return found


class _Cleaned:
    """One header, and the warnings about its elements."""

    def __init__(self, header: Dataset, warnings: dict[str, None]) -> None:
        self._header = header
        self._warnings = warnings
        self._ascii_only = False

    def image(self) -> Dataset:
        kept = Dataset()
        self._copy_character_set(kept)
        for keyword in _UIDS:
            self._copy_uid(kept, keyword)
        for keyword in ("Rows", "Columns"):
            self._copy_size(kept, keyword)
        for keyword in (*PATIENT_AND_STUDY, *_OTHERS):
            self._copy(kept, keyword)
        self._copy_lossy_compression(kept)
        if "PerFrameFunctionalGroupsSequence" in self._header:
            self._copy_size(kept, "NumberOfFrames")
            for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
                if keyword in self._header:
                    setattr(kept, keyword, [self._group(item) for item in self._header[keyword].value])
        else:
            self._copy_placement(self._header, kept)
        return kept

    def _warn(self, keyword: str, consequence: str) -> None:
        self._warnings[f"{_named(keyword)} of the scan is not a valid DICOM value: {consequence}."] = None

    def _copy_character_set(self, kept: Dataset) -> None:
        values = _values(self._header, "SpecificCharacterSet")
        if values is None or any(str(value) not in charset.python_encoding for value in values):
            self._ascii_only = True
            self._warn("SpecificCharacterSet", "texts that are not ASCII are left out of the DICOM results")
        elif values:
            kept["SpecificCharacterSet"] = self._header["SpecificCharacterSet"]

    def _copy_uid(self, kept: Dataset, keyword: str) -> None:
        values = _values(self._header, keyword)
        if values is not None and not values:
            return  # refused where the series is put together
        uid = str(values[0]).strip() if values is not None and len(values) == 1 else ""
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", uid) or len(uid) > _LONGEST_UID:
            raise InputError(
                f"The {_named(keyword)} of an image is not a valid UID, but a DICOM result has to contain this UID.",
                remedy=_REMEDY,
            )
        if re.search(r"(^|\.)0[0-9]", uid):
            self._warn(keyword, "a number in it begins with 0; the DICOM results contain the UID unchanged")
        _set(kept, keyword, uid)

    def _copy_size(self, kept: Dataset, keyword: str) -> None:
        values = _values(self._header, keyword)
        if values is not None and not values:
            return
        text = str(values[0]) if values is not None and len(values) == 1 else ""
        number = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0
        if number < 1:
            raise InputError(f"The {_named(keyword)} of an image is not a valid number.", remedy=_REMEDY)
        _set(kept, keyword, number)

    def _copy(self, kept: Dataset, keyword: str) -> None:
        """Copy an element; leave it out, or leave it empty if it has to be present, if its value is not valid."""
        if keyword not in self._header:
            return
        element = _element(self._header, keyword)
        if element is not None and self._is_valid(element, keyword):
            kept[keyword] = element
            return
        corrected = _corrected(element, keyword)
        if corrected is not None:
            self._warn(keyword, "it has another form in the DICOM results, with the same meaning")
            _set(kept, keyword, corrected)
        elif keyword in MAY_BE_EMPTY:
            self._warn(keyword, "it is empty in the DICOM results")
            _set(kept, keyword, "")
        else:
            self._warn(keyword, "it is not in the DICOM results")

    def _is_valid(self, element: DataElement, keyword: str) -> bool:
        if dictionary_VR(element.tag) != element.VR:
            return False
        if element.VR == "SQ":
            return all(
                inner is not None and self._is_valid(inner, inner.keyword)
                for item in element.value
                for inner in (_element(item, tag) for tag in item)
            )
        values = _as_list(element.value)
        if len(values) > 1 and keyword in (*PATIENT_AND_STUDY, *_OTHERS) and keyword != "DeidentificationMethod":
            return False
        return all(self._is_valid_value(element.VR, keyword, value) for value in values)

    def _is_valid_value(self, kind: str, keyword: str, value: object) -> bool:
        text = str(value)
        if "\N{REPLACEMENT CHARACTER}" in text or (self._ascii_only and not text.isascii()):
            return False
        if keyword in _DEFINED_TERMS and text and text not in _DEFINED_TERMS[keyword]:
            return False
        if kind == "DA" and text:
            return _is_date(text)
        try:
            validate_value(kind, text, config.RAISE)
        except Exception:  # the text of the error contains the value
            return False
        return kind != "TM" or "-" not in text

    def _copy_lossy_compression(self, kept: Dataset) -> None:
        for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            values = _values(self._header, keyword)
            if values is not None and not values:
                continue
            if keyword.endswith("Ratio"):
                numbers = _numbers(values)
                valid = numbers is not None and all(number > 0 for number in numbers)
                content: list[Any] = [_decimal(number) for number in numbers or ()]
            else:
                content = [str(value) for value in values or ()]
                valid = bool(content) and all(self._is_valid_value("CS", keyword, value) for value in content)
            if valid:
                _set(kept, keyword, content)
            else:
                self._warn(keyword, "it is not in the DICOM results")

    def _group(self, item: Dataset) -> Dataset:
        """Return the placement of a frame, or the placement that all frames share."""
        kept = Dataset()
        for keyword in _GROUPS:
            if item.get(keyword):
                placed = Dataset()
                self._copy_placement(item[keyword].value[0], placed)
                setattr(kept, keyword, [placed])
        return kept

    def _copy_placement(self, source: Dataset, kept: Dataset) -> None:
        for keyword, count in _PLACEMENT.items():
            values = _values(source, keyword)
            if values is not None and not values:
                continue  # refused where the series is put together
            numbers = _numbers(values)
            if numbers is None or len(numbers) != count:
                raise GeometryError(f"An image of the source series has no valid {_named(keyword)}.", remedy=_REMEDY)
            _set(kept, keyword, [_decimal(number) for number in numbers])
        values = _values(source, "SliceThickness")
        if values is None or values:
            numbers = _numbers(values)
            if numbers is not None and len(numbers) == 1 and numbers[0] > 0:
                _set(kept, "SliceThickness", _decimal(numbers[0]))
            else:
                self._warn("SliceThickness", "the distance of the slices is in its place in the DICOM results")


def _named(keyword: str) -> str:
    """Return an element as text: its keyword and its tag."""
    tag = tag_for_keyword(keyword) or 0
    return f"{keyword} ({tag >> 16:04X},{tag & 0xFFFF:04X})"


def _element(header: Dataset, key: str | BaseTag) -> DataElement | None:
    """Return an element with its value converted; None if pydicom cannot convert the value."""
    try:
        return header[key]
    except Exception:  # pydicom raises many kinds of exception, whose messages quote header values
        return None


def _values(header: Dataset, keyword: str) -> list[Any] | None:
    """Return the values of an element; an empty list if it is missing or empty; None if they cannot be converted."""
    if keyword not in header:
        return []
    element = _element(header, keyword)
    return None if element is None else _as_list(element.value)


def _as_list(value: object) -> list[Any]:
    if value is None or (isinstance(value, str | bytes) and not value):
        return []
    return list(value) if isinstance(value, MultiValue | list | tuple) else [value]


def _numbers(values: Sequence[Any] | None) -> list[float] | None:
    """Return values as finite numbers; None if one of them is none."""
    try:
        numbers = [float(value) for value in values or ()]
    except (TypeError, ValueError):
        return None
    return numbers if numbers and all(map(math.isfinite, numbers)) else None


def _decimal(number: float) -> DSfloat:
    """Return a number as a decimal string of at most 16 characters (VR DS), as exact as possible."""
    return DSfloat(number, auto_format=len(repr(number)) > _LONGEST_DS)


def _set(kept: Dataset, keyword: str, value: object) -> None:
    """Set an element whose value has been checked; pydicom would refuse a UID that contains leading zeros."""
    tag = tag_for_keyword(keyword)
    assert tag is not None  # noqa: S101 - every keyword in this module is in the dictionary
    kept[tag] = DataElement(tag, dictionary_VR(tag), value, validation_mode=config.IGNORE)


def _is_date(text: str) -> bool:
    if not re.fullmatch(r"[0-9]{8}", text):
        return False
    try:
        datetime.strptime(text, "%Y%m%d")
    except ValueError:
        return False
    return True


def _corrected(element: DataElement | None, keyword: str) -> str | None:
    """Return a date or time in the form of DICOM if it has another form without a second meaning; else None."""
    if element is None or not isinstance(element.value, str):
        return None
    text = element.value.strip()
    if keyword.endswith("Date") and (date := re.fullmatch(r"([0-9]{4})([-./])([0-9]{2})\2([0-9]{2})", text)):
        digits = f"{date[1]}{date[3]}{date[4]}"
        return digits if _is_date(digits) else None
    if keyword.endswith("Time") and (time := re.fullmatch(r"([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9])", text)):
        return f"{time[1]}{time[2]}{time[3]}"
    return None
