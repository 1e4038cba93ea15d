"""Reading of MetaImage files (``.mha``, and ``.mhd`` with a file of voxels): https://itk.org/Wiki/MetaIO/Documentation.

**Library.** Among kept libraries, only ITK reads MetaImage. SimpleITK (2.5.7) would add 260 MB to an installation,
reads all voxels into memory, and takes an image without ``TransformMatrix``, ``Offset`` or ``ElementSpacing`` as if it
had them; it returns wrong voxels without an error if ``CompressedDataSize`` is missing or wrong, and some changed
headers end the process. A header is some ten lines ``key = value``, so it is read here, and the tests compare what is
read with SimpleITK. ``CompressedDataSize`` is not used: the end of the data is known from the data.

**Geometry.** As in ITK, ``Offset`` and ``TransformMatrix`` lead to LPS+ mm, each row of the matrix is the direction of
one axis, and ``AnatomicalOrientation`` and ``CenterOfRotation`` have no meaning. An image without one of the keys is
refused, and so is a direction whose length is not 1.

**Encodings.** Binary values, also compressed with zlib, and text; in the file itself or in one other file. Several
values for each voxel, and values with a scale of their own (``ElementToIntensityFunctionSlope``), are refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import GeometryError, UnreadableFileError
from fseft_edge.runtime.scans.stored_image import (
    CONVERT,
    COPY_AGAIN,
    StoredImage,
    VoxelBlock,
    affine_of,
    file_of_voxels,
    read_block,
    unreadable,
)

_TYPES: Final = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
"""``MET_LONG`` and ``MET_ULONG`` are missing: their size depends on the machine that wrote the file."""

_ALIASES: Final = {
    "Position": "Offset",
    "Origin": "Offset",
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
_LAST: Final = "ElementDataFile"
_LOCAL: Final = ("LOCAL", "Local", "local")
_FROM_LPS: Final = np.array([-1.0, -1.0, 1.0])
_LARGEST_ROUNDING: Final = 1e-3
"""Largest accepted difference of the length of a direction from 1, for directions that were printed with few digits."""

_LONGEST_LINE: Final = 1 << 16
_MOST_LINES: Final = 1000


def read_metaimage(path: Path) -> StoredImage:
    """Read a MetaImage.

    Args:
        path: file of the header.

    Raises:
        UnreadableFileError: the file is missing, a folder, truncated, damaged, or not a supported MetaImage.
        GeometryError: axes, voxel spacing or origin are missing or impossible.
        OutOfSpaceError: the temporary folder has too little disk space for the unpacked voxels.
    """
    keys, end = _header(path)
    (axes,) = _whole(keys, "NDims", 1, path)
    if axes != 3:
        raise GeometryError(
            f"{path} has {axes} axes instead of 3.",
            remedy="Give one three-dimensional image. Split a time series into single phases.",
        )
    shape = _whole(keys, "DimSize", 3, path)
    (channels,) = _whole(keys, "ElementNumberOfChannels", 1, path, default="1")
    if channels != 1:
        raise UnreadableFileError(
            f"{path} has {channels} values for each voxel.", remedy="Give an image with one value for each voxel."
        )
    affine, warnings = _affine(keys, shape, path)
    array, more = read_block(_block(keys, shape, end, path), path)
    return StoredImage(array, affine, warnings + more)


def _header(path: Path) -> tuple[Mapping[str, str], int]:
    """Return the keys of a header, and the place behind it."""
    keys: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            for _ in range(_MOST_LINES):
                line = file.readline(_LONGEST_LINE).decode("utf-8", "replace")
                key, equals, value = (part.strip() for part in line.partition("="))
                if not equals:
                    break
                key = _ALIASES.get(key, key)
                if key in keys:
                    raise _damaged(path, "its header contains a key twice")
                keys[key] = value
                if key == _LAST:
                    return keys, file.tell()
            if not keys and os.fstat(file.fileno()).st_size == 0:
                raise UnreadableFileError(f"{path} is empty: it has 0 bytes.", remedy=COPY_AGAIN)
    except OSError as error:
        raise unreadable(path, error) from error
    raise UnreadableFileError(f"{path} is not a MetaImage.", remedy="Give an NRRD, MetaImage or NIfTI file.")


def _affine(keys: Mapping[str, str], shape: tuple[int, ...], path: Path) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    for key in ("TransformMatrix", "Offset", "ElementSpacing"):
        if key not in keys:
            raise GeometryError(f"{path} has no complete geometry: its header has no {key}.", remedy=CONVERT)
    if (unit := keys.get("DistanceUnits", "mm")).lower() not in ("mm", "?"):
        raise GeometryError(f"{path} gives its lengths in {unit!r}, which ITK reads as mm.", remedy=CONVERT)
    directions = _numbers(keys, "TransformMatrix", 9, path).reshape(3, 3)
    spacing, offset = _numbers(keys, "ElementSpacing", 3, path), _numbers(keys, "Offset", 3, path)
    if not (spacing > 0).all():
        raise GeometryError(f"{path} has the voxel spacing {keys['ElementSpacing']} mm.", remedy=CONVERT)
    with np.errstate(all="ignore"):  # any number may stand in a header
        lengths = np.linalg.norm(directions, axis=1)
        axes = _FROM_LPS[:, None] * (directions.T * spacing)
    if not (np.abs(lengths - 1) <= _LARGEST_ROUNDING).all():
        raise GeometryError(
            f"{path} has a TransformMatrix whose rows are not directions: their lengths are not 1.", remedy=CONVERT
        )
    return affine_of(axes, _FROM_LPS * offset, shape, path)


def _block(keys: Mapping[str, str], shape: tuple[int, ...], end: int, path: Path) -> VoxelBlock:
    kind = _TYPES.get(keys.get("ElementType", ""))
    if kind is None:
        raise UnreadableFileError(
            f"{path} stores its voxels as {keys.get('ElementType')!r}, which is not supported.",
            remedy="Save the image with numbers of 8 to 64 bits as voxels, for example with 3D Slicer.",
        )
    scale = [
        keys.get(f"ElementToIntensityFunction{part}", default) for part, default in (("Slope", "1"), ("Offset", "0"))
    ]
    if [_number(text, path) for text in scale] != [1.0, 0.0]:
        raise UnreadableFileError(
            f"{path} states a scale of its values (ElementToIntensityFunctionSlope), which ITK ignores.",
            remedy="Save the image with its real values, and without this scale.",
        )
    name = keys[_LAST]
    file, start = (path, end) if name in _LOCAL else (file_of_voxels(path, name), 0)
    dtype = np.dtype(kind).newbyteorder(">" if _true(keys, "BinaryDataByteOrderMSB", path) else "<")
    skip = _whole(keys, "HeaderSize", 1, path, default="0")[0]
    packed = _true(keys, "CompressedData", path)
    text = not _true(keys, "BinaryData", path, default="True")
    if skip < -1 or (skip and (packed or text or file == path)):
        raise _damaged(path, f"its HeaderSize is {skip}")
    if packed or text:
        return VoxelBlock(file, start, "zlib" if packed else "text", dtype, shape)
    return VoxelBlock(file, None if skip == -1 else start + skip, "raw", dtype, shape)


def _true(keys: Mapping[str, str], key: str, path: Path, default: str = "False") -> bool:
    value = keys.get(key, default)
    if value.lower() not in ("true", "false", "1", "0"):
        raise _damaged(path, f"the value of {key} is neither True nor False")
    return value.lower() in ("true", "1")


def _whole(keys: Mapping[str, str], key: str, count: int, path: Path, default: str = "") -> tuple[int, ...]:
    numbers = _numbers({key: keys.get(key, default)}, key, count, path)
    if not (np.isfinite(numbers) & (numbers == np.rint(numbers))).all():
        raise _damaged(path, f"{key} is not a whole number in its header")
    return tuple(int(number) for number in numbers)


def _numbers(keys: Mapping[str, str], key: str, count: int, path: Path) -> NDArray[np.float64]:
    words = keys.get(key, "").split()
    if len(words) != count:
        raise _damaged(path, f"{key} has {len(words)} numbers in its header instead of {count}")
    return np.array([_number(word, path) for word in words])


def _number(text: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise _damaged(path, "its header contains text where a number is expected") from error


def _damaged(path: Path, what: str) -> UnreadableFileError:
    return UnreadableFileError(f"{path} is damaged: {what}.", remedy=COPY_AGAIN)
