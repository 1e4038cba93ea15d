"""Reading of NRRD files: http://teem.sourceforge.net/nrrd/format.html.

**Library.** pynrrd reads the header: it is small, pure Python, and knows nothing but NRRD, so that what the header says
arrives here as it is stored. SimpleITK would read NRRD and MetaImage, but it reads all voxels into memory, takes an
image without axes, origin or known space as if it had them, ends the process at some damaged headers, and would be the
only reader, so that no other program could check this one. The tests compare what is read here with SimpleITK. Three
corrections are made here: the header is decoded as UTF-8, of which pynrrd drops all letters that are not ASCII; escaped
characters of values are replaced; and sizes with a fraction, which pynrrd cuts off, are refused.
:mod:`fseft_edge.runtime.scans.stored_image` reads the voxels.

**Geometry.** The spaces RAS, LAS and LPS say where left and right are, and are read. ``scanner-xyz``,
``3D-right-handed``, ``3D-left-handed`` and ``space dimension`` say this only together with knowledge about the scanner:
such an image is refused, and so is an image without space, axes (``space directions``) or origin (``space origin``).
The unit of length is mm; other units are refused, because 3D Slicer and ITK ignore them. Axes that are not
perpendicular are read, with a warning. The measurement frame turns vectors within voxels, and has no meaning for
intensities and label values. An axis of values within a voxel (``none`` in ``space directions``) is kept only if it is
longer than 1.

**Encodings.** raw, text, gzip and bzip2, in the file itself or in one other file. An image in several data files and
the encoding hex are refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import GeometryError, UnreadableFileError
from fseft_edge.runtime.scans.stored_image import (
    CONVERT,
    COPY_AGAIN,
    Encoding,
    StoredImage,
    VoxelBlock,
    affine_of,
    file_of_voxels,
    read_block,
    unreadable,
)

_TO_RAS: Final = {
    "right-anterior-superior": (1.0, 1.0, 1.0),
    "ras": (1.0, 1.0, 1.0),
    "left-anterior-superior": (-1.0, 1.0, 1.0),
    "las": (-1.0, 1.0, 1.0),
    "left-posterior-superior": (-1.0, -1.0, 1.0),
    "lps": (-1.0, -1.0, 1.0),
}
"""Signs that lead from a space of NRRD to RAS+."""

_ENCODINGS: Final[Mapping[str, Encoding]] = {
    "raw": "raw",
    "txt": "text",
    "text": "text",
    "ascii": "text",
    "gz": "gzip",
    "gzip": "gzip",
    "bz2": "bzip2",
    "bzip2": "bzip2",
}
_TYPES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(
        ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"), "i8"
    ),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
_ENDIAN: Final[Mapping[str, Literal["<", ">"]]] = {"little": "<", "big": ">"}
_MILLIMETRES: Final = ("mm", "millimeter", "millimeters", "millimetre", "millimetres", "")

_MAGIC: Final = b"NRRD"
_LONGEST_HEADER: Final = 4 << 20
_MOST_AXES: Final = 16
"""``NRRD_DIM_MAX`` of teem."""

_ESCAPED: Final = re.compile(r"\\([n\\])")
_WHOLE_NUMBERS: Final = re.compile(r"(\s*-?[0-9]{1,15})+\s*")


@dataclass(frozen=True, eq=False)
class NrrdImage:
    """An NRRD file.

    Attributes:
        image: the image. An axis of values within a voxel that is longer than 1 stands where the file has it.
        spatial: the three axes of space among the axes of the image.
        values: the key/value pairs of the header, such as ``Segment0_Name``.
    """

    image: StoredImage
    spatial: tuple[int, int, int]
    values: Mapping[str, str]


def read_nrrd(path: Path) -> NrrdImage:
    """Read an NRRD file, with or without a detached header.

    Args:
        path: file of the header.

    Raises:
        UnreadableFileError: the file is missing, a folder, truncated, damaged, or not a supported NRRD file.
        GeometryError: space, axes or origin are missing, unknown or impossible.
        OutOfSpaceError: the temporary folder has too little disk space for the unpacked voxels.
    """
    fields, values, end = _header(path)
    shape = _shape(fields, path)
    axes, spatial = _axes(fields, shape, path)
    affine, warnings = affine_of(axes, _origin(fields, path), tuple(shape[axis] for axis in spatial), path)
    array, more = read_block(_block(fields, shape, end, path), path)
    # Axes of length one within a voxel add nothing.
    kept = [axis for axis in range(len(shape)) if axis in spatial or shape[axis] > 1]
    array = array.reshape([shape[axis] for axis in kept], order="F")
    x, y, z = (kept.index(axis) for axis in spatial)
    return NrrdImage(StoredImage(array, affine, warnings + more), (x, y, z), values)


def _header(path: Path) -> tuple[Mapping[str, Any], Mapping[str, str], int]:
    """Return the fields and the key/value pairs of a header, and the place behind it."""
    import nrrd  # type: ignore[import-untyped]  # noqa: PLC0415 - only NRRD files need it; it has no type hints

    try:
        with path.open("rb") as file:
            lines, end = _lines(file, path)
    except OSError as error:
        raise unreadable(path, error) from error
    pairs = [line.split(":=", 1) for line in lines[1:] if _is_pair(line)]
    values = {key: _unescaped(value) for key, value in pairs}
    if len(values) < len(pairs):
        raise _damaged(path, "its header contains a key twice")
    try:
        return nrrd.read_header(list(_field_lines(lines))), values, end
    except (nrrd.NRRDError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise _damaged(path, "its header contains a line that is not valid") from error


def _lines(file: IO[bytes], path: Path) -> tuple[list[str], int]:
    """Return the lines of a header, without the empty line that ends it, and the place behind that line."""
    lines: list[str] = []
    length = 0
    while (line := file.readline(_LONGEST_HEADER)).strip() and (lines or line.startswith(_MAGIC)):
        length += len(line)
        if length >= _LONGEST_HEADER:
            raise _damaged(path, "its header does not end")
        lines.append(line.decode("utf-8", "replace").rstrip())
    if not lines:
        if path.stat().st_size == 0:
            raise UnreadableFileError(f"{path} is empty: it has 0 bytes.", remedy=COPY_AGAIN)
        raise UnreadableFileError(f"{path} is not an NRRD file.", remedy="Give an NRRD, MetaImage or NIfTI file.")
    return lines, file.tell()


def _is_pair(line: str) -> bool:
    """Return True for ``key:=value``. A field has the form ``field: value``; no name of a field contains a colon."""
    return not line.startswith("#") and line.partition(":")[2].startswith("=")


def _field_lines(lines: list[str]) -> Iterator[str]:
    """Yield the lines of a header with fields, whose names are compared without regard to case, for pynrrd."""
    yield lines[0]
    for line in lines[1:]:
        field, colon, value = line.partition(":")
        if field.lower() == "sizes" and not _WHOLE_NUMBERS.fullmatch(value):
            raise ValueError  # pynrrd would cut off what follows the point
        if not _is_pair(line) and not line.startswith("#"):
            yield f"{field.lower()}{colon}{value}"
        if field.lower() in ("data file", "datafile") and value.split(maxsplit=1)[:1] == ["LIST"]:
            return  # the names of files follow


def _unescaped(value: str) -> str:
    return _ESCAPED.sub(lambda found: "\n" if found[1] == "n" else "\\", value)


def _shape(fields: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    if missing := [field for field in ("dimension", "sizes", "type", "encoding") if field not in fields]:
        raise _damaged(path, f"its header has no {missing[0]}")
    shape = tuple(int(size) for size in fields["sizes"])
    if len(shape) != fields["dimension"] or len(shape) > _MOST_AXES:
        raise _damaged(path, f"its header has {fields['dimension']} axes, but {len(shape)} sizes")
    return shape


def _axes(
    fields: Mapping[str, Any], shape: tuple[int, ...], path: Path
) -> tuple[NDArray[np.float64], tuple[int, int, int]]:
    """Return the three steps from voxel to voxel as columns in RAS+ mm, and the axes of the image they belong to."""
    signs = _signs(fields, path)
    if "space directions" not in fields:
        raise GeometryError(f"{path} has no geometry: it has no 'space directions'.", remedy=CONVERT)
    directions = np.asarray(fields["space directions"], np.float64)
    if directions.shape != (len(shape), 3):
        raise _damaged(path, f"its 'space directions' do not belong to {len(shape)} axes in a space of three")
    spatial = [axis for axis, step in enumerate(directions) if not np.isnan(step).all()]
    if len(spatial) != 3:
        raise GeometryError(
            f"{path} has {len(spatial)} axes in space instead of 3.",
            remedy="Give one three-dimensional image. Split a time series into single phases.",
        )
    if "spacings" in fields and np.isfinite(np.asarray(fields["spacings"], np.float64)[spatial]).any():
        raise GeometryError(
            f"{path} has two geometries: 'spacings' and 'space directions' of the same axes.", remedy=CONVERT
        )
    x, y, z = spatial
    return np.asarray(signs)[:, None] * directions[spatial].T, (x, y, z)


def _signs(fields: Mapping[str, Any], path: Path) -> tuple[float, float, float]:
    space = str(fields.get("space", "")).lower()
    if space not in _TO_RAS:
        stated = f"its space is {space!r}" if space else "it has no 'space'"
        raise GeometryError(f"{path} does not say where left and right are: {stated}.", remedy=CONVERT)
    units = [str(unit).strip().lower() for unit in fields.get("space units", [])]
    if other := [unit for unit in units if unit not in _MILLIMETRES]:
        raise GeometryError(
            f"{path} gives its lengths in {other[0]!r}, which 3D Slicer and ITK read as mm.",
            remedy=f"{CONVERT} If the lengths are in mm, remove the line 'space units' from the header.",
        )
    return _TO_RAS[space]


def _origin(fields: Mapping[str, Any], path: Path) -> NDArray[np.float64]:
    if "space origin" not in fields:
        raise GeometryError(f"{path} has no position: it has no 'space origin'.", remedy=CONVERT)
    origin = np.asarray(fields["space origin"], np.float64)
    if origin.shape != (3,):
        raise _damaged(path, "its 'space origin' does not have three numbers")
    return origin * _signs(fields, path)


def _block(fields: Mapping[str, Any], shape: tuple[int, ...], end: int, path: Path) -> VoxelBlock:
    name = fields.get("data file", fields.get("datafile"))
    file = path if name is None else file_of_voxels(path, name)
    encoding = _ENCODINGS.get(str(fields["encoding"]).lower())
    kind = _TYPES.get(str(fields["type"]).lower())
    if encoding is None or kind is None:
        raise UnreadableFileError(
            f"{path} stores its voxels as {fields['type']!r} with the encoding {fields['encoding']!r}, which is not "
            "supported.",
            remedy="Save the image with numbers as voxels, uncompressed or compressed with gzip.",
        )
    order = _ENDIAN.get(str(fields.get("endian", "")).lower())
    if order is None and encoding != "text" and np.dtype(kind).itemsize > 1:
        raise _damaged(path, "its header does not state the byte order ('endian')")
    dtype = np.dtype(kind).newbyteorder(order or "=")
    lines = int(fields.get("line skip", fields.get("lineskip", 0)))
    skip = int(fields.get("byte skip", fields.get("byteskip", 0)))
    if lines < 0 or skip < -1 or (skip == -1 and encoding != "raw"):
        raise _damaged(path, "its 'line skip' or 'byte skip' is not possible")
    try:
        start = _behind_lines(file, end if file == path else 0, lines)
    except OSError as error:
        raise unreadable(path, error) from error
    if encoding == "raw":
        return VoxelBlock(file, None if skip == -1 else start + skip, encoding, dtype, shape)
    return VoxelBlock(file, start, encoding, dtype, shape, skip)


def _behind_lines(file: Path, start: int, lines: int) -> int:
    with file.open("rb") as stream:
        stream.seek(start)
        for _ in itertools.repeat(None, lines):
            if not stream.readline():
                break
        return stream.tell()


def _damaged(path: Path, what: str) -> UnreadableFileError:
    return UnreadableFileError(f"{path} is damaged: {what}.", remedy=COPY_AGAIN)
