"""Check of the image size in compressed frames before decoding.

Decoders allocate memory for the image size in the codestream, and some decoders crash on an impossible size. The size
is therefore compared with the DICOM header first.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from pydicom.encaps import generate_frames
from pydicom.uid import RLELossless

from fseft_edge.runtime.scans.dicom.headers import SliceHeader

_JPEG_START, _JPEG_2000_START = b"\xff\xd8", b"\xff\x4f\xff\x51"
_JPEG_FRAMES = (0xC3, 0xF7)
"""SOF3 of lossless JPEG (ITU T.81 B.1.1.3) and SOF55 of JPEG-LS (ITU T.87 C.1)."""
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9
_RLE_FACTOR = 64


class DamagedCodestreamError(Exception):
    """The image size in a frame differs from the DICOM header. This exception never leaves the package."""


def check_codestreams(stream: BinaryIO, slice_: SliceHeader) -> None:
    """Check that each compressed frame in a file can only have the image size in the DICOM header.

    JPEG, JPEG-LS and JPEG 2000 frames contain their size. RLE frames do not, but RLE reduces the size by less than a
    factor of 64 (PS3.5 annex G).

    Args:
        stream: DICOM file, at the start of its pixel data.
        slice_: header of any slice in the file.

    Raises:
        DamagedCodestreamError: the size of a frame differs from the header, or a frame has no valid size.
        Exception: pydicom cannot separate the frames.
    """
    expected = (slice_.rows, slice_.columns, 1)
    for frame in generate_frames(stream, number_of_frames=slice_.frames):
        if slice_.syntax == RLELossless:
            if len(frame) * _RLE_FACTOR < slice_.rows * slice_.columns * 2:
                raise DamagedCodestreamError
            continue
        *size, precision = _frame_size(frame)
        if tuple(size) != expected or not 2 <= precision <= 16:
            raise DamagedCodestreamError


def _frame_size(frame: bytes) -> tuple[int, int, int, int]:
    """Return rows, columns, components and bits per component of a compressed frame.

    Raises:
        DamagedCodestreamError: the frame is not JPEG, JPEG-LS or JPEG 2000, or has no size.
    """
    try:
        if frame.startswith(_JPEG_2000_START):  # the SIZ segment, ITU T.800 A.5.1
            right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
            components, bits = struct.unpack_from(">HB", frame, 40)
            return bottom - top, right - left, components, (bits & 0x7F) + 1
        if frame.startswith(_JPEG_START):
            return _jpeg_frame_size(frame)
    except (struct.error, IndexError):
        pass
    raise DamagedCodestreamError


def _jpeg_frame_size(frame: bytes) -> tuple[int, int, int, int]:
    at = len(_JPEG_START)
    while frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in (_JPEG_SCAN, _JPEG_END):
            break
        length, bits, rows, columns, components = struct.unpack_from(">HBHHB", frame, at + 2)
        if marker in _JPEG_FRAMES:
            return rows, columns, components, bits
        at += 2 + length
    raise DamagedCodestreamError
