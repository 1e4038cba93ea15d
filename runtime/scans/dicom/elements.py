"""The elements of a DICOM header as bytes: no value is converted, and damage ends the reading without an exception.

A header comes in one of four encodings (PS3.5 section 7 and annex A). Files of old or careless programs lack the
preamble, the file meta information or the transfer syntax, or contain another encoding than their transfer syntax
states. As in other readers, the first bytes then show the encoding.

Memory and time are limited: at most ``_MOST_ELEMENTS`` elements, ``_MOST_BYTES`` bytes of values, ``_MOST_DEPTH``
nested sequences.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from pydicom.datadict import dictionary_has_tag, keyword_for_tag, tag_for_keyword
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from fseft_edge.runtime.scans.dicom.deflated import DeflateError, inflated

PREAMBLE_BYTES = 128
MAGIC = b"DICM"
UNDEFINED_LENGTH = 0xFFFFFFFF
SNIFFED_BYTES = 1024
"""Number of bytes at the start of a file that :func:`looks_like_dicom` examines."""

_MOST_ELEMENTS, _MOST_BYTES, _MOST_DEPTH = 1_000_000, 64 << 20, 16
_MOST_VALUE_BYTES = 1 << 16
"""Longest value that is kept. Values of interest have at most a few hundred bytes."""

_SNIFFED_ELEMENTS = 3
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
"""Value representations with two reserved bytes and a length of four bytes (PS3.5 section 7.1.2)."""
_SHORT = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split()  # length of two bytes
)
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
"""FloatPixelData, DoubleFloatPixelData and PixelData: the header ends here."""
_TRANSFER_SYNTAX = 0x00020010


@dataclass(frozen=True)
class Value:
    """Value of one element.

    Attributes:
        vr: value representation as written; empty in implicit encoding.
        data: bytes of the value; None if the value is too long to be kept.
        items: items of a sequence; empty for other elements.
        repeated: True if the element occurs again with another value.
    """

    vr: str
    data: bytes | None
    items: tuple[Elements, ...] = ()
    repeated: bool = False


Elements = Mapping[int, Value]
"""Elements by tag, for example ``0x00280010`` for Rows."""


@dataclass(frozen=True)
class PixelLocation:
    """Place of the pixel data in a file.

    Attributes:
        keyword: ``PixelData``, ``FloatPixelData`` or ``DoubleFloatPixelData``.
        vr: value representation as written; empty in implicit encoding.
        length: length of the value in bytes, or ``UNDEFINED_LENGTH`` of compressed pixel data.
        offset: position of the value in the file, or in the unpacked data set if ``deflated``.
        data_set: position of the data set in the file.
        little_endian: byte order of numbers.
        deflated: True if the data set is deflated.
    """

    keyword: str
    vr: str
    length: int
    offset: int
    data_set: int
    little_endian: bool
    deflated: bool


@dataclass(frozen=True)
class Encoding:
    """Encoding of a file: position and encoding of its data set, and its transfer syntax.

    Attributes:
        meta: elements of group 2, the file meta information.
        start: position of the data set in the file.
        syntax: transfer syntax UID, guessed if the file states none.
        stated: True if the file states its transfer syntax.
        implicit: True if the data set contains no value representations.
        little_endian: byte order of the data set.
    """

    meta: Elements
    start: int
    syntax: str
    stated: bool
    implicit: bool
    little_endian: bool

    @property
    def deflated(self) -> bool:
        """True if the data set is deflated."""
        return self.syntax == DeflatedExplicitVRLittleEndian


@dataclass(frozen=True)
class Header:
    """Header of a DICOM file, as far as it could be read.

    Attributes:
        encoding: encoding of the file.
        elements: the wanted elements of the data set.
        pixels: place of the pixel data; None if there are none, or if the header is damaged before them.
        damage: what is wrong in the structure of the header, such as ``ends within PixelSpacing (0028,0030)``; empty
            for a header without damage.
    """

    encoding: Encoding
    elements: Elements
    pixels: PixelLocation | None
    damage: str


class _DamageError(Exception):
    """The structure of a header is invalid; the text names the element. This exception never leaves the module."""


def element_name(tag: int | str) -> str:
    """Return keyword and tag of an element, such as ``Rows (0028,0010)``; only the tag if it has no keyword."""
    number = tag_for_keyword(tag) if isinstance(tag, str) else tag
    number = 0 if number is None else int(number)
    shown = f"({number >> 16:04X},{number & 0xFFFF:04X})"
    keyword = keyword_for_tag(number)
    return f"{keyword} {shown}" if keyword else f"the element {shown}"


def looks_like_dicom(head: bytes) -> bool:
    """Return True if a file with these first ``SNIFFED_BYTES`` bytes is DICOM, with or without preamble.

    Without preamble, the file must start with the file meta information, or with several elements of group 8 whose tags
    increase.
    """
    if head[PREAMBLE_BYTES : PREAMBLE_BYTES + len(MAGIC)] == MAGIC:
        return True
    if head.startswith(b"\x02\x00\x00\x00UL\x04\x00"):
        return True
    order, at, last = ">" if head.startswith(b"\x00\x08") else "<", 0, 0
    for _ in range(_SNIFFED_ELEMENTS):
        if len(head) < at + 8:
            return False
        group, element, vr = struct.unpack_from(f"{order}HH2s", head, at)
        tag = group << 16 | element
        implicit = vr not in _SHORT
        if group != 0x0008 or tag <= last or not dictionary_has_tag(tag) or (implicit and order == ">"):
            return False
        length, place = ("I", at + 4) if implicit else ("H", at + 6)
        at, last = at + 8 + struct.unpack_from(order + length, head, place)[0], tag
    return True


def read_encoding(stream: BinaryIO) -> Encoding:
    """Return the encoding of a DICOM file; the stream is open for reading at its start.

    Raises:
        EOFError: the file ends within its file meta information.
    """
    start = stream.tell()
    head = stream.read(PREAMBLE_BYTES + len(MAGIC))
    if head[PREAMBLE_BYTES:] == MAGIC:
        start += len(head)
    stream.seek(start)
    first = stream.read(6)
    stream.seek(start)
    walk = _Walk(stream, implicit=first[4:6] not in _SHORT | _LONG, little_endian=True, wanted=None)
    meta: dict[int, Value] = {}
    try:
        start = walk.file_meta(meta)
    except _DamageError:
        raise EOFError from None
    stream.seek(start)
    first = stream.read(6)
    stream.seek(start)
    stated = (meta[_TRANSFER_SYNTAX].data or b"").decode("ascii", "replace") if _TRANSFER_SYNTAX in meta else ""
    stated = stated.strip(" \0")
    if stated == DeflatedExplicitVRLittleEndian:
        return Encoding(meta, start, stated, stated=True, implicit=False, little_endian=True)
    explicit = first[4:6] in _SHORT | _LONG
    little = stated != ExplicitVRBigEndian
    if not stated:  # a group below 256, read in the wrong byte order, is a multiple of 256
        little = not (explicit and first[0] == 0 and first[1] != 0)
    guessed = (ExplicitVRLittleEndian if little else ExplicitVRBigEndian) if explicit else ImplicitVRLittleEndian
    return Encoding(meta, start, stated or str(guessed), bool(stated), implicit=not explicit, little_endian=little)


def open_data_set(stream: BinaryIO, encoding: Encoding) -> BinaryIO:
    """Return a stream at the start of the data set of a file, unpacked if the data set is deflated."""
    stream.seek(encoding.start)
    return inflated(stream) if encoding.deflated else stream


def read_elements(stream: BinaryIO, encoding: Encoding, wanted: frozenset[int]) -> Header:
    """Read the header of a DICOM file up to its pixel data.

    Args:
        stream: the file, open for reading.
        encoding: encoding of the file.
        wanted: tags of the elements to keep, at the top level and in wanted sequences.
    """
    data_set = open_data_set(stream, encoding)
    walk = _Walk(data_set, implicit=encoding.implicit, little_endian=encoding.little_endian, wanted=wanted)
    elements: dict[int, Value] = {}
    pixels, damage = None, ""
    try:
        found = walk.data_set(elements)
        if found is not None:
            tag, vr, length = found
            pixels = PixelLocation(
                keyword_for_tag(tag),
                vr,
                length,
                data_set.tell(),
                encoding.start,
                encoding.little_endian,
                encoding.deflated,
            )
    except _DamageError as error:
        damage = str(error)
    except DeflateError:
        damage = "the deflated data set is damaged or too large"
    return Header(encoding, elements, pixels, damage)


@dataclass
class _Walk:
    """Walk through the elements of a stream, with limits for all of them together."""

    stream: BinaryIO
    implicit: bool
    little_endian: bool
    wanted: frozenset[int] | None
    _elements: int = field(default=0, init=False)
    _bytes: int = field(default=0, init=False)
    _tag: int = field(default=0, init=False)

    def file_meta(self, into: dict[int, Value]) -> int:
        """Read group 2 and return the position after it."""
        while True:
            at = self.stream.tell()
            head = self.stream.read(4)
            self.stream.seek(at)
            if head[:2] != b"\x02\x00":
                return at
            found = self._start()
            if found is None:
                return at
            tag, vr, length = found
            if length == UNDEFINED_LENGTH:
                raise self._damage("has no length")
            self._keep(into, tag, Value(vr, self._value(length)))

    def data_set(self, into: dict[int, Value]) -> tuple[int, str, int] | None:
        """Read elements up to the pixel data; return tag, value representation and length of the pixel data."""
        while (found := self._start()) is not None:
            tag, vr, length = found
            if tag in _PIXELS:
                return found
            self._element(into, tag, vr, length, 0)
        return None

    def _element(self, into: dict[int, Value], tag: int, vr: str, length: int, depth: int) -> None:
        wanted = self.wanted is None or tag in self.wanted
        sequence = vr == "SQ" or (wanted and vr in ("", "UN") and tag in _SEQUENCES)
        if sequence and wanted:
            self._keep(into, tag, Value(vr, None, tuple(self._items(length, depth, keep=True, vr=vr))))
        elif length == UNDEFINED_LENGTH:
            for _ in self._items(length, depth, keep=False, vr=vr):
                pass
        elif wanted:
            self._keep(into, tag, Value(vr, self._value(length)))
        else:
            self._skip(length)

    def _items(self, length: int, depth: int, *, keep: bool, vr: str) -> list[Elements]:
        """Read the items of a sequence, or skip them."""
        if depth >= _MOST_DEPTH:
            raise self._damage("contains too many nested sequences")
        if length != UNDEFINED_LENGTH and not keep:
            self._skip(length)
            return []
        owner, implicit = self._tag, self.implicit
        end = None if length == UNDEFINED_LENGTH else self.stream.tell() + length
        items: list[Elements] = []
        while end is None or self.stream.tell() < end:
            self._count()
            head = self._read(8)
            tag, item_length = self._tag_of(head), struct.unpack(self._order + "I", head[4:])[0]
            if tag == _SEQUENCE_END:
                break
            if tag != _ITEM:
                raise self._damage("contains no valid items")
            if vr == "UN":
                self.implicit = self._next_is_implicit()
            item: dict[int, Value] = {}
            if item_length != UNDEFINED_LENGTH and not keep:
                self._skip(item_length)
            else:
                self._item(item, item_length, depth + 1, keep=keep)
            self._tag = owner
            if keep:
                items.append(item)
        self.implicit = implicit
        return items

    def _item(self, into: dict[int, Value], length: int, depth: int, *, keep: bool) -> None:
        end = None if length == UNDEFINED_LENGTH else self.stream.tell() + length
        while end is None or self.stream.tell() < end:
            found = self._start()
            if found is None:
                raise self._damage("is cut off")
            tag, vr, element_length = found
            if tag == _ITEM_END:
                return
            if keep:
                self._element(into, tag, vr, element_length, depth)
            elif element_length == UNDEFINED_LENGTH:
                self._items(element_length, depth, keep=False, vr=vr)
            else:
                self._skip(element_length)

    def _start(self) -> tuple[int, str, int] | None:
        """Read tag, value representation and length of the next element; None at the end of the stream."""
        self._count()
        head = self.stream.read(8)
        if not head:
            return None
        if len(head) < 8:
            raise self._damage("is followed by the end of the file within an element")
        self._tag = self._tag_of(head)
        vr = head[4:6]
        if self.implicit or self._tag >> 16 == 0xFFFE or not (vr in _LONG or (vr.isalpha() and vr.isupper())):
            return self._tag, "", struct.unpack(self._order + "I", head[4:])[0]
        if vr in _LONG:
            return self._tag, vr.decode("ascii"), struct.unpack(self._order + "I", self._read(4))[0]
        return self._tag, vr.decode("ascii"), struct.unpack(self._order + "H", head[6:])[0]

    def _next_is_implicit(self) -> bool:
        """Return True for implicit encoding, as PS3.5 section 6.2.2 demands within a sequence of representation UN."""
        at = self.stream.tell()
        head = self.stream.read(6)
        self.stream.seek(at)
        return head[4:6] not in _SHORT | _LONG

    def _value(self, length: int) -> bytes | None:
        if length > _MOST_VALUE_BYTES:
            self._skip(length)
            return None
        self._bytes += length
        if self._bytes > _MOST_BYTES:
            raise self._damage("exceeds the largest size of a header")
        return self._read(length)

    def _keep(self, into: dict[int, Value], tag: int, value: Value) -> None:
        old = into.get(tag)
        if old is None:
            into[tag] = value
        elif old.data != value.data or old.items != value.items:
            into[tag] = Value(old.vr, old.data, old.items, repeated=True)

    def _skip(self, length: int) -> None:
        if length:
            self.stream.seek(self.stream.tell() + length - 1)
            self._read(1)

    def _read(self, length: int) -> bytes:
        data = self.stream.read(length)
        if len(data) < length:
            raise self._damage("is cut off by the end of the file")
        return data

    def _count(self) -> None:
        self._elements += 1
        if self._elements > _MOST_ELEMENTS:
            raise self._damage("is part of a header with too many elements")

    def _damage(self, what: str) -> _DamageError:
        return _DamageError(f"{element_name(self._tag)} {what}" if self._tag else "the header is cut off")

    def _tag_of(self, head: bytes) -> int:
        group, element = struct.unpack(self._order + "HH", head[:4])
        return int(group) << 16 | int(element)

    @property
    def _order(self) -> str:
        return "<" if self.little_endian else ">"


_SEQUENCES = frozenset(
    int(tag_for_keyword(keyword) or 0)
    for keyword in (
        "ModalityLUTSequence",
        "SharedFunctionalGroupsSequence",
        "PerFrameFunctionalGroupsSequence",
        "PixelMeasuresSequence",
        "PlanePositionSequence",
        "PlaneOrientationSequence",
        "PixelValueTransformationSequence",
        "CTImageFrameTypeSequence",
        "CTReconstructionSequence",
    )
)
