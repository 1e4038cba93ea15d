"""Reading and writing of CTs and label maps as NIfTI files.

Supported are NIfTI-1 and NIfTI-2 single files, plain or compressed with gzip: https://nifti.nimh.nih.gov. The affine is
the sform if its code is set, else the qform, as in nibabel.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import zlib
from collections.abc import Iterator, Mapping
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
from fseft_edge.runtime.scans.label_names import BadLabelTableError, extensions_of, names_in
from fseft_edge.runtime.scans.volume import LabelMap, Volume, slabs
from fseft_edge.runtime.system.atomic import atomic_path
from fseft_edge.runtime.system.unnamed_file import no_space_to_unpack, unnamed_file

SUFFIXES = (".nii.gz", ".nii")

_GZIP_MAGIC = b"\x1f\x8b"
_COPY_BYTES = 1 << 20
_EXTENSION_FLAG_BYTES = 4
_LARGEST_EXTENSIONS = 64 << 20


def read_ct(path: Path) -> Volume:
    """Read a CT as a read-only memory map, without loading all voxels into memory.

    A compressed file is unpacked as a stream into an unnamed file in the temporary folder of the system (``TMPDIR``).
    The operating system deletes this file together with the volume. All intensities are read once and must be plausible
    HU (:func:`fseft_edge.runtime.scans.hounsfield.check_hounsfield`).

    Raises:
        UnreadableFileError: the file is missing, a folder, truncated, damaged, or not NIfTI.
        NotACtError: the image has four dimensions, colours, fewer than two slices, or intensities not in HU.
        GeometryError: sform and qform are both missing, or the affine is not finite or singular.
        OutOfSpaceError: the temporary folder has too little disk space for the unpacked file.
    """
    array, header = _read(path)
    slope, intercept = _rescale(header, path)
    volume = Volume(_squeezed(array), _affine(header, path), slope, intercept, source=path)
    check_hounsfield(volume)
    return volume


def read_label_map(path: Path) -> LabelMap:
    """Read a label map into memory, as the smallest unsigned integer type that can represent its values.

    Raises:
        UnreadableFileError: the file is missing, a folder, truncated, damaged, or not NIfTI.
        LabelError: the image is not three-dimensional, or a value is negative, too large or not a whole number.
        GeometryError: sform and qform are both missing, or the affine is not finite or singular.
        OutOfSpaceError: the temporary folder has too little disk space for the unpacked file.
    """
    array, header = _read(path)
    slope, intercept = _rescale(header, path)
    stored = _squeezed(array)
    if stored.ndim != 3 or stored.dtype.kind not in "iuf":
        raise LabelError(
            f"{path} is not a label map: its shape is {stored.shape} and its value type is {stored.dtype}.",
            remedy="Give one three-dimensional label map of whole numbers, with one label value for each organ.",
        )
    highest = max(int(_label_values(piece, slope, intercept, path).max()) for piece in slabs(stored))
    labels = np.empty(stored.shape, dtype=np.min_scalar_type(highest), order="F")
    start = 0
    for piece in slabs(stored):
        labels[:, :, start : start + piece.shape[2]] = _label_values(piece, slope, intercept, path)
        start += piece.shape[2]
    return LabelMap(labels, _affine(header, path), source=path)


def read_label_names(path: Path) -> dict[int, str]:
    """Return the names of the label values that a NIfTI file contains; no names if it contains none.

    Names are read in the form in which :func:`write_label_map`, TotalSegmentator and Connectome Workbench write them.
    Only the beginning of the file is read.

    Raises:
        UnreadableFileError: the file is missing, a folder, damaged, or not NIfTI.
        LabelError: the table of names in the file is damaged.
    """
    with _opened(path) as file, contextlib.ExitStack() as stack:
        packed = _is_packed(file)
        source: IO[bytes] | gzip.GzipFile = stack.enter_context(gzip.GzipFile(fileobj=file)) if packed else file
        try:
            header = _header(source, path)
            source.seek(header.sizeof_hdr)
            length = int(header.get_data_offset()) - source.tell() - _EXTENSION_FLAG_BYTES
            flag = source.read(_EXTENSION_FLAG_BYTES)
            extensions = source.read(length) if 0 < length <= _LARGEST_EXTENSIONS and flag[:1] != b"\0" else b""
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _damaged(path, error) from error
        except (ValueError, OverflowError) as error:  # the offset is a float and can be NaN or infinite
            raise _not_nifti(path) from error
    try:
        return names_in(extensions, header.endianness)
    except BadLabelTableError as error:
        raise LabelError(
            f"The table of label names in {path} is damaged.",
            remedy="Write the file again with the program that made it, or without its names.",
        ) from error


def write_label_map(path: Path, labels: LabelMap, names: Mapping[int, str] = MappingProxyType({})) -> None:
    """Write a label map atomically as ``.nii`` or ``.nii.gz``.

    The data type is uint8 if all values fit, else uint16 or uint32. Both sform and qform contain the affine; a sheared
    affine is written only as the sform, because a qform cannot represent shear. Equal label maps with equal names give
    equal bytes.

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
    _write(path, labels.array, _header_for(labels, dtype), dtype, extensions_of(names))


def write_ct(path: Path, volume: Volume) -> None:
    """Write a CT atomically as ``.nii`` or ``.nii.gz`` with its stored values, data type, slope and intercept.

    Raises:
        UsageError: the file name does not end in ``.nii`` or ``.nii.gz``.
        OutOfSpaceError: the disk is full, or the folder is not writable.
    """
    dtype = volume.array.dtype.newbyteorder("=")
    header = _header_for(volume, dtype)
    header.set_slope_inter(volume.slope, volume.intercept)
    _write(path, volume.array, header, dtype)


def stream_hu(volume: Volume) -> tuple[int, Iterator[bytes]]:
    """Return a scan as an uncompressed NIfTI file in whole HU (int16).

    Only one piece of the scan is in memory at a time. HU are clipped to the range of int16.

    Returns:
        The length of the file in bytes, and an iterator over the pieces of the file in order.
    """
    whole = np.dtype("<i2")
    header = _header_for(volume, whole)
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
    """Return the NIfTI file at a path, or all NIfTI files in a folder sorted by name, without hidden files.

    Raises:
        UnreadableFileError: the path does not exist, is not a NIfTI file, or is a folder without NIfTI files.
    """
    if path.is_dir():
        cases = sorted(file for file in path.iterdir() if _is_nifti_name(file.name) and file.is_file())
        if not cases:
            raise UnreadableFileError(
                f"The folder {path} contains no .nii or .nii.gz file.", remedy="Give the folder of the scans."
            )
        return cases
    if not path.exists():
        raise UnreadableFileError(f"{path} does not exist.", remedy="Check the path.")
    if not _is_nifti_name(path.name):
        raise UnreadableFileError(f"{path} is not a .nii or .nii.gz file.", remedy="Convert the image to NIfTI.")
    return [path]


def cases_by_name(path: Path) -> dict[str, Path]:
    """Return the NIfTI files that :func:`list_cases` returns, as a dictionary with the case names as keys.

    Raises:
        UnreadableFileError: the path does not exist, is not a NIfTI file, or is a folder without NIfTI files.
        InputError: two files have the same case name, such as ``a.nii`` and ``a.nii.gz``.
    """
    cases: dict[str, Path] = {}
    for file in list_cases(path):
        earlier = cases.setdefault(case_name(file), file)
        if earlier != file:
            raise InputError(
                f"{earlier} and {file} have the same case name.", remedy="Rename or delete one of the two files."
            )
    return cases


def case_name(path: Path) -> str:
    """Return the file name without ``.nii.gz`` or ``.nii``. Scan, annotation and results of a case share this name."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def _is_nifti_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _read(path: Path) -> tuple[NDArray[Any], nib.nifti1.Nifti1Header]:
    """Return the stored values as a read-only memory map, and the header."""
    with _opened(path) as file:
        if not _is_packed(file):
            return _map(file, path)
        with unnamed_file(path) as unpacked:
            _unpack(file, unpacked, path)
            return _map(unpacked, path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file; an :class:`OSError` in the body becomes an error that names the file."""
    if path.is_dir():
        raise UnreadableFileError(f"{path} is a folder, not a NIfTI file.", remedy="Give a .nii or .nii.gz file.")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UnreadableFileError(
            f"{path} cannot be read: {error.strerror or error}.", remedy="Check the path and the file permissions."
        ) from error


def _is_packed(file: IO[bytes]) -> bool:
    packed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    file.seek(0)
    return packed


def _unpack(file: IO[bytes], unpacked: IO[bytes], path: Path) -> None:
    with gzip.GzipFile(fileobj=file, mode="rb") as stream:
        while True:
            try:
                piece = stream.read(_COPY_BYTES)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise _damaged(path, error) from error
            if not piece:
                break
            try:
                unpacked.write(piece)
            except OSError as error:
                raise no_space_to_unpack(path) from error
    try:
        unpacked.flush()
    except OSError as error:
        raise no_space_to_unpack(path) from error
    unpacked.seek(0)


def _map(file: IO[bytes], path: Path) -> tuple[NDArray[Any], nib.nifti1.Nifti1Header]:
    header = _header(file, path)
    try:
        shape = tuple(int(length) for length in header.get_data_shape())
        dtype = header.get_data_dtype()
        offset = int(header.get_data_offset())
    except (
        HeaderDataError,
        KeyError,
        ValueError,
        OverflowError,
    ) as error:  # the offset is a float and can be NaN or infinite
        raise _not_nifti(path) from error
    if offset < 0:
        raise _not_nifti(path)
    if not shape or min(shape) < 1:
        raise UnreadableFileError(f"{path} contains no voxels: its shape is {shape}.", remedy="Export the image again.")
    wanted = offset + dtype.itemsize * int(np.prod(shape, dtype=object))
    present = file.seek(0, 2)
    if present < wanted:
        raise UnreadableFileError(
            f"{path} is truncated: it has {present} bytes, but its header requires {wanted} bytes.",
            remedy="Copy the file again from its source.",
        )
    return np.asarray(np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape, order="F")), header


def _header(file: IO[bytes] | gzip.GzipFile, path: Path) -> nib.nifti1.Nifti1Header:
    """Return the header of a file exactly as it is stored: nibabel's own reader would correct wrong values silently."""
    block = file.read(nib.nifti2.Nifti2Header.sizeof_hdr)
    for kind in (nib.nifti1.Nifti1Header, nib.nifti2.Nifti2Header):
        for byte_order, name in (("<", "little"), (">", "big")):
            if int.from_bytes(block[:4], name) == kind.sizeof_hdr <= len(block):
                header = kind(block[: kind.sizeof_hdr], endianness=byte_order, check=False)
                if header["magic"].item() == header.single_magic:
                    return header
    raise _not_nifti(path)


def _damaged(path: Path, error: Exception) -> UnreadableFileError:
    return UnreadableFileError(
        f"{path} is truncated or damaged: {error}.", remedy="Copy the file again from its source."
    )


def _not_nifti(path: Path) -> UnreadableFileError:
    return UnreadableFileError(f"{path} is not a NIfTI file.", remedy="Convert the image to NIfTI (.nii or .nii.gz).")


def _rescale(header: nib.nifti1.Nifti1Header, path: Path) -> tuple[float, float]:
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise NotACtError(
            f"{path} has an invalid rescale slope or intercept: {error}.", remedy="Export the image again."
        ) from error
    return (1.0 if slope is None else float(slope)), (0.0 if intercept is None else float(intercept))


def _affine(header: nib.nifti1.Nifti1Header, path: Path) -> NDArray[np.float64]:
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        raise GeometryError(
            f"{path} has no geometry: its sform and its qform are not set.",
            remedy="Convert the original DICOM series again with a program that keeps the geometry.",
        )
    try:
        return np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise GeometryError(
            f"{path} has an invalid qform: {error}.", remedy="Convert the original DICOM series again."
        ) from error


def _squeezed(array: NDArray[Any]) -> NDArray[Any]:
    """Remove trailing axes of length one after the third axis, which some programs add."""
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array


def _label_values(stored: NDArray[Any], slope: float, intercept: float, path: Path) -> NDArray[Any]:
    """Return the rescaled values after checking that all are whole numbers from 0 to 2^32 - 1."""
    values = stored
    if (slope, intercept) != (1.0, 0.0):
        with np.errstate(over="ignore", invalid="ignore"):
            values = stored.astype(np.float64) * slope + intercept
    if not np.isfinite(values).all() or (values < 0).any() or (values > np.iinfo(np.uint32).max).any():
        raise LabelError(
            f"{path} contains values that are negative, not finite, or larger than {np.iinfo(np.uint32).max}.",
            remedy="Store label values as whole numbers from 0.",
        )
    if values.dtype.kind == "f" and (values != np.floor(values)).any():
        raise LabelError(
            f"{path} contains values that are not whole numbers.",
            remedy="Store label values as whole numbers, and resample label maps only with nearest neighbour.",
        )
    return values


def _header_for(image: Volume | LabelMap, dtype: np.dtype[Any]) -> nib.nifti1.Nifti1Header:
    fits_nifti1 = max(image.shape) <= np.iinfo(np.int16).max
    header = nib.nifti1.Nifti1Header() if fits_nifti1 else nib.nifti2.Nifti2Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(image.shape)
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
    if not _is_nifti_name(path.name):
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
