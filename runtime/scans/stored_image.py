"""Images as NRRD and MetaImage store them: a header in text, one block of voxels, and three axes in world coordinates.

The block is read here and not by a library, because libraries read all voxels into memory, unpack a compressed block to
any size, and open any file that a header names. Here, voxels are mapped; a compressed block is unpacked as a stream
into an unnamed file in the temporary folder, up to the size that the header states; a header may only name a file in
its own folder or below.
"""

from __future__ import annotations

import bz2
import gzip
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import GeometryError, UnreadableFileError
from fseft_edge.runtime.scans.lattice import deviation
from fseft_edge.runtime.scans.nifti_forms import without_shear
from fseft_edge.runtime.system.unnamed_file import no_space_to_unpack, unnamed_file

Encoding: TypeAlias = Literal["raw", "text", "gzip", "bzip2", "zlib"]

CONVERT: Final = "Convert the original DICOM series again with a program that keeps the geometry, such as 3D Slicer."
COPY_AGAIN: Final = "Copy the file again from its source."

_LARGEST: Final = 1e9
"""No length in a header is larger."""

_PACKED_BYTES: Final = 1 << 16
_UNPACKED_BYTES: Final = 1 << 20
_ZLIB_OR_GZIP: Final = 47
"""Argument of zlib for a stream of either kind, with checks of its content."""


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image as it is stored.

    Attributes:
        array: stored values as a read-only memory map, or in memory if the file stores them as text. The axes have the
            order of the file; ``[X, Y, Z]``, or more axes if the image has several values for each voxel.
        affine: float64 4x4, from voxel index to RAS+ mm.
        warnings: what was left out or assumed, as whole sentences without names.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class VoxelBlock:
    """Where the voxels of an image are stored, and how.

    Attributes:
        file: file of the voxels.
        offset: first byte of the block, before unpacking; None if the block is raw and ends with the file.
        encoding: how the values are stored; ``zlib`` also accepts gzip.
        dtype: type of a value, with its byte order.
        shape: number of values along each axis; the first axis is stored fastest.
        skip: bytes to leave out after unpacking.
    """

    file: Path
    offset: int | None
    encoding: Encoding
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    skip: int = 0


def read_block(block: VoxelBlock, path: Path) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return the values of a block in Fortran order, and warnings.

    Args:
        block: the block.
        path: path of the image, for messages.

    Raises:
        UnreadableFileError: the block is missing, truncated or damaged, or the shape is impossible.
        OutOfSpaceError: the temporary folder has too little disk space for the unpacked block.
    """
    if not block.shape or min(block.shape) < 1:
        raise UnreadableFileError(
            f"{path} contains no voxels: its shape is {block.shape}.", remedy="Export the image again."
        )
    try:
        with block.file.open("rb") as stream:
            if block.encoding == "text":
                return _numbers(stream, block, path)
            if block.encoding == "raw":
                return _mapped(stream, block, path)
            with unnamed_file(path) as unpacked:
                _unpack(stream, unpacked, block, path)
                return _mapped(unpacked, VoxelBlock(block.file, block.skip, "raw", block.dtype, block.shape), path)
    except OSError as error:
        raise unreadable(path, error) from error


def _bytes_of(block: VoxelBlock) -> int:
    return block.dtype.itemsize * math.prod(block.shape)


def _mapped(stream: IO[bytes], block: VoxelBlock, path: Path) -> tuple[NDArray[Any], tuple[str, ...]]:
    present = stream.seek(0, os.SEEK_END)
    start = present - _bytes_of(block) if block.offset is None else block.offset
    end = start + _bytes_of(block)
    if start < 0 or present < end:
        raise UnreadableFileError(
            f"{path} is truncated: its voxels have {max(0, present - max(start, 0))} bytes, but its header requires "
            f"{_bytes_of(block)} bytes.",
            remedy=COPY_AGAIN,
        )
    array = np.asarray(np.memmap(stream, dtype=block.dtype, mode="r", offset=start, shape=block.shape, order="F"))
    return array, ("The file contains bytes behind its voxels, which were ignored.",) if present > end else ()


def _unpack(stream: IO[bytes], unpacked: IO[bytes], block: VoxelBlock, path: Path) -> None:
    """Unpack a block, and at most one piece more than its voxels."""
    stream.seek(block.offset or 0)
    missing = block.skip + _bytes_of(block)
    pieces = _pieces(stream, block.encoding)
    while missing >= 0:
        try:
            piece = next(pieces, b"")
        except (EOFError, OSError, zlib.error) as error:
            raise UnreadableFileError(f"{path} is truncated or damaged: {error}.", remedy=COPY_AGAIN) from error
        if not piece:
            break
        missing -= len(piece)
        try:
            unpacked.write(piece)
        except OSError as error:
            raise no_space_to_unpack(path) from error
    try:
        unpacked.flush()
    except OSError as error:
        raise no_space_to_unpack(path) from error


def _pieces(stream: IO[bytes], encoding: Encoding) -> Iterator[bytes]:
    if encoding == "zlib":
        yield from _zlib_pieces(stream)
        return
    with gzip.GzipFile(fileobj=stream) if encoding == "gzip" else bz2.BZ2File(stream) as packed:
        while piece := packed.read(_UNPACKED_BYTES):
            yield piece


def _zlib_pieces(stream: IO[bytes]) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(_ZLIB_OR_GZIP)
    while not unpacker.eof:
        packed = unpacker.unconsumed_tail or stream.read(_PACKED_BYTES)
        piece = unpacker.decompress(packed, _UNPACKED_BYTES)
        if not packed and not piece:
            raise EOFError("the compressed data end too early")
        if piece:
            yield piece


def _numbers(stream: IO[bytes], block: VoxelBlock, path: Path) -> tuple[NDArray[Any], tuple[str, ...]]:
    stream.seek((block.offset or 0) + block.skip)
    words = stream.read().split()
    if len(words) != math.prod(block.shape):
        raise UnreadableFileError(
            f"{path} contains {len(words)} values, but its header requires {math.prod(block.shape)} values.",
            remedy=COPY_AGAIN,
        )
    try:
        values = np.array(words).astype(block.dtype)
    except (ValueError, OverflowError) as error:
        raise UnreadableFileError(f"{path} is damaged: its voxels are not numbers.", remedy=COPY_AGAIN) from error
    return values.reshape(block.shape, order="F"), ()


def file_of_voxels(header: Path, name: str) -> Path:
    """Return the file of the voxels that a header names.

    A link to a header leads to the voxels beside the header itself, if there are none beside the link.

    Args:
        header: file of the header.
        name: the name in the header, relative to the folder of the header.

    Raises:
        UnreadableFileError: the name leads out of the folder of the header, names several files, or names no file.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if "%" in name or name.split(maxsplit=1)[:1] == ["LIST"]:
        raise UnreadableFileError(
            f"{header} stores its voxels in several files, which is not supported.",
            remedy="Save the image as one file (.nrrd or .mha), for example with 3D Slicer.",
        )
    if "\0" in name or not parts.parts or parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
        raise UnreadableFileError(
            f"{header} stores its voxels in a file outside its own folder, which is not opened.",
            remedy="Put both files into one folder, and write the name of the other file without a folder.",
        )
    for place in (header, Path(os.path.realpath(header))):
        file = place.parent / parts
        if os.path.isfile(file):  # noqa: PTH113 - Path.is_file() raises OSError for a name that is too long
            return file
    raise UnreadableFileError(
        f"The file of the voxels that {header} names does not exist: {name}.", remedy="Put both files into one folder."
    )


def affine_of(
    axes: NDArray[np.float64], origin: NDArray[np.float64], shape: tuple[int, ...], name: object
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Return the affine of an image after checks of its axes, and warnings.

    Args:
        axes: the step from voxel to voxel along each axis as a column, 3x3, RAS+ mm.
        origin: centre of the first voxel, RAS+ mm.
        shape: voxels along x, y, z.
        name: file, for messages.

    Returns:
        Affine 4x4, from voxel index to RAS+ mm; a warning if the axes are not perpendicular.

    Raises:
        GeometryError: a value is not finite or impossibly large, an axis has no length, or all axes are in one plane.
    """
    if not ((np.abs(axes) <= _LARGEST).all() and (np.abs(origin) <= _LARGEST).all()):
        raise GeometryError(
            f"{name} has axes or an origin with values that are not finite or impossibly large.", remedy=CONVERT
        )
    steps = np.linalg.norm(axes, axis=0)
    if not ((steps > 0).all() and abs(np.linalg.det(axes / steps)) >= 1e-3):
        raise GeometryError(f"{name} has axes that have no length or are in one plane.", remedy=CONVERT)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, origin
    apart = deviation(affine, without_shear(affine), shape)
    if apart.is_rounding:
        return affine, ()
    return affine, (
        f"The axes are not perpendicular, as after a tilt of the gantry, by up to {apart.mm:.3g} mm. Programs that "
        "read NIfTI with ITK, such as 3D Slicer, do not open masks with such axes.",
    )


def unreadable(path: Path, error: OSError) -> UnreadableFileError:
    """Return the error for a file that the operating system does not open or read."""
    return UnreadableFileError(
        f"{path} cannot be read: {error.strerror or 'it is damaged'}.",
        remedy="Check the path and the file permissions.",
    )
