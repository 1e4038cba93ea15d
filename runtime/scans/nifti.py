"""Reading and writing of CTs and label maps as NIfTI files.

Supported are NIfTI-1 and NIfTI-2, as single files (``.nii``) and as pairs of header and voxels (``.hdr``, ``.img``),
plain or compressed with gzip: https://nifti.nimh.nih.gov. Headers are read as they are stored: nibabel's reader would
correct impossible values silently. :mod:`fseft_edge.runtime.scans.nifti_forms` decides on the geometry.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import logging
import os
import struct
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fseft_edge.runtime.errors import (
    GeometryError,
    InputError,
    LabelError,
    NotACtError,
    UnreadableFileError,
    UsageError,
)
from fseft_edge.runtime.scans.hounsfield import check_hounsfield
from fseft_edge.runtime.scans.image_names import is_metaimage_file, is_nrrd_file, is_segmentation_file, other_ending_of
from fseft_edge.runtime.scans.label_names import BadLabelTableError, extensions_of, names_in, packed
from fseft_edge.runtime.scans.nifti_forms import Geometry, NiftiForms, geometry_of
from fseft_edge.runtime.scans.volume import LabelMap, Volume, slabs
from fseft_edge.runtime.system.atomic import atomic_path
from fseft_edge.runtime.system.unnamed_file import no_space_to_unpack, unnamed_file

SUFFIXES = (".nii.gz", ".nii")
"""Endings of single files, which can be read and written."""

HEADER_SUFFIXES = (".hdr.gz", ".hdr")
"""Endings of the header of a pair, which stands for the pair."""

_VOXEL_SUFFIXES = (".img.gz", ".img")

WHOLE_NUMBER_TOLERANCE = 0.01
"""A label value is rounded if it differs by at most this much from a whole number, and refused otherwise.

Programs that store label maps with a scale factor (``scl_slope``) return values that are off by their rounding: half of
the factor. Labels between organs, which linear interpolation makes, are further off.
"""

_log = logging.getLogger(__name__)

_GZIP_MAGIC = b"\x1f\x8b"
_PACKED_BYTES = 1 << 16
_UNPACKED_BYTES = 1 << 20
_GZIP_STREAM = 31
"""Argument of zlib for a gzip stream with checks of its length and CRC-32."""

_LONGEST_HEADER = nib.nifti2.Nifti2Header.sizeof_hdr
_MOST_DIMENSIONS = 7
_LARGEST_LABEL = np.iinfo(np.uint32).max
_EXTENSION_FLAG_BYTES = 4
_LARGEST_EXTENSIONS = 64 << 20


def read_ct(path: Path) -> Volume:
    """Read a CT as a read-only memory map, without loading all voxels into memory.

    A compressed file is unpacked as a stream into an unnamed file in the temporary folder of the system (``TMPDIR``).
    The operating system deletes this file together with the volume. All intensities are read once and must be plausible
    HU (:func:`fseft_edge.runtime.scans.hounsfield.check_hounsfield`).

    Args:
        path: single file, or one of the two files of a pair.

    Raises:
        UnreadableFileError: the file is missing, a folder, truncated, damaged, or not NIfTI.
        NotACtError: the image has four dimensions, colours, fewer than two slices, or intensities not in HU.
        GeometryError: the geometry is missing or impossible, or sform, qform and ``pixdim`` disagree
            (:func:`fseft_edge.runtime.scans.nifti_forms.geometry_of`).
        OutOfSpaceError: the temporary folder has too little disk space for the unpacked file.
    """
    stored = _read(path)
    geometry = geometry_in(stored.header, stored.array.shape, path)
    volume = Volume(
        stored.array,
        geometry.affine,
        *rescale_in(stored.header, path),
        path,
        stored.warnings + geometry.warnings,
        geometry.forms,
    )
    check_hounsfield(volume)
    return volume


def read_label_map(path: Path) -> LabelMap:
    """Read a label map into memory, as the smallest unsigned integer type that can represent its values.

    What is corrected or assumed about the file is logged as a warning.

    Args:
        path: single file, or one of the two files of a pair.

    Raises:
        UnreadableFileError: the file is missing, a folder, truncated, damaged, or not NIfTI.
        LabelError: the image is not three-dimensional, or a value is negative, too large or not a whole number.
        GeometryError: the geometry is missing or impossible, or sform, qform and ``pixdim`` disagree
            (:func:`fseft_edge.runtime.scans.nifti_forms.geometry_of`).
        OutOfSpaceError: the temporary folder has too little disk space for the unpacked file.
    """
    stored = _read(path)
    geometry = geometry_in(stored.header, stored.array.shape, path)
    labels = label_values_of(stored.array, *rescale_in(stored.header, path), path)
    log_warnings(path, stored.warnings + geometry.warnings)
    return LabelMap(labels, geometry.affine, path, geometry.forms)


def log_warnings(name: object, warnings: tuple[str, ...]) -> None:
    """Log what was left out, corrected or assumed about an image. The warnings about a scan belong to its volume."""
    for warning in warnings:
        _log.warning("%s: %s", name, warning)


def label_values_of(stored: NDArray[Any], slope: float, intercept: float, name: object) -> NDArray[Any]:
    """Return stored label values after scaling, as the smallest unsigned integer type, in Fortran order.

    Args:
        stored: stored values ``[X, Y, Z]``.
        slope: scale factor of the stored values.
        intercept: value of a stored zero.
        name: file, for messages.

    Raises:
        LabelError: the image is not three-dimensional, or a value is negative, too large or not a whole number.
    """
    if stored.ndim != 3 or stored.dtype.kind not in "iufb" or stored.size == 0:
        raise LabelError(
            f"{name} is not a label map: its shape is {stored.shape} and its value type is {stored.dtype}.",
            remedy="Give one three-dimensional label map of whole numbers, with one label value for each organ.",
        )
    highest = max(int(_whole_numbers(piece, slope, intercept, name).max()) for piece in slabs(stored))
    labels = np.empty(stored.shape, dtype=np.min_scalar_type(highest), order="F")
    start = 0
    for piece in slabs(stored):
        labels[:, :, start : start + piece.shape[2]] = _whole_numbers(piece, slope, intercept, name)
        start += piece.shape[2]
    return labels


def read_label_names(path: Path) -> dict[int, str]:
    """Return the names of the label values that a NIfTI file contains; no names if it contains none.

    Names are read in the form in which :func:`write_label_map`, TotalSegmentator and Connectome Workbench write them.
    Only the beginning of the file is read.

    Raises:
        UnreadableFileError: the file is missing, a folder, damaged, or not NIfTI.
        LabelError: the table of names in the file is damaged.
    """
    header = read_header(path)
    files = files_of(path)
    start = header.sizeof_hdr + _EXTENSION_FLAG_BYTES
    end = _voxel_offset(header, path) if len(files) == 1 else _LARGEST_EXTENSIONS
    with _opened(files[0], path) as file:
        try:
            block = _beginning(file, min(end, _LARGEST_EXTENSIONS))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _damaged(path, error) from error
    extensions = block[start:] if block[header.sizeof_hdr : header.sizeof_hdr + 1] not in (b"", b"\0") else b""
    try:
        return names_in(extensions, header.endianness)
    except BadLabelTableError as error:
        raise LabelError(
            f"The table of label names in {path} is damaged.",
            remedy="Write the file again with the program that made it, or without its names.",
        ) from error


def read_header(path: Path) -> nib.nifti1.Nifti1Header:
    """Return the header of a NIfTI file, or of a pair, without any correction. Only the beginning is read.

    Raises:
        UnreadableFileError: the file is missing, a folder, damaged, or not NIfTI.
        GeometryError: the file is an Analyze 7.5 header.
    """
    files = files_of(path)
    with _opened(files[0], path) as file:
        try:
            block = _beginning(file, _LONGEST_HEADER)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _damaged(path, error) from error
    return _header(block, path, paired=len(files) > 1)


def write_label_map(path: Path, labels: LabelMap, names: Mapping[int, str] = MappingProxyType({})) -> None:
    """Write a label map atomically as ``.nii`` or ``.nii.gz``.

    The data type is uint8 if all values fit, else uint16 or uint32. The geometry is stored as in the scan
    (:func:`header_for`). Equal label maps with equal names give equal bytes.

    Args:
        path: file to write.
        labels: label map.
        names: name of each label value, for programs that show names
            (:mod:`fseft_edge.runtime.scans.label_names`); empty writes no names.

    Raises:
        UsageError: the file name does not end in ``.nii`` or ``.nii.gz``.
        OutOfSpaceError: the disk is full, or the folder is not writable.
    """
    dtype = np.min_scalar_type(int(labels.array.max()))
    _write(path, labels.array, header_for(labels, dtype), dtype, packed(extensions_of(names)))


def write_ct(path: Path, volume: Volume) -> None:
    """Write a CT atomically as ``.nii`` or ``.nii.gz`` with its stored values, data type, slope and intercept.

    Raises:
        UsageError: the file name does not end in ``.nii`` or ``.nii.gz``.
        OutOfSpaceError: the disk is full, or the folder is not writable.
    """
    dtype = volume.array.dtype.newbyteorder("=")
    header = header_for(volume, dtype)
    header.set_slope_inter(volume.slope, volume.intercept)
    _write(path, volume.array, header, dtype)


def stream_hu(volume: Volume) -> tuple[int, Iterator[bytes]]:
    """Return a scan as an uncompressed NIfTI file in whole HU (int16).

    Only one piece of the scan is in memory at a time. HU are clipped to the range of int16.

    Returns:
        The length of the file in bytes, and an iterator over the pieces of the file in order.
    """
    whole = np.dtype("<i2")
    header = header_for(volume, whole)
    offset = int(header.single_vox_offset)
    head = header.binaryblock
    return (
        offset + whole.itemsize * int(np.prod(volume.shape, dtype=np.int64)),
        itertools.chain([head + bytes(offset - len(head))], (_whole_hu(piece, volume) for piece in volume.chunks())),
    )


def _whole_hu(stored: NDArray[Any], volume: Volume) -> bytes:
    whole = np.iinfo(np.int16)
    if stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2 and (volume.slope, volume.intercept) == (1.0, 0.0):
        hu = stored
    else:
        hu = np.rint(stored.astype(np.float64) * volume.slope + volume.intercept)
    clipped: NDArray[np.int16] = np.clip(hu, whole.min, whole.max).astype("<i2")
    return clipped.tobytes()


def list_cases(path: Path) -> list[Path]:
    """Return the image at a path, or all images in a folder sorted by name, without hidden files.

    Images are NIfTI, NRRD and MetaImage files. A pair of header and voxels is one image, named by its header. A
    segmentation of 3D Slicer (``.seg.nrrd``) is no image.

    Raises:
        UnreadableFileError: the path does not exist, is not an image, or is a folder without images.
    """
    if path.is_dir():
        cases = sorted(file for file in path.iterdir() if not file.name.startswith(".") and _is_image(file))
        if not cases:
            raise UnreadableFileError(
                f"The folder {path} contains no .nii or .nii.gz file, no pair of .hdr and .img files, and no .nrrd, "
                ".nhdr, .mha or .mhd file.",
                remedy="Give the folder of the scans.",
            )
        return cases
    if not path.exists():
        raise UnreadableFileError(f"{path} does not exist.", remedy="Check the path.")
    if is_segmentation_file(path):
        raise UnreadableFileError(
            f"{path} is a segmentation of 3D Slicer, not an image.", remedy="Give the image that was segmented."
        )
    if not (is_nifti_file(path) or _is_image(path)):
        raise UnreadableFileError(
            f"{path} is not a .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd file, and not a pair of .hdr and .img files.",
            remedy="Convert the image to NIfTI.",
        )
    return [files_of(path)[0]]


def _is_image(file: Path) -> bool:
    return stands_for_image(file) or (file.is_file() and (is_nrrd_file(file) or is_metaimage_file(file)))


def cases_by_name(path: Path) -> dict[str, Path]:
    """Return the images that :func:`list_cases` returns, as a dictionary with the case names as keys.

    Raises:
        UnreadableFileError: the path does not exist, is not an image, or is a folder without images.
        InputError: two files have the same case name, such as ``a.nii`` and ``a.nii.gz``.
    """
    return named_cases(list_cases(path))


def named_cases(files: Iterable[Path]) -> dict[str, Path]:
    """Return files as a dictionary with the case names as keys.

    Raises:
        InputError: two files have the same case name.
    """
    cases: dict[str, Path] = {}
    for file in files:
        # macOS stores an umlaut as two characters: names that look the same are the same.
        earlier = cases.setdefault(unicodedata.normalize("NFC", case_name(file)), file)
        if earlier != file:
            raise InputError(
                f"{earlier} and {file} have the same case name.", remedy="Rename or delete one of the two files."
            )
    return cases


def case_name(path: Path) -> str:
    """Return the file name without the ending of its format. Scan, annotation and results of a case share this name."""
    return path.name.removesuffix(ending_of(path) or other_ending_of(path))


def ending_of(path: Path) -> str:
    """Return the ending that makes the name of a file the name of a NIfTI file, as it is written; empty if none."""
    for suffix in (*SUFFIXES, *HEADER_SUFFIXES, *_VOXEL_SUFFIXES):
        if path.name.lower().endswith(suffix):
            return path.name[-len(suffix) :]
    return ""


def is_nifti_file(path: Path) -> bool:
    """Return True if a path has the name of a NIfTI file and is not a folder.

    Many programs write ``.img`` files, some of them DICOM: this is the name of a NIfTI file only beside its header.
    """
    ending = ending_of(path).lower()
    return not path.is_dir() and (ending in (*SUFFIXES, *HEADER_SUFFIXES) or len(files_of(path)) > 1)


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files of a NIfTI image: the file itself, or header and voxels of the pair to which the file belongs.

    A link to one half leads to the pair, too. A file whose other half does not exist is returned alone.
    """
    ending = ending_of(path).lower()
    if ending in SUFFIXES or not ending:
        return (path,)
    others = _VOXEL_SUFFIXES if ending in HEADER_SUFFIXES else HEADER_SUFFIXES
    for place in (path, Path(os.path.realpath(path))):
        for suffix in (*others, *(suffix.upper() for suffix in others)):
            other = place.with_name(case_name(place) + suffix)
            if os.path.isfile(other):  # noqa: PTH113 - Path.is_file() raises OSError for a name that is too long
                return (path, other) if ending in HEADER_SUFFIXES else (other, path)
    return (path,)


def stands_for_image(file: Path) -> bool:
    """Return True for a single file, and for the header of a pair; False for the voxels of a pair."""
    ending = ending_of(file).lower()
    return file.is_file() and (ending in SUFFIXES or (ending in HEADER_SUFFIXES and len(files_of(file)) > 1))


@dataclass(frozen=True)
class _Stored:
    """An image as it is stored.

    Attributes:
        array: stored values as a read-only memory map, without trailing axes of length one after the third.
        header: header without any correction.
        warnings: what was left out of the files.
    """

    array: NDArray[Any]
    header: nib.nifti1.Nifti1Header
    warnings: tuple[str, ...]


def _read(path: Path) -> _Stored:
    files = files_of(path)
    if ending_of(path).lower() not in (*HEADER_SUFFIXES, *_VOXEL_SUFFIXES):
        with _unpacked(path, path) as (file, trailing):
            return _map(file, _header(file.read(_LONGEST_HEADER), path, paired=False), path, trailing)
    with _unpacked(files[0], path) as (file, trailing):
        header = _header(file.read(_LONGEST_HEADER), path, paired=True) if len(files) > 1 else None
    if header is None:
        raise UnreadableFileError(
            f"{path} is only one half of an image: a .hdr file and an .img file of the same name belong together.",
            remedy="Put both files into one folder.",
        )
    with _unpacked(files[1], path) as (file, behind_voxels):
        return _map(file, header, path, trailing or behind_voxels)


@contextlib.contextmanager
def _unpacked(file: Path, path: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """Open a file, unpacked if it is compressed, and say whether there are bytes behind the compressed stream.

    Args:
        file: single file, or one half of a pair.
        path: the path that the user gave, for messages.
    """
    with _opened(file, path) as stream:
        if not _is_packed(stream):
            yield stream, False
            return
        with unnamed_file(path) as unpacked:
            trailing = _unpack(stream, unpacked, path)
            yield unpacked, trailing


@contextlib.contextmanager
def _opened(file: Path, path: Path) -> Iterator[IO[bytes]]:
    """Open a file; an :class:`OSError` in the body becomes an error that names the path that the user gave."""
    if file.is_dir():
        raise UnreadableFileError(f"{path} is a folder, not a NIfTI file.", remedy="Give a .nii or .nii.gz file.")
    try:
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise UnreadableFileError(
            f"{path} cannot be read: {error.strerror or 'it is damaged'}.",
            remedy="Check the path and the file permissions.",
        ) from error


def _beginning(file: IO[bytes], length: int) -> bytes:
    """Return the first bytes of a file after unpacking; fewer if the file is shorter."""
    if not _is_packed(file):
        return file.read(length)
    with gzip.GzipFile(fileobj=file, mode="rb") as stream:
        return stream.read(length)


def _is_packed(file: IO[bytes]) -> bool:
    packed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    file.seek(0)
    return packed


def _unpack(file: IO[bytes], unpacked: IO[bytes], path: Path) -> bool:
    """Unpack all gzip streams of a file; return whether other bytes follow them.

    zlib checks length and CRC-32 of every stream. Some programs pad files with zeros or leave bytes of an older, longer
    file at the end.
    """
    stream, packed, trailing = zlib.decompressobj(_GZIP_STREAM), b"", False
    while True:
        packed = packed or file.read(_PACKED_BYTES)
        try:
            piece = stream.decompress(packed, _UNPACKED_BYTES)
        except zlib.error as error:
            raise _damaged(path, error) from error
        try:
            unpacked.write(piece)
        except OSError as error:
            raise no_space_to_unpack(path) from error
        if stream.eof:
            packed = stream.unused_data or file.read(_PACKED_BYTES)
            if len(packed) == 1:
                packed += file.read(_PACKED_BYTES)
            if not packed.startswith(_GZIP_MAGIC):
                trailing = bool(packed)
                break
            stream = zlib.decompressobj(_GZIP_STREAM)
        elif not packed and not piece:
            raise _damaged(path, "the compressed data end too early")
        else:
            packed = stream.unconsumed_tail
    try:
        unpacked.flush()
    except OSError as error:
        raise no_space_to_unpack(path) from error
    unpacked.seek(0)
    return trailing


def _map(file: IO[bytes], header: nib.nifti1.Nifti1Header, path: Path, trailing: bool) -> _Stored:
    dimensions = [int(length) for length in header["dim"]]
    if not 1 <= dimensions[0] <= _MOST_DIMENSIONS:
        raise _not_nifti(path)
    shape = tuple(dimensions[1 : dimensions[0] + 1])
    if min(shape) < 1:
        raise UnreadableFileError(f"{path} contains no voxels: its shape is {shape}.", remedy="Export the image again.")
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise _not_nifti(path) from error
    if dtype.itemsize == 0:
        raise _not_nifti(path)
    offset = _voxel_offset(header, path)
    wanted = offset + dtype.itemsize * int(np.prod(shape, dtype=object))
    present = file.seek(0, 2)
    if present < wanted:
        raise UnreadableFileError(
            f"{path} is truncated: it has {present} bytes, but its header requires {wanted} bytes.",
            remedy="Copy the file again from its source.",
        )
    warnings = []
    if trailing:
        warnings.append("The file contains bytes behind its compressed data, which were ignored.")
    if present > wanted:
        warnings.append(f"The file contains {present - wanted} bytes behind its voxels, which were ignored.")
    array = np.asarray(np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape, order="F"))
    return _Stored(squeezed(array), header, tuple(warnings))


def _header(block: bytes, path: Path, *, paired: bool) -> nib.nifti1.Nifti1Header:
    """Return the header in the first bytes of a file exactly as it is stored."""
    kinds: tuple[type[nib.nifti1.Nifti1Header], ...] = (nib.nifti1.Nifti1Header, nib.nifti2.Nifti2Header)
    for kind in kinds:
        for byte_order in "<>":
            if block[:4] != struct.pack(f"{byte_order}i", kind.sizeof_hdr) or len(block) < kind.sizeof_hdr:
                continue
            header = kind(block[: kind.sizeof_hdr], endianness=byte_order, check=False)
            if header["magic"].item() == (kind.pair_magic if paired else kind.single_magic):
                return header
            if paired and kind is nib.nifti1.Nifti1Header and header["magic"].item() != kind.single_magic:
                raise GeometryError(
                    f"{path} is an Analyze 7.5 image, whose header does not say where left and right are.",
                    remedy="Convert the original DICOM series to NIfTI.",
                )
    raise _not_nifti(path)


def _voxel_offset(header: nib.nifti1.Nifti1Header, path: Path) -> int:
    """Return the place of the voxels in their file, after checking that every reader finds the same place."""
    offset = float(header["vox_offset"])
    least = header.single_vox_offset if header["magic"].item() == header.single_magic else 0
    if not (np.isfinite(offset) and offset.is_integer() and offset >= least):
        raise UnreadableFileError(
            f"{path} is damaged: its header says that its voxels begin at byte {offset:g}.",
            remedy="Copy the file again from its source, or export the image again.",
        )
    return int(offset)


def _damaged(path: Path, error: Exception | str) -> UnreadableFileError:
    return UnreadableFileError(
        f"{path} is truncated or damaged: {error}.", remedy="Copy the file again from its source."
    )


def _not_nifti(path: Path) -> UnreadableFileError:
    if path.is_file() and path.stat().st_size == 0:
        return UnreadableFileError(f"{path} is empty: it has 0 bytes.", remedy="Copy the file again from its source.")
    return UnreadableFileError(f"{path} is not a NIfTI file.", remedy="Convert the image to NIfTI (.nii or .nii.gz).")


def rescale_in(header: nib.nifti1.Nifti1Header, name: object) -> tuple[float, float]:
    """Return slope and intercept of the stored values; 1 and 0 if the slope is 0 or not finite, which means no scaling.

    Raises:
        NotACtError: the slope is valid and the intercept is not; or there is an intercept without slope, which ITK adds
            and other programs do not.
    """
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    scaled = bool(np.isfinite(slope)) and slope != 0
    if scaled != bool(np.isfinite(intercept)) and intercept != 0 and (scaled or np.isfinite(intercept)):
        raise NotACtError(
            f"{name} has an invalid rescale slope or intercept: {slope:g} and {intercept:g}.",
            remedy="Export the image again.",
        )
    return (slope, intercept) if scaled else (1.0, 0.0)


def geometry_in(header: nib.nifti1.Nifti1Header, shape: tuple[int, ...], name: object) -> Geometry:
    """Return the geometry of an image with at most three axes, or the first three of more.

    Raises:
        GeometryError: the geometry is missing or impossible, or sform, qform and ``pixdim`` disagree.
    """
    return geometry_of(NiftiForms.of(header), (*shape, 1, 1)[:3], name)


def squeezed(array: NDArray[Any]) -> NDArray[Any]:
    """Remove trailing axes of length one after the third axis, which some programs add."""
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array


def _whole_numbers(stored: NDArray[Any], slope: float, intercept: float, name: object) -> NDArray[Any]:
    """Return the rescaled values after checking that all are whole numbers from 0 to 2^32 - 1."""
    values = stored
    if (slope, intercept) != (1.0, 0.0) or stored.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            exact = stored.astype(np.float64) * slope + intercept
            values = np.rint(exact)
            fractions = np.abs(exact - values) > WHOLE_NUMBER_TOLERANCE
        if fractions.any():
            raise LabelError(
                f"{name} contains the value {exact[fractions][0]:.6g}, which is not the label value of an organ.",
                remedy="Store label values as whole numbers without a scale factor, and resample label maps only with "
                "nearest neighbour.",
            )
    if not (values.min() >= 0 and values.max() <= _LARGEST_LABEL):  # also true for values that are not a number
        raise LabelError(
            f"{name} contains values that are negative, not finite, or larger than {_LARGEST_LABEL}.",
            remedy="Give an annotation or a mask, not a CT. Its label values are whole numbers from 0.",
        )
    return values


def header_for(image: Volume | LabelMap, dtype: np.dtype[Any]) -> nib.nifti1.Nifti1Header:
    """Return the header of an image in a single file, without slope and intercept.

    The geometry is the stored geometry of the scan's NIfTI file, bit for bit; else it is made from the affine. A
    sheared affine is then stored only as the sform, because a qform cannot represent shear.
    """
    fits_nifti1 = max(image.shape) <= np.iinfo(np.int16).max
    version = image.forms.version if image.forms else 1 if fits_nifti1 else 2
    header = nib.nifti1.Nifti1Header() if version == 1 else nib.nifti2.Nifti2Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(image.shape)
    if image.forms:
        image.forms.write_to(header)
    else:
        header.set_xyzt_units("mm")
        header.set_sform(image.affine, code="scanner")
        header.set_qform(image.affine, code="scanner", strip_shears=True)
        if not np.allclose(header.get_qform(), image.affine, atol=1e-3):
            header.set_qform(None, code="unknown")
    header.set_slope_inter(1.0, 0.0)
    header["vox_offset"] = header.single_vox_offset
    return header


def _write(
    path: Path, array: NDArray[Any], header: nib.nifti1.Nifti1Header, dtype: np.dtype[Any], extensions: bytes = b""
) -> None:
    if path.name.startswith(".") or not path.name.lower().endswith(SUFFIXES):
        raise UsageError(
            f"The output name {path} is not a NIfTI file name.", remedy="Give a name that ends in .nii.gz or .nii."
        )
    with contextlib.ExitStack() as stack:
        file: IO[bytes] | gzip.GzipFile = stack.enter_context(stack.enter_context(atomic_path(path)).open("wb"))
        if path.name.lower().endswith(".gz"):
            # Without file name and time in the gzip header, equal voxels give equal bytes.
            file = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6))
        header["vox_offset"] = header.single_vox_offset + len(extensions)
        file.write(header.binaryblock)
        file.write(bytes([bool(extensions), 0, 0, 0]))
        file.write(extensions)
        for slab in slabs(array):
            file.write(np.asarray(slab, dtype=dtype).tobytes(order="F"))
