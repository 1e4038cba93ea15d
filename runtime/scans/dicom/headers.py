"""Headers of DICOM images: identity, position, pixel format and rescale of each slice.

Single-frame images contain these attributes at the top level. Enhanced multi-frame images contain them in functional
groups: one item for each frame, and one item that all frames share (PS3.3 C.7.6.16). Pixel data are not read.

A wrong value does not make a file unreadable: it becomes a :class:`Fault` of the slice, which names the element.
Whether the fault matters is decided for the whole series.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import UID

from fseft_edge.runtime.scans.dicom.elements import (
    Elements,
    Encoding,
    Header,
    PixelLocation,
    Value,
    element_name,
    open_data_set,
    read_elements,
    read_encoding,
)
from fseft_edge.runtime.scans.dicom.files import DicomFile

# Warnings and log messages of pydicom quote header values, which can be the name of a patient.
warnings.filterwarnings("ignore", module=r"pydicom\b")
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTI_FRAME_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
"""Enhanced CT, and Legacy Converted Enhanced CT (PS3.4 B.5)."""

_DICOMDIR = "1.2.840.10008.1.3.10"

_SALT = secrets.token_bytes(16)

_FUNCTIONAL_GROUPS = (
    *("PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence"),
    *("PixelValueTransformationSequence", "CTImageFrameTypeSequence", "CTReconstructionSequence"),
)
_KEYWORDS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality"),
    *("ImageType", "FrameType", "PatientID", "IssuerOfPatientID", "PatientName", "AnatomicalOrientationType"),
    *("ConvolutionKernel",),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "NumberOfFrames"),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "RescaleType"),
    *("GantryDetectorTilt", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *_FUNCTIONAL_GROUPS,
)
_TAG = {keyword: int(tag_for_keyword(keyword) or 0) for keyword in _KEYWORDS}
_WANTED = frozenset(_TAG.values())

_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?")
_INTEGERS = {"": "H", "US": "H", "SS": "h", "OW": "H", "UN": "H", "UL": "I", "SL": "i"}
_FLOATS = {"FL": "f", "FD": "d"}
_TEXTS = frozenset({"", "UN", "DS", "IS", "LO", "SH", "CS", "ST", "LT", "UT", "UC"})
"""Value representations of numbers as text; an empty one is unknown."""
_MOST_NUMBERS = 16
_LARGEST = 1e9
"""Largest magnitude of a decimal number. Positions, spacings and rescales of a CT are far smaller."""

_HOUNSFIELD = ("", "HU", "US", "HOUNSFIELD", "HOUNSFIELDS", "HOUNSFIELDUNIT", "HOUNSFIELDUNITS", "UNSPECIFIED")
"""Letters of RescaleType for HU in capitals; ``US`` is the defined term for unspecified (PS3.3 C.11.1.1.2)."""


@dataclass(frozen=True)
class Fault:
    """A wrong value in a header.

    Attributes:
        keyword: keyword of the element.
        text: what is wrong, without the value, such as ``has 1 value instead of 2``.
    """

    keyword: str
    text: str

    def __str__(self) -> str:
        """Return the element with its tag, and what is wrong."""
        return f"{element_name(self.keyword)} {self.text}"


@dataclass(frozen=True)
class PixelFormat:
    """Pixel format of a slice and its conversion to HU (PS3.3 C.7.6.3 and C.11.1).

    Attributes:
        photometric: PhotometricInterpretation; with ``MONOCHROME2``, larger values are brighter.
        samples: SamplesPerPixel, the number of values for each pixel.
        allocated: BitsAllocated, the number of bits of memory for each value.
        stored: BitsStored, the number of bits that contain the value.
        high_bit: HighBit, the position of the highest bit of the value.
        signed: True if values are in two's complement.
        padding: ranges of padding values as written in the file: PixelPaddingValue and PixelPaddingRangeLimit, or
            PixelPaddingValue twice if there is no range limit; usually one range; empty if the slice has no padding.
        rescale: RescaleSlope and RescaleIntercept; None if one is missing.
        hounsfield: True if RescaleType is HU, unspecified or missing.
        table: True if a lookup table (ModalityLUTSequence) replaces the rescale.
    """

    photometric: str
    samples: int
    allocated: int
    stored: int
    high_bit: int
    signed: bool
    padding: tuple[tuple[int, int], ...]
    rescale: tuple[float, float] | None
    hounsfield: bool
    table: bool


@dataclass(frozen=True)
class SliceHeader:
    """Header of one slice.

    Attributes:
        file: location of the DICOM file.
        frame: index of the slice among the frames of the file, from 0.
        frames: number of frames in the file.
        sop_class: SOP class UID of the DICOM object; that of the file meta information if missing; CT Image if both
            are missing and the modality is CT.
        syntax: transfer syntax UID (the encoding) of the file; guessed if missing.
        series_uid: SeriesInstanceUID; empty if missing.
        study_uid: StudyInstanceUID; empty if missing.
        frame_of_reference_uid: FrameOfReferenceUID; empty if missing.
        patient: anonymous key that is equal for all images of one patient.
        modality: modality, such as ``CT``; also ``CT`` if missing in an image of a CT SOP class.
        image_type: values of ImageType, such as ``ORIGINAL``, ``PRIMARY``, ``AXIAL``.
        kernel: ConvolutionKernel; empty if missing.
        quadruped: True if the coordinates refer to the anatomy of a four-footed animal.
        rows: number of rows of the pixel matrix; 0 if missing or invalid.
        columns: number of columns of the pixel matrix; 0 if missing or invalid.
        spacing: distance between rows and distance between columns in mm; None if missing or invalid.
        orientation: direction cosines of a row and of a column, LPS+; None if missing or invalid.
        position: centre of the first pixel in mm, LPS+; None if missing or invalid.
        tilt: GantryDetectorTilt in degrees; None if missing or invalid.
        pixels: pixel format of the slice.
        location: place of the pixel data in the file.
        faults: wrong values.
        assumptions: what was assumed to read the slice, each a sentence for :attr:`Volume.warnings` whose subject is
            the slice.
        sop_instance_uid: SOP Instance UID; empty if missing.
    """

    file: DicomFile = field(repr=False)
    frame: int
    frames: int
    sop_class: str
    syntax: str
    series_uid: str
    study_uid: str
    frame_of_reference_uid: str
    patient: bytes = field(repr=False)
    modality: str
    image_type: tuple[str, ...]
    kernel: str
    quadruped: bool
    rows: int
    columns: int
    spacing: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    tilt: float | None
    pixels: PixelFormat
    location: PixelLocation
    faults: tuple[Fault, ...]
    assumptions: tuple[str, ...]
    sop_instance_uid: str = field(default="", compare=False)

    @property
    def placed(self) -> bool:
        """False if the image states neither a position nor an orientation, as a screenshot or a report page."""
        wrong = {"ImagePositionPatient", "ImageOrientationPatient"} & self.bad
        return bool(self.position or self.orientation or wrong)

    @property
    def bad(self) -> set[str]:
        """Keywords of :attr:`faults`."""
        return {fault.keyword for fault in self.faults}


@dataclass(frozen=True)
class UnreadableImage:
    """A DICOM file whose header is damaged, so that its slices are unknown.

    Attributes:
        damage: what is wrong, with the name of the element if it is known.
        sop_class: SOP class UID; empty if unknown.
        modality: modality; empty if unknown.
        series_uid: SeriesInstanceUID; empty if unknown.
    """

    damage: str
    sop_class: str
    modality: str
    series_uid: str

    @property
    def may_be_ct(self) -> bool:
        """False if the file is known to be no CT image."""
        return self.sop_class in ("", CT_IMAGE, *MULTI_FRAME_CT) and self.modality in ("", "CT")


@dataclass(frozen=True)
class NoImage:
    """A DICOM object without image, such as a DICOMDIR or a report.

    Attributes:
        series_uid: SeriesInstanceUID; empty if missing.
    """

    series_uid: str


def read_slices(file: DicomFile, stream: BinaryIO) -> tuple[SliceHeader, ...] | UnreadableImage | NoImage:
    """Return the headers of all slices in a DICOM file, or the reason why there are none.

    Args:
        file: location of the file, for the result.
        stream: the file, open for reading at its start.
    """
    try:
        encoding = read_encoding(stream)
    except EOFError:
        return UnreadableImage("the file ends within its file meta information", "", "", "")
    header = read_elements(stream, encoding, _WANTED)
    elements = _Reader([header.elements], encoding)
    named = _uid_text(encoding.meta.get(0x00020002))
    sop_class, modality = elements.text("SOPClassUID") or named, elements.text("Modality").upper()
    series_uid = elements.text("SeriesInstanceUID")
    is_other = sop_class not in ("", CT_IMAGE, *MULTI_FRAME_CT) and (sop_class == named or modality not in ("", "CT"))
    if not header.damage and header.pixels is None and is_other:
        return NoImage(series_uid)
    if not sop_class and modality == "CT":
        sop_class = CT_IMAGE
    frames = elements.whole("NumberOfFrames", 1)
    groups = _groups(header.elements, sop_class)
    damage = header.damage
    if not damage and header.pixels is None:
        damage = f"there is no {element_name('PixelData')}"
    elif not damage and (frames < 1 or elements.faults):
        damage = f"{element_name('NumberOfFrames')} is invalid"
    elif not damage and sop_class in MULTI_FRAME_CT and len(groups) != frames:
        damage = f"{element_name('PerFrameFunctionalGroupsSequence')} has {len(groups)} items instead of {frames}"
    if damage or header.pixels is None:
        return UnreadableImage(damage, sop_class, modality, series_uid)
    return tuple(
        _slice(file, header, header.pixels, group, sop_class, frame=frame, frames=frames)
        for frame, group in enumerate(groups)
    )


def read_header(stream: BinaryIO) -> Dataset:
    """Read all elements of the header of a DICOM file, without pixel data. Decimal commas become decimal points.

    Args:
        stream: the file, open for reading at its start.

    Raises:
        Exception: the header cannot be read.
    """
    encoding = read_encoding(stream)
    data_set = open_data_set(stream, encoding)
    header = read_dataset(
        data_set, encoding.implicit, encoding.little_endian, stop_when=lambda tag, _, __: tag >> 16 == 0x7FE0
    )
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = UID(encoding.syntax)
    stream.seek(0)
    start = 132 if stream.read(132)[128:] == b"DICM" else 0
    stream.seek(start)
    if encoding.start > start:
        implicit = not encoding.meta or all(not value.vr for value in encoding.meta.values())
        meta = read_dataset(stream, implicit, is_little_endian=True, stop_when=_after_file_meta)
        header.file_meta.update(meta)
    _use_decimal_points(header)
    return header


def _use_decimal_points(header: Dataset) -> None:
    """Replace decimal commas in the elements that describe the geometry, as :func:`read_slices` reads them."""
    for keyword in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"):
        raw: object = header.get_item(keyword)
        if isinstance(raw, RawDataElement) and raw.value and b"," in raw.value:
            header[keyword] = raw._replace(value=raw.value.replace(b",", b"."))
    for sequence in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", *_FUNCTIONAL_GROUPS):
        for item in header.get(sequence) or ():
            _use_decimal_points(item)


def _after_file_meta(tag: BaseTag, vr: str | None, length: int) -> bool:  # noqa: ARG001 - pydicom defines the signature
    return tag >> 16 != 2


def _groups(elements: Elements, sop_class: str) -> list[list[Elements]]:
    """Return, for each frame, the elements that can describe it, the most specific first."""
    if sop_class not in MULTI_FRAME_CT:
        return [[elements]]  # other multi-frame images are refused later, so one slice is enough
    per_frame = elements.get(_TAG["PerFrameFunctionalGroupsSequence"], Value("SQ", None))
    shared = elements.get(_TAG["SharedFunctionalGroupsSequence"], Value("SQ", None)).items
    common = [item for group in shared for item in _macros(group)]
    return [[*_macros(group), *common, elements] for group in per_frame.items]


def _macros(group: Elements) -> list[Elements]:
    values = (group.get(_TAG[keyword]) for keyword in _FUNCTIONAL_GROUPS)
    return [value.items[0] for value in values if value is not None and value.items]


def _slice(
    file: DicomFile,
    header: Header,
    location: PixelLocation,
    groups: Sequence[Elements],
    sop_class: str,
    *,
    frame: int,
    frames: int,
) -> SliceHeader:
    read = _Reader(groups, header.encoding)
    modality = read.text("Modality").upper()
    if not read.text("SOPClassUID"):
        read.assumed("SOPClassUID", "is missing: the images are read as CT images")
    if not modality and sop_class in (CT_IMAGE, *MULTI_FRAME_CT):
        modality = "CT"
        read.assumed("Modality", "is missing: the images are read as CT images because of their SOP class")
    if not header.encoding.stated:
        order = "little" if header.encoding.little_endian else "big"
        read.assumed(0x00020010, f"is missing: the images are read as uncompressed, in {order}-endian byte order")
    pixels = _pixel_format(read)
    frame_of_reference_uid, study_uid = read.text("FrameOfReferenceUID"), read.text("StudyInstanceUID")
    spacing = read.numbers("PixelSpacing", 2)
    if spacing is not None and min(spacing) <= 0:
        read.fault("PixelSpacing", "is not positive")
    orientation, position = read.numbers("ImageOrientationPatient", 6), read.numbers("ImagePositionPatient", 3)
    tilt = read.numbers("GantryDetectorTilt", 1, optional=True)
    rows, columns = read.whole("Rows"), read.whole("Columns")
    return SliceHeader(
        file=file,
        frame=frame,
        frames=frames,
        sop_class=sop_class,
        syntax=header.encoding.syntax,
        sop_instance_uid=read.text("SOPInstanceUID"),
        series_uid=read.text("SeriesInstanceUID"),
        study_uid=study_uid,
        frame_of_reference_uid=frame_of_reference_uid,
        patient=_patient(read),
        modality=modality,
        image_type=tuple(
            part.strip().upper()
            for part in (read.text("FrameType") or read.text("ImageType")).split("\\")
            if part.strip()
        ),
        kernel=_printable(read.text("ConvolutionKernel")),
        quadruped=read.text("AnatomicalOrientationType").upper() == "QUADRUPED",
        rows=rows,
        columns=columns,
        spacing=spacing,
        orientation=orientation,
        position=position,
        tilt=tilt[0] if tilt else None,
        pixels=pixels,
        location=location,
        faults=tuple(dict.fromkeys(read.faults)),
        assumptions=tuple(dict.fromkeys(read.assumptions)),
    )


def _pixel_format(read: _Reader) -> PixelFormat:
    slope, intercept = read.numbers("RescaleSlope", 1), read.numbers("RescaleIntercept", 1)
    allocated = read.whole("BitsAllocated")
    stored = read.whole("BitsStored", 0)
    if not stored and allocated and not read.has("BitsStored"):
        stored = allocated
        read.assumed("BitsStored", "is missing: all allocated bits are read")
    unit = "".join(character for character in read.text("RescaleType").upper() if character.isalnum())
    return PixelFormat(
        photometric=_printable(read.text("PhotometricInterpretation")),
        samples=read.whole("SamplesPerPixel", 1),
        allocated=allocated,
        stored=stored,
        high_bit=read.whole("HighBit", stored - 1),
        signed=read.whole("PixelRepresentation", 0) == 1,
        padding=_padding(read),
        rescale=None if slope is None or intercept is None else (slope[0], intercept[0]),
        hounsfield=unit in _HOUNSFIELD,
        table=read.has_items("ModalityLUTSequence"),
    )


def _padding(read: _Reader) -> tuple[tuple[int, int], ...]:
    """Return the ranges of padding values: the first value with the range limit, and each further value by itself."""
    values, limits = read.integers("PixelPaddingValue"), read.integers("PixelPaddingRangeLimit")
    for keyword, found in (("PixelPaddingValue", values), ("PixelPaddingRangeLimit", limits)):
        if len(set(found)) > 1:
            read.assumed(keyword, "has several values instead of one: each value counts as padding")
    if not values:
        return ()
    first = (values[0], limits[0] if limits else values[0])
    return tuple(dict.fromkeys([first, *((value, value) for value in (*values[1:], *limits[1:]))]))


def _patient(read: _Reader) -> bytes:
    """Return a hash of the patient identity. Its salt differs in each run, so the hash only allows comparisons."""
    name = " ".join(read.text("PatientName").casefold().replace("^", " ").split())
    identity = (read.text("PatientID"), read.text("IssuerOfPatientID"), name)
    return hashlib.sha256(_SALT + "\0".join(identity).encode("utf-8", "surrogatepass")).digest()


def _uid_text(value: Value | None) -> str:
    return (value.data or b"").decode("ascii", "replace").strip(" \0") if value is not None else ""


def _printable(text: str) -> str:
    """Return at most 32 printable ASCII characters of a code word, such as the name of a kernel."""
    return "".join(character for character in text if character.isascii() and character.isprintable())[:32]


class _Reader:
    """Conversion of the elements of one slice to text and numbers; wrong values become faults.

    Args:
        groups: elements that can describe the slice, the most specific first.
        encoding: encoding of the file.
    """

    def __init__(self, groups: Sequence[Elements], encoding: Encoding) -> None:
        self._groups, self._order = groups, "<" if encoding.little_endian else ">"
        self.faults: list[Fault] = []
        self.assumptions: list[str] = []

    def fault(self, keyword: str, text: str) -> None:
        self.faults.append(Fault(keyword, text))

    def assumed(self, keyword: str | int, text: str) -> None:
        self.assumptions.append(f"{element_name(keyword)} {text}.")

    def has(self, keyword: str) -> bool:
        return any(True for _ in self._all(keyword))

    def has_items(self, keyword: str) -> bool:
        return any(bool(value.items) for value in self._all(keyword))

    def text(self, keyword: str) -> str:
        for value in self._all(keyword):
            data = value.data or b""
            try:
                found = data.decode("utf-8")
            except UnicodeDecodeError:
                found = data.decode("latin-1")
            if found := found.strip(" \0"):
                return found
        return ""

    def whole(self, keyword: str, missing: int | None = None) -> int:
        """Return a whole number; 0 with a fault if it is invalid, or missing without a default value."""
        values = self.integers(keyword)
        if len(values) == 1:
            return values[0]
        if values:
            self.fault(keyword, f"has {len(values)} values instead of 1")
        elif keyword not in {fault.keyword for fault in self.faults}:
            if missing is not None:
                return missing
            self.fault(keyword, "is missing")
        return 0

    def integers(self, keyword: str) -> tuple[int, ...]:
        """Return whole numbers; empty if the element is missing or invalid."""
        value = self._value(keyword)
        if value is None or not value.data:
            return ()
        kind = _INTEGERS.get(value.vr)
        if kind is None and value.vr not in _TEXTS:
            self.fault(keyword, "has a wrong value representation")
            return ()
        if kind is None or keyword == "NumberOfFrames":  # text, also if the encoding has no value representations
            numbers = self._decimals(keyword, value)
            if numbers is not None and all(number == int(number) for number in numbers):
                return tuple(int(number) for number in numbers)
            if numbers is not None:
                self.fault(keyword, "is no whole number")
            return ()
        size = struct.calcsize(kind)
        if len(value.data) % size or len(value.data) // size > _MOST_NUMBERS:
            self.fault(keyword, f"has {len(value.data)} bytes")
            return ()
        return struct.unpack(f"{self._order}{len(value.data) // size}{kind}", value.data)

    def numbers(self, keyword: str, count: int, *, optional: bool = False) -> tuple[float, ...] | None:
        """Return decimal numbers; None if the element is missing or invalid."""
        value = self._value(keyword, optional=optional)
        if value is None or not value.data or (value.vr not in _FLOATS and not value.data.strip(b" \0")):
            return None
        numbers = self._decimals(keyword, value, optional=optional)
        if numbers is not None and len(numbers) != count:
            if not optional:
                self.fault(keyword, f"has {len(numbers)} value{'s' * (len(numbers) != 1)} instead of {count}")
            return None
        return numbers

    def _decimals(self, keyword: str, value: Value, *, optional: bool = False) -> tuple[float, ...] | None:
        data = value.data or b""
        if value.vr not in _FLOATS and value.vr not in _TEXTS:
            if not optional:
                self.fault(keyword, "has a wrong value representation")
            return None
        numbers: tuple[float, ...] | None = None
        if kind := _FLOATS.get(value.vr):
            size = struct.calcsize(kind)
            if len(data) % size == 0 and len(data) // size <= _MOST_NUMBERS:
                numbers = struct.unpack(f"{self._order}{len(data) // size}{kind}", data)
        else:
            numbers = self._from_text(keyword, data)
        if numbers is None or not all(abs(number) <= _LARGEST for number in numbers):  # also false for NaN
            if not optional:
                self.fault(keyword, "is no number" if numbers is None else "is not finite or too large")
            return None
        return numbers

    def _from_text(self, keyword: str, data: bytes) -> tuple[float, ...] | None:
        text = data.decode("latin-1").rstrip(" \0")  # a zero byte within a value is no padding
        parts = [part.strip(" \t\r\n") for part in text.split("\\", _MOST_NUMBERS)]
        if len(parts) > _MOST_NUMBERS or not all(len(part) <= 64 and _NUMBER.fullmatch(part) for part in parts):
            return None
        if any("," in part for part in parts):
            self.assumed(keyword, "has decimal commas, which are read as decimal points")
        return tuple(float(part.replace(",", ".")) for part in parts)

    def _value(self, keyword: str, *, optional: bool = False) -> Value | None:
        """Return the first value that is not empty; None with a fault if it is unusable."""
        for value in self._all(keyword):
            if value.repeated or value.data is None:
                if not optional:
                    text = "occurs several times with different values" if value.repeated else "is too long"
                    self.fault(keyword, text)
                return None
            if value.data.strip(b" \0") or value.vr in _INTEGERS or value.vr in _FLOATS:
                return value
        return None

    def _all(self, keyword: str) -> Iterator[Value]:
        tag = _TAG[keyword]
        return (group[tag] for group in self._groups if tag in group)
