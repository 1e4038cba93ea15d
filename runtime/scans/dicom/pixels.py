"""From the pixels of a slice to stored values that one rescale turns into HU."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import iter_pixels

from fseft_edge.runtime.errors import NoDecoderError, PixelFormatError, RescaleError
from fseft_edge.runtime.scans.dicom.codestreams import check_codestreams
from fseft_edge.runtime.scans.dicom.headers import PixelFormat, SliceHeader

AIR_HU = -1024.0
"""What padding becomes: the values beyond the scanner's circle stand for no measurement."""

_NATIVE = frozenset({uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian})

# Of each compressed encoding the plugins of pydicom that decode it right, in order, and what installs the first.
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


@dataclass(frozen=True)
class Storage:
    """How a volume holds its values: their type, and the rescale to HU."""

    dtype: np.dtype[Any]
    slope: float
    intercept: float


def check_pixels(slices: Sequence[SliceHeader], path: Path) -> None:
    """Make sure that pixels can be decoded and turned into HU.

    Raises:
        PixelFormatError: other than whole numbers of at most 16 bits, one a pixel, larger meaning denser.
        RescaleError: slope or intercept is missing or impossible, or leads elsewhere than to HU.
        NoDecoderError: compressed in a way that cannot be decoded here.
    """
    for pixels in {slice_.pixels for slice_ in slices}:
        _check_format(pixels, path)
        _check_rescale(pixels, path)
    for slice_ in slices:
        if not min(slice_.rows, slice_.columns) >= 2:
            raise PixelFormatError(
                f"The series in {path} has slices of {slice_.columns}x{slice_.rows} pixels.",
                remedy="Export the series again from the PACS.",
            )
    for syntax in sorted({slice_.syntax for slice_ in slices}):
        _plugin(syntax, path)


def storage_of(slices: Sequence[SliceHeader]) -> Storage:
    """Return how to hold a series' values: as they are stored, or where rescales differ as HU in float32.

    float32 holds every 16-bit value times a slope of few digits to better than a hundredth of a HU.
    """
    formats = {slice_.pixels for slice_ in slices}
    rescales = {pixels.rescale for pixels in formats}
    if len(rescales) > 1:
        return Storage(np.dtype(np.float32), 1.0, 0.0)
    slope, intercept = rescales.pop() or (1.0, 0.0)
    lowest, highest = (min(_range(pixels)[0] for pixels in formats), max(_range(pixels)[1] for pixels in formats))
    fitting = (
        np.dtype(kind)
        for kind in (np.int16, np.uint16, np.int32)
        if np.iinfo(kind).min <= lowest and highest <= np.iinfo(kind).max
    )
    return Storage(next(fitting), slope, intercept)


def decoded(slices: Sequence[SliceHeader], stream: BinaryIO, path: Path) -> Generator[NDArray[Any], None, None]:
    """Yield the pixels ``[rows, columns]`` of slices that lie in one file, in the order given, as they are encoded.

    Raises:
        NoDecoderError: see :func:`check_pixels`.
        Exception: of the decoders' or :func:`check_codestreams`', on pixels that are truncated or damaged.
    """
    plugin = _plugin(slices[0].syntax, path)
    if plugin and slices[0].syntax != uid.RLELossless:
        check_codestreams(stream, slices[0])
    yield from iter_pixels(
        stream,
        indices=[slice_.frame for slice_ in slices],
        raw=True,
        decoding_plugin=plugin,
        correct_unused_bits=False,  # padding may be written with bits beyond those that hold a value
    )


def values_of(encoded: NDArray[Any], pixels: PixelFormat, storage: Storage) -> NDArray[Any]:
    """Return a slice's values as the volume holds them: sign extended, padding turned into air."""
    allocated = encoded.astype(np.int32) & 0xFFFF
    stored = allocated & ((1 << pixels.stored) - 1)
    if pixels.signed:
        sign = 1 << (pixels.stored - 1)
        stored = (stored ^ sign) - sign
    slope, intercept = pixels.rescale or (1.0, 0.0)
    padded = _padded(allocated, stored, pixels)
    if storage.dtype.kind == "f":
        return np.where(padded, AIR_HU, stored * slope + intercept).astype(storage.dtype)
    limits = np.iinfo(storage.dtype)
    air = int(np.clip(round((AIR_HU - intercept) / slope), limits.min, limits.max))
    return np.where(padded, air, stored).astype(storage.dtype)


def _padded(allocated: NDArray[np.int32], stored: NDArray[np.int32], pixels: PixelFormat) -> NDArray[np.bool_]:
    """Where a slice holds padding: PixelPaddingValue, or what lies between it and its limit (PS3.3 C.7.5.1.1.2)."""
    if pixels.padding is None:
        return np.zeros(stored.shape, bool)
    ends = [_as_stored(value, pixels) for value in pixels.padding]
    if ends[0] is not None and ends[1] is not None:
        return np.asarray((stored >= min(ends[0], ends[1])) & (stored <= max(ends[0], ends[1])))
    return np.asarray(allocated == (pixels.padding[0] & 0xFFFF))


def _as_stored(value: int, pixels: PixelFormat) -> int | None:
    """Return a padding value as the pixels would hold it, or None where their bits cannot.

    Writers confuse signed and unsigned: -2000 is written as 63536 beside signed pixels.
    """
    lowest, highest = _range(pixels)
    for candidate in (value, (value & 0xFFFF) - 0x10000, value & 0xFFFF):
        if lowest <= candidate <= highest:
            return candidate
    return None


def _range(pixels: PixelFormat) -> tuple[int, int]:
    if pixels.signed:
        return -(1 << (pixels.stored - 1)), (1 << (pixels.stored - 1)) - 1
    return 0, (1 << pixels.stored) - 1


def _check_format(pixels: PixelFormat, path: Path) -> None:
    remedy = "Export the original CT series again from the PACS."
    if pixels.photometric != "MONOCHROME2" or pixels.samples != 1:
        raise PixelFormatError(
            f"The series in {path} is {pixels.photometric or 'of no known colours'} with {pixels.samples} values a "
            "pixel; a CT in HU is MONOCHROME2 with one.",
            remedy=remedy,
        )
    if pixels.allocated != 16 or not 2 <= pixels.stored <= 16 or pixels.high_bit != pixels.stored - 1:
        raise PixelFormatError(
            f"The series in {path} stores {pixels.stored} bits a pixel, up to bit {pixels.high_bit}, in "
            f"{pixels.allocated}; a CT in HU has at most 16, the lowest of 16.",
            remedy=remedy,
        )


def _check_rescale(pixels: PixelFormat, path: Path) -> None:
    remedy = "Export the original CT series again from the PACS, not one that was windowed or changed by a viewer."
    if pixels.rescale is None or pixels.table:
        how = "by a table" if pixels.table else "nothing that says"
        raise RescaleError(
            f"The series in {path} has {how} how its values become HU, instead of a slope and an intercept.",
            remedy=remedy,
        )
    if not pixels.rescale[0] > 0:
        raise RescaleError(f"The series in {path} has a rescale slope of {pixels.rescale[0]:g}.", remedy=remedy)
    if pixels.unit not in ("", "HU", "US"):  # US: unspecified
        raise RescaleError(
            f"The series in {path} holds values in another unit than HU.",
            remedy="Give a series in HU; maps made from spectral CT are not.",
        )


def _plugin(syntax: str, path: Path) -> str:
    """Return the plugin of pydicom that decodes a transfer syntax; empty where none is needed."""
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
        f"The series in {path} is encoded as {name}{'' if name == shown else f' ({shown})'}, for which no decoder "
        "is here.",
        remedy=f"To read it, {remedy}; or export it uncompressed from the PACS."
        if remedy
        else "Export it from the PACS uncompressed, or as JPEG 2000.",
    )
