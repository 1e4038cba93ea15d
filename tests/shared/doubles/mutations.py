"""Mutations of files: bytes, NIfTI headers, DICOM elements, JSON, text, tensors and databases.

Each function takes a generator of random numbers and returns the changed content and what was changed, in words. Equal
generators give equal changes.
"""

from __future__ import annotations

import json
import math
import sqlite3
import struct
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

Random = np.random.Generator
Mutation = Callable[[bytes, Random], tuple[bytes, str]]

_NUMBERS = (0.0, -1.0, 1.0, 0.5, -0.0, 2.0, 1e-45, 1e-6, 1e6, 1e38, -1e38, math.nan, math.inf, -math.inf)
_DEEP = "@deep@"
_DEEP_LEVELS = 100_000


def _one_of(random: Random, values: Sequence[Any]) -> Any:
    return values[int(random.integers(len(values)))]


# Bytes


def of_bytes(content: bytes, random: Random) -> tuple[bytes, str]:
    """Flip bits, overwrite, cut, insert, duplicate or exchange bytes anywhere in a file."""
    if not content:
        return b"\0", "one byte in an empty file"
    changed = bytearray(content)
    start = int(random.integers(len(content)))
    length = int(min(1 + random.integers(64), len(content) - start))
    piece = content[start : start + length]
    kind = _one_of(random, ("flip", "flip", "flip", "zeros", "ones", "cut", "cut", "insert", "duplicate", "swap"))
    if kind == "flip":
        for place in random.integers(len(content), size=int(random.integers(1, 5))):
            changed[int(place)] ^= 1 << int(random.integers(8))
    elif kind in ("zeros", "ones"):
        changed[start : start + length] = (b"\0" if kind == "zeros" else b"\xff") * length
    elif kind == "cut":
        del changed[start : len(changed) if random.random() < 0.7 else start + length]
    elif kind == "insert":
        changed[start:start] = random.bytes(length)
    elif kind == "duplicate":
        changed[start:start] = piece
    else:
        other = int(random.integers(len(content) - length + 1))
        changed[start : start + length], changed[other : other + length] = content[other : other + length], piece
    return bytes(changed), f"bytes: {kind} at {start}, {length} long"


def of_the_beginning(length: int) -> Mutation:
    """Return the mutation of bytes, limited to the first bytes of a file, where its header is."""

    def mutation(content: bytes, random: Random) -> tuple[bytes, str]:
        head, what = of_bytes(content[:length], random)
        return head + content[length:], f"{what}, in the header"

    return mutation


# NIfTI


def of_nifti_header(content: bytes, random: Random) -> tuple[bytes, str]:
    """Set a field of the header of an unpacked NIfTI file to an extreme, a usual or a slightly different value."""
    kind, order = next(
        (kind, order)
        for kind in (nib.Nifti1Header, nib.Nifti2Header)
        for order in ("<", ">")
        if int.from_bytes(content[:4], "little" if order == "<" else "big") == kind.sizeof_hdr
    )
    header = np.frombuffer(content[: kind.sizeof_hdr], kind.template_dtype.newbyteorder(order)).copy()
    names = [name for name in header.dtype.names or () if header.dtype[name].base.kind in "iuf"]
    important = (
        *("dim", "pixdim", "srow_x", "srow_y", "srow_z", "sform_code", "qform_code", "quatern_b", "quatern_c"),
        *("quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "scl_slope", "scl_inter", "xyzt_units", "vox_offset"),
        *("datatype", "bitpix", "sizeof_hdr"),
    )
    said = []
    for _ in range(int(random.integers(1, 3))):
        name = _one_of(random, important if random.random() < 0.8 else names)
        field = header[name].reshape(-1)
        place = int(random.integers(field.size))
        old = field[place]
        with np.errstate(all="ignore"):
            if field.dtype.kind == "f":
                choices = (*_NUMBERS, old * 1.3, old * (1 + 1e-6), old * (1 + 1e-4), -old, old + 30, old * 1000)
                field[place] = _one_of(random, choices)
            else:
                limits = np.iinfo(field.dtype)
                choices = (0, 1, 2, 3, 4, 8, 16, 64, 255, int(old) + 1, limits.min, limits.max, int(old) ^ 1)
                field[place] = np.array(_one_of(random, choices)).astype(field.dtype)
        said.append(f"{name}[{place}] = {field[place]}")
    return header.tobytes() + content[kind.sizeof_hdr :], f"NIfTI header: {', '.join(said)}"


# DICOM


@dataclass(frozen=True)
class _Element:
    start: int
    value: int
    end: int
    explicit: bool

    def tag(self, content: bytes) -> int:
        group, element = struct.unpack_from("<HH", content, self.start)
        return int(group << 16 | element)


_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_PREAMBLE = 132
_IMPLICIT = b"1.2.840.10008.1.2\0"
_DECIMAL = (
    "5,0",
    "abc",
    "",
    "1e400",
    "-0",
    "nan",
    "9" * 20,
    "0",
    "-1",
    "1e-30",
    "2.5",
    " 1 ",
    "1\0",
    "\xb5",
    "0.70000001",
)
_WORDS = ("", "1.2.3", "x", "1" * 70, "\xff\xfe", "CT", "MR", "A\\B", "HU", "OTHER", "MONOCHROME1", "LOCALIZER", "1..2")
_UNUSUAL_VRS = (b"UN", b"DS", b"US", b"SS", b"LO", b"SQ", b"OB", b"IS", b"FD", b"UI", b"XX", b"\0\0", b"AT")
_USED_TAGS = (
    *(0x00020010, 0x00080016, 0x00080060, 0x00080008, 0x00100020, 0x0020000D, 0x0020000E, 0x00200032, 0x00200037),
    *(0x00200052, 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011, 0x00280030, 0x00280100, 0x00280101),
    *(0x00280102, 0x00280103, 0x00280120, 0x00281052, 0x00281053, 0x00281054, 0x7FE00010),
)


def of_dicom_elements(content: bytes, random: Random) -> tuple[bytes, str]:
    """Change, remove, duplicate or move an element of a little-endian DICOM file, or its VR or length."""
    elements = _elements(content)
    used = [element for element in elements if element.tag(content) in _USED_TAGS]
    nested = _nested(content)
    chosen = _one_of(random, used if used and random.random() < 0.7 else elements)
    if nested and random.random() < 0.4:
        chosen = _one_of(random, nested)
    kind = _one_of(random, ("value", "value", "value", "value", "length", "vr", "remove", "duplicate", "move"))
    tag, whole = chosen.tag(content), content[chosen.start : chosen.end]
    before, after = content[: chosen.start], content[chosen.end :]
    said = f"DICOM ({tag >> 16:04X},{tag & 0xFFFF:04X}): {kind}"
    if kind == "remove":
        return before + after, said
    if kind == "duplicate":
        return before + whole + whole + after, said
    if kind == "move":
        place = _one_of(random, elements).start
        rest = before + after
        place = min(place, len(rest))
        return rest[:place] + whole + rest[place:], said
    long = not chosen.explicit or content[chosen.start + 4 : chosen.start + 6] in _LONG
    if kind == "vr" and chosen.explicit:
        vr = _one_of(random, _UNUSUAL_VRS)
        return content[: chosen.start + 4] + vr + content[chosen.start + 6 :], f"{said} {vr!r}"
    if kind == "length":
        length = int(_one_of(random, (0, 1, 2, 7, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF, chosen.end - chosen.value + 2)))
        written = struct.pack("<I", length) if long else struct.pack("<H", length & 0xFFFF)
        return content[: chosen.value - len(written)] + written + content[chosen.value :], f"{said} {length}"
    value = _unusual_value(content[chosen.value : chosen.end], tag, random)
    if chosen in nested:  # the lengths of the sequences around stay right
        value = value[: chosen.end - chosen.value].ljust(chosen.end - chosen.value, b" ")
    written = struct.pack("<I", len(value)) if long else struct.pack("<H", len(value) & 0xFFFF)
    return content[: chosen.value - len(written)] + written + value + after, f"{said} {value[:40]!r}"


def _elements(content: bytes) -> list[_Element]:
    place = _PREAMBLE if content[128:132] == b"DICM" else 0
    implicit = _IMPLICIT in content[place : place + 400]
    found = []
    while place + 8 <= len(content):
        group = struct.unpack_from("<H", content, place)[0]
        explicit = group == 2 or not implicit
        element = _element(content, place, explicit=explicit)
        found.append(element)
        place = element.end
    return found


def _element(content: bytes, place: int, *, explicit: bool) -> _Element:
    if not explicit:
        value, length = place + 8, struct.unpack_from("<I", content, place + 4)[0]
    elif content[place + 4 : place + 6] in _LONG:
        value, length = place + 12, struct.unpack_from("<I", content, place + 8)[0]
    else:
        value, length = place + 8, struct.unpack_from("<H", content, place + 6)[0]
    return _Element(place, value, min(value + length, len(content)), explicit)


def _nested(content: bytes) -> list[_Element]:
    """Return the elements within sequences that a reader of enhanced CT uses."""
    found = []
    for tag in (0x00200032, 0x00200037, 0x00280030, 0x00281052, 0x00281053, 0x00281054):
        pattern = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + (b"LO" if tag == 0x00281054 else b"DS")
        place = content.find(pattern)
        while place >= 0:
            found.append(_element(content, place, explicit=True))
            place = content.find(pattern, place + 1)
    return found if b"\x00\x52\x29\x92SQ" in content or b"\x00\x52\x30\x92SQ" in content else []


def _unusual_value(value: bytes, tag: int, random: Random) -> bytes:
    if tag >> 16 == 0x7FE0:
        return of_bytes(value, random)[0] if value else b"\0\0"
    if tag in (0x00280002, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102, 0x00280103, 0x00280120):
        choices = (0, 1, 2, 3, 8, 12, 15, 16, 32, 255, 32768, 65535)
        count = _one_of(random, (1, 1, 1, 1, 2, 0))
        return b"".join(struct.pack("<H", _one_of(random, choices)) for _ in range(count))
    text = value.decode("latin-1")
    if tag in (0x00200032, 0x00200037, 0x00280030, 0x00281052, 0x00281053):
        parts = text.split("\\")
        place = int(random.integers(len(parts)))
        how = _one_of(random, ("unusual", "unusual", "near", "near", "far", "fewer", "more"))
        if how == "unusual":
            parts[place] = _one_of(random, _DECIMAL)
        elif how == "fewer":
            del parts[place]
        elif how == "more":
            parts.insert(place, "1")
        else:
            number = float(parts[place].strip(" \0") or 0)
            factor = _one_of(random, (1e-4, 2e-4, 1e-3, 0.01) if how == "near" else (1.0, -2.0, 30.0))
            parts[place] = f"{number + factor:.8g}"
        text = "\\".join(parts)
    else:
        text = _one_of(random, (*_WORDS, *_DECIMAL, text[: len(text) // 2], text + text))
    written: bytes = text.encode("latin-1")
    return written + b" " * (len(written) % 2)


# JSON


def of_json(content: bytes, random: Random) -> tuple[bytes, str]:
    """Remove, rename, exchange or replace a value or key anywhere in a JSON document."""
    changed, what = of_tree(json.loads(content), random)
    return json_text(changed).encode("utf-8", "surrogatepass"), f"JSON: {what}"


def json_text(tree: object) -> str:
    """Return a JSON document; a value may stand for lists that are nested more deeply than :mod:`json` can write."""
    return json.dumps(tree).replace(f'"{_DEEP}"', "[" * _DEEP_LEVELS + "]" * _DEEP_LEVELS)


def of_tree(tree: Any, random: Random, *, same_type: bool = False) -> tuple[Any, str]:
    """Change one value or key of nested dictionaries and lists.

    Args:
        tree: what :mod:`json` reads.
        random: source of the choice.
        same_type: only replace a number, text or truth value by another one, so that a schema accepts most changes.
    """
    copy = json.loads(json.dumps(tree))
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            if not same_type or not isinstance(node[key], dict | list):
                places.append((node, key))
            if isinstance(node[key], dict | list):
                collect(node[key])

    if isinstance(copy, dict | list):
        collect(copy)
    if not places or (not same_type and random.random() < 0.02):
        value = _one_of(random, (None, [], {}, "", 1, _DEEP, [copy]))
        return value, f"the whole document = {str(value)[:30]}"
    node, key = _one_of(random, places)
    kind = _one_of(random, ("replace", "replace", "replace", "near", "remove", "rename", "repeat"))
    if same_type:
        kind = "near"
    if kind == "remove":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[_one_of(random, ("", "x", f"{key}_", str(key).upper(), "__proto__", "\ud800"))] = node.pop(key)
    elif kind == "repeat" and isinstance(node, list):
        node.insert(key, node[key])
    else:
        node[key] = _unusual(node[key], random, near=kind == "near")
    return copy, f"{kind} {str(key)[:40]!r}"


def _unusual(value: Any, random: Random, *, near: bool) -> Any:
    if near and isinstance(value, bool):
        return not value
    if near and isinstance(value, int | float):
        others = (value + 1, value - 1, -value, value * 1_000_000, 0, 2, 3, 7, 2**31, 1e-9 if value % 1 else 1)
        return _one_of(random, others)
    if near and isinstance(value, str):
        return _one_of(random, (value + "x", value[:-1], value.upper(), value * 2, value[::-1], "../../x", "a/b", ""))
    choices = (
        *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 0.5, -0.0, 1e308, math.nan, math.inf),
        *("", "x", "0", "../../x", "a/b", "\0", "\ud800", "é" * 300, "liver", _DEEP),
        *([], [[]], [None], {}, {"": {}}, [value], {"x": value}, [value, value]),
    )
    return _one_of(random, choices)


# Text


def of_text(content: bytes, random: Random) -> tuple[bytes, str]:
    """Change lines, words, quotes or the encoding of a text file, such as CSV or TOML."""
    lines = content.split(b"\n")
    place = int(random.integers(len(lines)))
    kind = _one_of(
        random, ("remove", "repeat", "exchange", "word", "word", "word", "word", "quote", "encoding", "deep")
    )
    if kind == "remove":
        del lines[place]
    elif kind == "repeat":
        lines.insert(place, lines[place])
    elif kind == "exchange":
        other = int(random.integers(len(lines)))
        lines[place], lines[other] = lines[other], lines[place]
    elif kind == "word":
        words = lines[place].split(b" ") if b"," not in lines[place] else lines[place].split(b",")
        separator = b" " if b"," not in lines[place] else b","
        words[int(random.integers(len(words)))] = _one_of(
            random,
            (
                *(
                    b"",
                    b"0",
                    b"-1",
                    b"1e400",
                    b"nan",
                    b"inf",
                    b'"',
                    b'"x"',
                    b"\xff",
                    b"\0",
                    b"x" * 200_000,
                    b"[]",
                    b"true",
                ),
                *(b"true", b"9" * 5000, b"=1+1", "é".encode(), b"1,5", b"{}", b"0x10", b"1979-05-27"),
            ),
        )
        lines[place] = separator.join(words)
    elif kind == "quote":
        lines[place] += _one_of(random, (b'"', b"'", b'"""', b"\\", b"#", b"\r", b","))
    elif kind == "deep":
        lines.insert(place, b"x = " + b"[" * 10_000 + b"]" * 10_000)
    else:
        text = content.decode("utf-8", "replace")
        encoding = _one_of(random, ("utf-16", "utf-8-sig", "utf-32"))
        return text.encode(encoding), f"text: {encoding}"
    return b"\n".join(lines), f"text: {kind} in line {place + 1}"


# Tensors


def of_safetensors(content: bytes, random: Random) -> tuple[bytes, str]:
    """Change the length of the header, the table of tensors, or the values of tensors in a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = _one_of(random, ("length", "table", "table", "values"))
    if kind == "length":
        written = int(_one_of(random, (0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 100_000_001)))
        return written.to_bytes(8, "little") + header + data, f"tensors: header length {written}"
    if kind == "values" and data:
        changed = bytearray(data)
        place = int(random.integers(max(1, len(data) // 4))) * 4
        changed[place : place + 4] = struct.pack("<f", _one_of(random, _NUMBERS))
        return content[:8] + header + bytes(changed), f"tensors: value at {place}"
    tree, what = of_tree(json.loads(header), random)
    return safetensors(json_text(tree), data), f"tensors: {what}"


def safetensors(header: str, data: bytes) -> bytes:
    """Return a safetensors file with this header and these values."""
    written = header.encode("utf-8", "surrogatepass")
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written + data


# Databases


def of_database(content: bytes, random: Random, scratch: Path) -> tuple[bytes, str]:
    """Change a value, a column, a table or the version of an SQLite file, which stays a valid SQLite file.

    Args:
        content: the file; nothing is left in a write-ahead log.
        random: source of the choice.
        scratch: name of a file for the work.
    """
    scratch.write_bytes(content)
    with closing(sqlite3.connect(scratch, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = DELETE")
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        table = _one_of(random, (*tables, "cases", "cases", "cases"))
        columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        column = _one_of(random, columns)
        kind = _one_of(random, ("value", "value", "value", "value", "column", "table", "version", "rows"))
        said = f"database: {kind} {table}.{column}"
        try:
            if kind == "value":
                value = _one_of(random, _DATABASE_VALUES)
                database.execute(f"UPDATE {table} SET {column} = ?", (value,))  # noqa: S608 - names from the schema
                said += f" = {str(value)[:30]!r}"
            elif kind == "column":
                database.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
            elif kind == "table":
                database.execute(f"DROP TABLE {table}")
            elif kind == "rows":
                database.execute(f"DELETE FROM {table}")  # noqa: S608 - a name from the schema
            else:
                database.execute(f"PRAGMA user_version = {_one_of(random, (0, 1, -1, 99, 2**31 - 1))}")
        except sqlite3.Error as error:  # a rule of the schema forbids the change
            return of_bytes(content, random)[0], f"{said} is impossible ({error}), bytes instead"
    return scratch.read_bytes(), said


_DATABASE_VALUES = (
    *("", "x", "[]", "{}", "null", "[1]", '[{"name": 1}]', '{"read": "x"}', "done", "failed", "\0", "%00", "%FF"),
    *(None, 0, -1, 1.5, 2**62, math.inf, "[" * 50_000 + "]" * 50_000, '[{"name":"a","label":1,"volume_ml":null}]'),
    *(b"\xff", "accepted", '{"read":1,"encode":2,"finish":3,"more":4}', "/absent/scan.nii.gz"),
)
