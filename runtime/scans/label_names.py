"""Names of label values inside a NIfTI file: the header extension with the label table of Caret.

TotalSegmentator writes this table with extension code 0 and reads it from the first extension of a file. Connectome
Workbench, for which the table was made, reads it only with the registered code 30 (``src/Files/VolumeFile.cxx``). A
mask therefore contains the same table twice, first with code 0. The form of an extension is defined in ``nifti1.h``
(https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING
from xml.parsers import expat
from xml.sax.saxutils import escape

from fseft_edge.runtime.scans.organs import organ_colour

if TYPE_CHECKING:
    from xml.parsers.expat import XMLParserType

_CODES = (0, 30)
_HEAD = struct.Struct("<ii")
"""Size of an extension in bytes, this head included, and its code."""

_ALIGNMENT = 16
_ROOT = b"<CaretExtension"


class BadLabelTableError(Exception):
    """A label table of Caret is not the XML that it must be."""


def extensions_of(names: Mapping[int, str]) -> list[tuple[int, bytes]]:
    """Return code and content of the header extensions with a name and a colour for each label value.

    Args:
        names: name of each label value. Equal mappings give equal bytes, whatever their order.

    Returns:
        No extension without names; else contents that need no padding.
    """
    if not names:
        return []
    labels = "\n".join(_label(number, value, names[value]) for number, value in enumerate(sorted(names), start=1))
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<CaretExtension>\n<VolumeInformation Index="0">\n<LabelTable>\n'
        f"{labels}\n</LabelTable>\n<StudyMetaDataLinkSet></StudyMetaDataLinkSet>\n<VolumeType>Label</VolumeType>\n"
        "</VolumeInformation>\n</CaretExtension>\n"
    ).encode()
    # Spaces after the root element are XML; readers that keep zero bytes would have to remove them before parsing.
    text += b" " * (-(_HEAD.size + len(text)) % _ALIGNMENT)
    return [(code, text) for code in _CODES]


def packed(extensions: Sequence[tuple[int, bytes]]) -> bytes:
    """Return header extensions as little-endian bytes for the place between the extension flag and the voxels."""
    return b"".join(_HEAD.pack(_HEAD.size + len(content), code) + content for code, content in extensions)


def names_in(extensions: bytes, byte_order: str) -> dict[int, str]:
    """Return the names of the first label table in header extensions; no names if there is none.

    Args:
        extensions: bytes between the extension flag and the voxels.
        byte_order: ``"<"`` or ``">"``, the byte order of the header.

    Raises:
        BadLabelTableError: the label table is damaged, or gives two names to one label value.
    """
    for content in _contents(extensions, byte_order):
        if _ROOT in content[:1024]:
            return _parsed(content.rstrip(b"\0"))
    return {}


def _label(number: int, value: int, name: str) -> str:
    red, green, blue = (f"{part / 255:.6f}" for part in organ_colour(number))
    return f'<Label Key="{value}" Red="{red}" Green="{green}" Blue="{blue}" Alpha="1">{escape(name)}</Label>'


def _contents(extensions: bytes, byte_order: str) -> Iterator[bytes]:
    start = 0
    while start + _HEAD.size <= len(extensions):
        size, _ = struct.unpack_from(f"{byte_order}ii", extensions, start)
        if size <= _HEAD.size or start + size > len(extensions):
            return  # no extension: some programs leave other bytes here
        yield extensions[start + _HEAD.size : start + size]
        start += size


def _parsed(content: bytes) -> dict[int, str]:
    names: dict[int, str] = {}
    reader = _LabelReader(names)
    parser: XMLParserType = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = _no_doctype
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError, KeyError) as error:
        raise BadLabelTableError from error
    return names


def _no_doctype(*_: object) -> None:
    """Refuse a document type, and with it every definition of an entity."""
    raise BadLabelTableError


class _LabelReader:
    """Handlers of an expat parser that collect the elements ``<Label Key="6" ...>liver</Label>``."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names
        self._key: int | None = None
        self._text: list[str] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "Label":
            self._key, self._text = int(attributes["Key"]), []

    def text(self, data: str) -> None:
        self._text.append(data)

    def end(self, tag: str) -> None:
        if tag != "Label" or self._key is None:
            return
        name = "".join(self._text).strip()
        if self._names.setdefault(self._key, name) != name:
            raise BadLabelTableError
        self._key = None
