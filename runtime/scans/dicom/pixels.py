"""Decoding of pixel data to stored values, from which one slope and intercept give HU."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.pixels.decoders.base import get_decoder

from fseft_edge.runtime.errors import NoDecoderError, PixelFormatError, RescaleError
from fseft_edge.runtime.scans.dicom.codestreams import check_codestreams
from fseft_edge.runtime.scans.dicom.deflated import inflated
from fseft_edge.runtime.scans.dicom.elements import UNDEFINED_LENGTH, PixelLocation, element_name
from fseft_edge.runtime.scans.dicom.headers import PixelFormat, SliceHeader
from fseft_edge.runtime.scans.hounsfield import AIR_BELOW_HU

AIR_HU = -1024.0
"""HU of padding pixels. Padding pixels are outside the reconstruction circle of the scanner and have no measurement."""

MOST_ROWS_OR_COLUMNS = 8192
"""Largest accepted number of rows or columns; CT scanners write up to 2048. Decoders allocate memory for the matrix."""

_NATIVE = frozenset(
    {
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    }
)

_FORMAT_KEYWORDS = (
    *("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit"),
)
_RESCALE_KEYWORDS = ("RescaleSlope", "RescaleIntercept")
_PHOTOMETRIC = re.compile(r"(MONOCHROME|RGB|PALETTE|YBR|HSV|ARGB|CMYK|XYB)[A-Z0-9_ ]{0,12}")

# For each compressed transfer syntax: suitable decoder plugins of pydicom in order of preference, and a remedy.
_JPEG = (("gdcm", "pylibjpeg"), "install fseft-edge[jpeg]")
_JPEG_LS = (("pyjpegls",), "install pyjpegls")
_JPEG_2000 = (("pylibjpeg",), "install pylibjpeg and pylibjpeg-openjpeg")
_DECODERS: dict[str, tuple[tuple[str, ...], str]] = {
    uid.RLELossless: (("pydicom",), "install pydicom"),
    uid.JPEGLossless: _JPEG,
    uid.JPEGLosslessSV1: _JPEG,
    uid.JPEGLSLossless: _JPEG_LS,
    uid.JPEGLSNearLossless: _JPEG_LS,
    uid.JPEG2000Lossless: _JPEG_2000,
    uid.JPEG2000: _JPEG_2000,
    uid.HTJ2KLossless: _JPEG_2000,
    uid.HTJ2KLosslessRPCL: _JPEG_2000,
    uid.HTJ2K: _JPEG_2000,
}


class ShortPixelsError(Exception):
    """The pixel data are too short; the text says how. This exception never leaves the package."""


@dataclass(frozen=True)
class Storage:
    """Data type of the stored values of a volume, and slope and intercept to HU."""

    dtype: np.dtype[Any]
    slope: float
    intercept: float


def check_pixels(slices: Sequence[SliceHeader], path: Path) -> None:
    """Check that the pixel data of all slices can be decoded and converted to HU.

    Raises:
        PixelFormatError: the pixels are not single whole numbers in the lowest bits of 16, with larger values brighter.
        RescaleError: slope or intercept is missing or invalid, or the unit is not HU.
        NoDecoderError: no installed decoder can decode the transfer syntax.
    """
    _check_faults(slices, path)
    for pixels in {slice_.pixels for slice_ in slices}:
        _check_format(pixels, path)
        _check_rescale(pixels, path)
    for slice_ in slices:
        if not 2 <= min(slice_.rows, slice_.columns) <= max(slice_.rows, slice_.columns) <= MOST_ROWS_OR_COLUMNS:
            raise PixelFormatError(
                f"The series in {path} has slices of {slice_.columns}x{slice_.rows} pixels, but the limits are 2x2 and "
                f"{MOST_ROWS_OR_COLUMNS}x{MOST_ROWS_OR_COLUMNS}.",
                remedy="Export the series again from the PACS.",
            )
        if slice_.location.keyword != "PixelData":
            raise PixelFormatError(
                f"The series in {path} has {slice_.location.keyword} instead of {element_name('PixelData')}.",
                remedy="Export the original CT series again from the PACS.",
            )
    for syntax in sorted({slice_.syntax for slice_ in slices}):
        _decoder_plugin(syntax, path)


def choose_storage(slices: Sequence[SliceHeader]) -> Storage:
    """Return the storage for the values of a series: the stored integers, or HU in float32 if rescales differ.

    float32 represents the HU of any 16-bit value with an error below 0.01 HU for usual slopes.
    """
    formats = {slice_.pixels for slice_ in slices}
    rescales = {pixels.rescale for pixels in formats}
    if len(rescales) > 1:
        return Storage(np.dtype(np.float32), 1.0, 0.0)
    slope, intercept = rescales.pop() or (1.0, 0.0)
    lowest, highest = (
        min(_value_range(pixels)[0] for pixels in formats),
        max(_value_range(pixels)[1] for pixels in formats),
    )
    fitting = (
        np.dtype(kind)
        for kind in (np.int16, np.uint16, np.int32)
        if np.iinfo(kind).min <= lowest and highest <= np.iinfo(kind).max
    )
    return Storage(next(fitting), slope, intercept)


def decode_slices(slices: Sequence[SliceHeader], stream: BinaryIO, path: Path) -> Generator[NDArray[Any], None, None]:
    """Yield the decoded but unconverted pixels ``[rows, columns]`` of slices in one file, in the given order.

    Args:
        slices: headers of slices in the same file, in the order of the frames.
        stream: the file, open for reading at its start.
        path: path as given by the user, for error messages.

    Raises:
        NoDecoderError: no installed decoder can decode the transfer syntax.
        ShortPixelsError: there are fewer pixels than rows and columns require.
        Exception: a decoder or :func:`check_codestreams` found truncated or damaged pixels.
    """
    first = slices[0]
    plugin = _decoder_plugin(first.syntax, path)
    data = open_pixels(stream, first.location)
    if not plugin:
        yield from _native_frames(slices, data)
        return
    check_codestreams(data, first)
    data = open_pixels(stream, first.location)
    decoder = get_decoder(uid.UID(first.syntax))
    options: dict[str, Any] = {
        "rows": first.rows,
        "columns": first.columns,
        "number_of_frames": first.frames,
        "samples_per_pixel": first.pixels.samples,
        "photometric_interpretation": first.pixels.photometric,
        "bits_allocated": first.pixels.allocated,
        "bits_stored": first.pixels.stored,
        "pixel_representation": int(first.pixels.signed),
        "pixel_keyword": first.location.keyword,
        "pixel_vr": first.location.vr,
        "transfer_syntax_uid": uid.UID(first.syntax),
        "correct_unused_bits": False,  # padding values may use the unused bits
    }
    frames = decoder.iter_array(
        data, indices=[slice_.frame for slice_ in slices], raw=True, decoding_plugin=plugin, **options
    )
    for frame, _ in frames:
        yield frame


def open_pixels(stream: BinaryIO, location: PixelLocation) -> BinaryIO:
    """Return a stream at the start of the pixel data of a DICOM file."""
    if not location.deflated:
        stream.seek(location.offset)
        return stream
    stream.seek(location.data_set)
    data_set = inflated(stream)
    data_set.seek(location.offset)
    return data_set


def _native_frames(slices: Sequence[SliceHeader], data: BinaryIO) -> Generator[NDArray[Any], None, None]:
    first = slices[0]
    size = first.rows * first.columns * 2
    if first.location.length == UNDEFINED_LENGTH:
        raise ShortPixelsError("has no length, as if it was compressed")
    if first.location.length < size * first.frames:
        raise ShortPixelsError(f"has {first.location.length} bytes instead of {size * first.frames}")
    dtype = np.dtype("<u2" if first.location.little_endian else ">u2")
    at = 0
    for slice_ in slices:
        data.seek((slice_.frame - at) * size, io.SEEK_CUR)
        raw = data.read(size)
        if len(raw) < size:
            raise ShortPixelsError("is cut off by the end of the file")
        at = slice_.frame + 1
        yield np.frombuffer(raw, dtype).reshape(first.rows, first.columns)


def stored_values(encoded: NDArray[Any], pixels: PixelFormat, storage: Storage) -> NDArray[Any]:
    """Return the values of a slice for a storage: with extended sign, and padding replaced by air."""
    allocated = encoded.astype(np.int32) & 0xFFFF
    stored = allocated & ((1 << pixels.stored) - 1)
    if pixels.signed:
        sign = 1 << (pixels.stored - 1)
        stored = (stored ^ sign) - sign
    slope, intercept = pixels.rescale or (1.0, 0.0)
    padded = _padding_mask(allocated, stored, pixels)
    if storage.dtype.kind == "f":
        with np.errstate(over="ignore"):  # values that are not finite are refused later
            return np.where(padded, AIR_HU, stored * slope + intercept).astype(storage.dtype)
    limits = np.iinfo(storage.dtype)
    air = round(min(max((AIR_HU - intercept) / slope, limits.min), limits.max))
    return np.where(padded, air, stored).astype(storage.dtype)


def _padding_mask(allocated: NDArray[np.int32], stored: NDArray[np.int32], pixels: PixelFormat) -> NDArray[np.bool_]:
    """Return the mask of padding pixels: PixelPaddingValue, or the range to its limit (PS3.3 C.7.5.1.1.2).

    Values that a header lists beside the first one are padding only if they are air, so that no tissue is lost.
    """
    mask = np.zeros(stored.shape, bool)
    slope, intercept = pixels.rescale or (1.0, 0.0)
    for number, (first, limit) in enumerate(pixels.padding):
        low, high = _stored_padding(first, pixels), _stored_padding(limit, pixels)
        if low is None or high is None:
            mask |= allocated == (first & 0xFFFF)
        elif number == 0 or low * slope + intercept < AIR_BELOW_HU:
            mask |= (stored >= min(low, high)) & (stored <= max(low, high))
    return mask


def _stored_padding(value: int, pixels: PixelFormat) -> int | None:
    """Return a padding value as a stored pixel value; None if the stored bits cannot represent it.

    Some programs confuse signed and unsigned padding values: they write -2000 as 63536 for signed pixels.
    """
    lowest, highest = _value_range(pixels)
    for candidate in (value, (value & 0xFFFF) - 0x10000, value & 0xFFFF):
        if lowest <= candidate <= highest:
            return candidate
    return None


def _value_range(pixels: PixelFormat) -> tuple[int, int]:
    if pixels.signed:
        return -(1 << (pixels.stored - 1)), (1 << (pixels.stored - 1)) - 1
    return 0, (1 << pixels.stored) - 1


def fault_counts(slices: Sequence[SliceHeader], keywords: Sequence[str]) -> str:
    """Return the wrong values of these elements, with the number of slices; empty if there are none."""
    faults = Counter(fault for slice_ in slices for fault in slice_.faults if fault.keyword in keywords)
    return "; ".join(f"{fault} in {count} of {len(slices)} slices" for fault, count in faults.items())


def _check_faults(slices: Sequence[SliceHeader], path: Path) -> None:
    remedy = "Export the original CT series again from the PACS."
    if found := fault_counts(slices, _FORMAT_KEYWORDS):
        raise PixelFormatError(f"The series in {path} has a wrong header: {found}.", remedy=remedy)
    if found := fault_counts(slices, _RESCALE_KEYWORDS):
        raise RescaleError(f"The series in {path} has a wrong header: {found}.", remedy=remedy)


def _check_format(pixels: PixelFormat, path: Path) -> None:
    remedy = "Export the original CT series again from the PACS."
    if pixels.photometric != "MONOCHROME2" or pixels.samples != 1:
        raise PixelFormatError(
            f"The series in {path} has the {element_name('PhotometricInterpretation')} {_photometric(pixels)} and "
            f"{pixels.samples} values per pixel, but a CT has MONOCHROME2 and 1 value per pixel.",
            remedy=remedy,
        )
    if pixels.allocated != 16 or not 2 <= pixels.stored <= 16 or pixels.high_bit != pixels.stored - 1:
        raise PixelFormatError(
            f"The series in {path} has BitsAllocated {pixels.allocated}, BitsStored {pixels.stored} and HighBit "
            f"{pixels.high_bit}, but a CT has 16 allocated bits, 2 to 16 stored bits, and HighBit = BitsStored - 1.",
            remedy=remedy,
        )


def _photometric(pixels: PixelFormat) -> str:
    if not pixels.photometric:
        return "(missing)"
    return pixels.photometric if _PHOTOMETRIC.fullmatch(pixels.photometric) else "(unknown)"


def _check_rescale(pixels: PixelFormat, path: Path) -> None:
    remedy = "Export the original CT series again from the PACS, not a series that a viewer windowed or changed."
    if pixels.rescale is None or pixels.table:
        table = f"has a lookup table, {element_name('ModalityLUTSequence')}, instead of"
        found = table if pixels.table else "does not have both"
        raise RescaleError(
            f"The series in {path} {found} a {element_name('RescaleSlope')} and a {element_name('RescaleIntercept')}.",
            remedy=remedy,
        )
    if not pixels.rescale[0] > 0:
        raise RescaleError(
            f"The series in {path} has a rescale slope of {pixels.rescale[0]:g}, but the slope must be above 0.",
            remedy=remedy,
        )
    if not pixels.hounsfield:
        raise RescaleError(
            f"The series in {path} has values in a unit other than HU, according to its {element_name('RescaleType')}.",
            remedy="Give a series in HU, not a material map of spectral CT.",
        )


def _decoder_plugin(syntax: str, path: Path) -> str:
    """Return the name of the pydicom plugin that decodes a transfer syntax; empty if no decoder is needed."""
    if syntax in _NATIVE:
        return ""
    plugins, remedy = _DECODERS.get(syntax, ((), ""))
    if plugins:
        available = get_decoder(uid.UID(syntax)).available_plugins
        for plugin in plugins:
            if plugin in available:
                return plugin
    shown = syntax if re.fullmatch(r"[0-9.]{1,64}", syntax) else "unknown"
    name = uid.UID(shown).name
    raise NoDecoderError(
        f"The series in {path} has the transfer syntax {name}{'' if name == shown else f' ({shown})'}, for which no "
        "decoder is available.",
        remedy=f"To read the series, {remedy}; or export the series from the PACS as uncompressed DICOM."
        if remedy
        else "Export the series from the PACS as uncompressed DICOM or as JPEG 2000.",
    )
