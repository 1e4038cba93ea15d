"""Reading of DICOM headers: identity, position, pixel format and rescale of each slice.

Single-frame images contain these attributes at the top level. Enhanced multi-frame images contain them in functional
groups: one item for each frame, and one item that all frames share (PS3.3 C.7.6.16). Pixel data are not read.
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

# Warnings and log messages of pydicom quote header values, which can be the name of a patient.
warnings.filterwarnings("ignore", module=r"pydicom\b")
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTI_FRAME_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
"""Enhanced CT, and Legacy Converted Enhanced CT (PS3.4 B.5)."""

_PIXELS = {struct.pack(order, 0x7FE0, element) for order in ("<HH", ">HH") for element in (0x08, 0x09, 0x10)}
"""First bytes of the element after the header: pixel data (7FE0,0010) or float pixel data (7FE0,0008 and 7FE0,0009)."""

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
    """The header of a DICOM file is truncated or invalid. This exception never leaves the package."""


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
        padding: PixelPaddingValue and PixelPaddingRangeLimit as written in the file, or PixelPaddingValue twice if
            there is no range limit; None if the slice has no padding.
        rescale: RescaleSlope and RescaleIntercept; None if one is missing.
        unit: RescaleType, the unit of the rescaled values; empty if missing.
        table: True if a lookup table (ModalityLUTSequence) replaces the rescale.
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
    """Header of one slice.

    Attributes:
        file: location of the DICOM file.
        frame: index of the slice among the frames of the file, from 0.
        frames: number of frames in the file.
        sop_class: SOP class UID of the DICOM object.
        syntax: transfer syntax UID (the encoding) of the file.
        series_uid: SeriesInstanceUID.
        study_uid: StudyInstanceUID; empty if missing.
        frame_of_reference_uid: FrameOfReferenceUID; empty if missing.
        patient: anonymous key that is equal for all images of one patient.
        modality: modality, such as ``CT``.
        image_type: values of ImageType, such as ``ORIGINAL``, ``PRIMARY``, ``AXIAL``.
        kernel: ConvolutionKernel; empty if missing.
        quadruped: True if the coordinates refer to the anatomy of a four-footed animal.
        rows: number of rows of the pixel matrix.
        columns: number of columns of the pixel matrix.
        spacing: distance between rows and distance between columns in mm; None if missing.
        orientation: direction cosines of a row and of a column, LPS+; None if missing.
        position: centre of the first pixel in mm, LPS+; None if missing.
        pixels: pixel format of the slice.
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
    """Return the headers of all slices in a DICOM file; an empty tuple for a file without image, such as a DICOMDIR.

    Args:
        file: location of the file, for the result.
        stream: the file, open for reading at its start.

    Raises:
        DamagedHeaderError: the header is truncated or invalid.
    """
    try:
        header = read_header(stream, _TAGS)
        return tuple(_slices(file, header, has_pixels=stream.read(4) in _PIXELS))
    except DamagedHeaderError:
        raise
    except Exception:  # pydicom raises many kinds of exception for damaged headers, some at the first access to a value
        raise DamagedHeaderError from None


def read_header(stream: BinaryIO, tags: Sequence[str] | None = None) -> Dataset:
    """Read the header of a DICOM file, without pixel data.

    Args:
        stream: the file, open for reading at its start.
        tags: keywords of the elements to read; None reads all elements.

    Raises:
        DamagedHeaderError: the file has a deflated transfer syntax, whose unpacked size is unlimited.
        Exception: pydicom cannot read the header.
    """
    read_preamble(stream, force=False)
    start = stream.tell()
    meta = read_dataset(stream, is_implicit_VR=False, is_little_endian=True, stop_when=_after_file_meta)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise DamagedHeaderError
    stream.seek(start - 132)
    return pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=None if tags is None else list(tags))


def _after_file_meta(tag: BaseTag, vr: str | None, length: int) -> bool:  # noqa: ARG001 - pydicom defines the signature
    return tag >> 16 != 2


def _slices(file: DicomFile, header: Dataset, *, has_pixels: bool) -> Iterator[SliceHeader]:
    sop_class, named = _text(header, "SOPClassUID"), _text(header.file_meta, "MediaStorageSOPClassUID")
    if not has_pixels:
        # pydicom accepts the end of a file as the end of its header, even within a value. An image without pixel data
        # is therefore treated as truncated.
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
            series_uid=_required_text(header, "SeriesInstanceUID"),
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
    """Yield, for each frame, the data sets that can contain its attributes, the most specific data set first."""
    if sop_class not in MULTI_FRAME_CT:
        yield [header]  # other multi-frame images are refused later, so one slice is enough
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
    """Return a hash of the patient identity. Its salt differs in each run, so the hash only allows comparisons."""
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


def _required_text(header: Dataset, keyword: str) -> str:
    text = _text(header, keyword)
    if not text:
        raise DamagedHeaderError
    return str(UID(text))


def _printable(text: str) -> str:
    """Return at most 32 printable ASCII characters of a code word, such as the name of a kernel or unit."""
    return "".join(character for character in text if character.isascii() and character.isprintable())[:32]


def _whole(header: Dataset, keyword: str, missing: int | None = None) -> int:
    value = header.get(keyword)
    if value is None or value == "":
        if missing is None:
            raise DamagedHeaderError
        return missing
    return int(value)


def _numbers(groups: Sequence[Dataset], keyword: str, count: int) -> tuple[float, ...] | None:
    """Return the numbers of an element; None if the element is missing, or does not have ``count`` finite numbers."""
    for group in groups:
        value = group.get(keyword)
        if value is None or value == "":
            continue
        numbers = tuple(float(number) for number in (value if isinstance(value, MultiValue | list) else [value]))
        return numbers if len(numbers) == count and all(math.isfinite(number) for number in numbers) else None
    return None
