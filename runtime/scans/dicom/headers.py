"""What the header of a DICOM image says of its slices: identity, place, pixels and rescale.

Single-frame images say it in their top level, enhanced multi-frame images in functional groups, one item a frame and
one that all frames share (PS3.3 C.7.6.16). A header is read without its pixels.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from fseft_edge.runtime.scans.dicom.files import DicomFile

# What pydicom remarks on quotes values, which may be a person's name, on the terminal and in logs.
warnings.filterwarnings("ignore", module=r"pydicom\b")
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTI_FRAME_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
"""Enhanced CT, and CT that was made enhanced by conversion (PS3.4 B.5)."""

_PIXELS = {struct.pack(order, 0x7FE0, element) for order in ("<HH", ">HH") for element in (0x08, 0x09, 0x10)}
"""How the element begins at which a header ends: that of the pixels, (7FE0,0010), or of floats in their place."""

_DICOMDIR = "1.2.840.10008.1.3.10"

_SALT = secrets.token_bytes(16)

_TAGS = [
    *("SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality", "ImageType"),
    *("PatientID", "IssuerOfPatientID", "PatientName", "AnatomicalOrientationType", "ConvolutionKernel"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "NumberOfFrames"),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "RescaleType"),
    *("ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]


class DamagedHeaderError(Exception):
    """A DICOM file whose header cannot be made sense of; never leaves this package."""


@dataclass(frozen=True)
class PixelFormat:
    """How pixels are stored, and what turns them into HU (PS3.3 C.7.6.3 and C.11.1).

    Attributes:
        photometric: ``MONOCHROME2`` where larger is brighter.
        samples: values a pixel.
        allocated: bits that a value takes.
        stored: bits of them that hold it.
        high_bit: the highest of these.
        signed: whether they are two's complement.
        padding: the two ends of the values that stand for no measurement, as written; None where none do.
        rescale: slope and intercept; None where they are missing.
        unit: what the rescale gives, empty where that is not said.
        table: whether a table takes the place of the rescale.
    """

    photometric: str
    samples: int
    allocated: int
    stored: int
    high_bit: int
    signed: bool
    padding: tuple[int, int] | None
    rescale: tuple[float, float] | None
    unit: str
    table: bool


@dataclass(frozen=True)
class SliceHeader:
    """One slice, as its header describes it.

    Attributes:
        file: where it lies.
        frame: which of the file's frames it is, from 0.
        frames: how many there are.
        sop_class: what kind of DICOM object it is in.
        syntax: how that is encoded (the transfer syntax UID).
        series_uid: of the series.
        study_uid: of the study.
        frame_of_reference_uid: of the coordinate system; empty where not given.
        patient: what is equal for images of one patient and tells nothing else.
        modality: ``CT``, ...
        image_type: e.g. ``ORIGINAL``, ``PRIMARY``, ``AXIAL``.
        kernel: the convolution kernel; empty where not given.
        quadruped: whether coordinates follow the anatomy of an animal on four feet.
        rows: of the pixel matrix.
        columns: of the pixel matrix.
        spacing: mm between rows, mm between columns.
        orientation: direction cosines of a row, then of a column, LPS+.
        position: centre of the first pixel in mm, LPS+.
        pixels: how they are stored.
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
    pixels: PixelFormat


def read_slices(file: DicomFile, stream: BinaryIO) -> tuple[SliceHeader, ...]:
    """Describe the slices in a DICOM file; none in one that holds no image, such as a report or a DICOMDIR.

    Raises:
        DamagedHeaderError: the header is truncated or makes no sense.
    """
    try:
        header = read_header(stream, _TAGS)
        return tuple(_slices(file, header, has_pixels=stream.read(4) in _PIXELS))
    except DamagedHeaderError:
        raise
    except Exception:  # pydicom raises many kinds on bytes that are no header, some when a value is first looked at
        raise DamagedHeaderError from None


def read_header(stream: BinaryIO, tags: Sequence[str] | None = None) -> Dataset:
    """Read a DICOM file up to its pixels.

    Raises:
        DamagedHeaderError: its encoding is one that could unpack to any size.
        Exception: of pydicom's, where it cannot be read.
    """
    read_preamble(stream, force=False)
    start = stream.tell()
    meta = read_dataset(stream, is_implicit_VR=False, is_little_endian=True, stop_when=_behind_meta)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise DamagedHeaderError
    stream.seek(start - 132)
    return pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=None if tags is None else list(tags))


def _behind_meta(tag: BaseTag, vr: str | None, length: int) -> bool:  # noqa: ARG001 - the signature of pydicom's
    return tag >> 16 != 2


def _slices(file: DicomFile, header: Dataset, *, has_pixels: bool) -> Iterator[SliceHeader]:
    sop_class, named = _text(header, "SOPClassUID"), _text(header.file_meta, "MediaStorageSOPClassUID")
    if not has_pixels:
        # pydicom takes the end of a file for the end of its header, wherever that is, and within a value too.
        is_other = sop_class == named not in ("", CT_IMAGE, *MULTI_FRAME_CT)
        if is_other or (not sop_class and named == _DICOMDIR):
            return
        raise DamagedHeaderError
    frames = _whole(header, "NumberOfFrames", 1)
    for frame, groups in enumerate(_groups(header, sop_class, frames)):
        yield SliceHeader(
            file=file,
            frame=frame,
            frames=frames,
            sop_class=sop_class,
            syntax=str(header.file_meta.TransferSyntaxUID),
            series_uid=_demanded(header, "SeriesInstanceUID"),
            study_uid=_text(header, "StudyInstanceUID"),
            frame_of_reference_uid=_text(header, "FrameOfReferenceUID"),
            patient=_patient(header),
            modality=_text(header, "Modality").upper(),
            image_type=tuple(
                part.strip().upper() for part in _first(groups, "FrameType", "ImageType").split("\\") if part.strip()
            ),
            kernel=_printable(_first(groups, "ConvolutionKernel")),
            quadruped=_text(header, "AnatomicalOrientationType").upper() == "QUADRUPED",
            rows=_whole(header, "Rows"),
            columns=_whole(header, "Columns"),
            spacing=_numbers(groups, "PixelSpacing", 2),
            orientation=_numbers(groups, "ImageOrientationPatient", 6),
            position=_numbers(groups, "ImagePositionPatient", 3),
            pixels=_pixel_format(header, groups),
        )


def _groups(header: Dataset, sop_class: str, frames: int) -> Iterator[list[Dataset]]:
    """Yield where to look for what is said of a frame, the most specific first."""
    if sop_class not in MULTI_FRAME_CT:
        yield [header]  # of a multi-frame image of another kind one slice stands for all: it is refused
        return
    shared = [item for group in header.get("SharedFunctionalGroupsSequence", []) for item in _macros(group)]
    per_frame = header.get("PerFrameFunctionalGroupsSequence", [])
    if len(per_frame) != frames:
        raise DamagedHeaderError
    for group in per_frame:
        yield [*_macros(group), *shared, header]


def _macros(group: Dataset) -> list[Dataset]:
    return [element.value[0] for element in group if element.VR == "SQ" and element.value]


def _pixel_format(header: Dataset, groups: Sequence[Dataset]) -> PixelFormat:
    slope, intercept = _numbers(groups, "RescaleSlope", 1), _numbers(groups, "RescaleIntercept", 1)
    padding = _whole(header, "PixelPaddingValue") if header.get("PixelPaddingValue") is not None else None
    limit = _whole(header, "PixelPaddingRangeLimit") if header.get("PixelPaddingRangeLimit") is not None else padding
    allocated = _whole(header, "BitsAllocated", 0)
    stored = _whole(header, "BitsStored", 0)
    return PixelFormat(
        photometric=_printable(_text(header, "PhotometricInterpretation")),
        samples=_whole(header, "SamplesPerPixel", 1),
        allocated=allocated,
        stored=stored,
        high_bit=_whole(header, "HighBit", stored - 1),
        signed=_whole(header, "PixelRepresentation", 0) == 1,
        padding=None if padding is None or limit is None else (padding, limit),
        rescale=None if slope is None or intercept is None else (slope[0], intercept[0]),
        unit=_printable(_first(groups, "RescaleType")).upper(),
        table=bool(header.get("ModalityLUTSequence")),
    )


def _patient(header: Dataset) -> bytes:
    """Return a digest of who the patient is; its salt is new in every run, so that it serves to compare alone."""
    name = " ".join(_text(header, "PatientName").casefold().replace("^", " ").split())
    identity = (_text(header, "PatientID"), _text(header, "IssuerOfPatientID"), name)
    return hashlib.sha256(_SALT + "\0".join(identity).encode("utf-8", "surrogatepass")).digest()


def _first(groups: Sequence[Dataset], *keywords: str) -> str:
    return next((found for keyword in keywords for group in groups if (found := _text(group, keyword))), "")


def _text(header: Dataset, keyword: str) -> str:
    value = header.get(keyword)
    if value is None:
        return ""
    parts = value if isinstance(value, MultiValue | list) else [value]
    return "\\".join(str(part) for part in parts).strip(" \0")


def _demanded(header: Dataset, keyword: str) -> str:
    text = _text(header, keyword)
    if not text:
        raise DamagedHeaderError
    return str(UID(text))


def _printable(text: str) -> str:
    """Return a code word in a form that can be shown: vendors' names of kernels, units and the like."""
    return "".join(character for character in text if character.isascii() and character.isprintable())[:32]


def _whole(header: Dataset, keyword: str, missing: int | None = None) -> int:
    value = header.get(keyword)
    if value is None or value == "":
        if missing is None:
            raise DamagedHeaderError
        return missing
    return int(value)


def _numbers(groups: Sequence[Dataset], keyword: str, count: int) -> tuple[float, ...] | None:
    """Return the finite numbers of an element, or None where it is missing or has another count of them."""
    for group in groups:
        value = group.get(keyword)
        if value is None or value == "":
            continue
        numbers = tuple(float(number) for number in (value if isinstance(value, MultiValue | list) else [value]))
        return numbers if len(numbers) == count and all(math.isfinite(number) for number in numbers) else None
    return None
