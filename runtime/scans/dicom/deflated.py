"""Deflated data sets (PS3.5 A.5): a stream that unpacks only what is read, up to a limit."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_INFLATED_BYTES = 4 << 30
"""Largest unpacked size of one deflated data set. A damaged or malicious file could otherwise unpack for hours."""

_PACKED_BYTES = 1 << 16


class DeflateError(Exception):
    """A deflated data set is damaged, or its unpacked size exceeds the limit. It never leaves the package."""


class InflatedReader(io.RawIOBase):
    """The unpacked content of a deflated stream from its current position. A step backwards unpacks from the start.

    Every method that unpacks raises :class:`DeflateError` if the packed data are damaged or unpack to more than
    ``MAX_INFLATED_BYTES``.
    """

    def __init__(self, packed: BinaryIO) -> None:
        super().__init__()
        self._packed, self._start = packed, packed.tell()
        self._rewind()

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in the unpacked content."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a position counted from the start, or from the current position."""
        target = offset + (self._at if whence == io.SEEK_CUR else 0)
        if target < self._at:
            self._rewind()
        while self._at < target and self._next(min(target - self._at, _PACKED_BYTES)):
            pass
        return self._at

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Unpack into a buffer and return the number of bytes, 0 at the end."""
        view = memoryview(buffer).cast("B")
        piece = self._next(min(len(view), _PACKED_BYTES))
        view[: len(piece)] = piece
        return len(piece)

    def _rewind(self) -> None:
        self._packed.seek(self._start)
        self._unpacker, self._at = zlib.decompressobj(-zlib.MAX_WBITS), 0

    def _next(self, most: int) -> bytes:
        piece = b""
        while most and not piece and not self._unpacker.eof:
            packed = self._unpacker.unconsumed_tail or self._packed.read(_PACKED_BYTES)
            if not packed:
                break
            try:
                piece = self._unpacker.decompress(packed, most)
            except zlib.error:
                raise DeflateError from None
        self._at += len(piece)
        if self._at > MAX_INFLATED_BYTES:
            raise DeflateError
        return piece


def inflated(packed: BinaryIO) -> BinaryIO:
    """Return a buffered reader of the unpacked content of a deflated stream from its current position."""
    return io.BufferedReader(InflatedReader(packed))
