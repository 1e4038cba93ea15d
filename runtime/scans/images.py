"""CTs and label maps as NIfTI images of nibabel in memory, with the same checks as for files."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import GeometryError, InputError, UnreadableFileError
from fseft_edge.runtime.scans.hounsfield import check_hounsfield
from fseft_edge.runtime.scans.label_names import extensions_of
from fseft_edge.runtime.scans.nifti import (
    geometry_in,
    header_for,
    label_values_of,
    log_warnings,
    read_header,
    squeezed,
)
from fseft_edge.runtime.scans.nifti_forms import Geometry
from fseft_edge.runtime.scans.volume import LabelMap, Volume

_NAME = "The image in memory"

_GEOMETRY = (
    *("sform_code", "srow_x", "srow_y", "srow_z"),
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("pixdim", "xyzt_units"),
)
"""Fields of the header that place the voxels."""


def volume_of_image(image: nib.nifti1.Nifti1Pair) -> Volume:
    """Return a CT in memory, with the checks of :func:`fseft_edge.runtime.scans.nifti.read_ct`.

    Values that are still in their file are read as they are stored, and scaled only where they are needed.

    Args:
        image: NIfTI image of nibabel with values in HU, ``[X, Y, Z]``.

    Raises:
        UnreadableFileError: the image belongs to a file that can no longer be read.
        NotACtError: the image has four dimensions, colours, fewer than two slices, or intensities not in HU.
        GeometryError: the geometry is missing or impossible, or sform, qform and ``pixdim`` disagree.
    """
    array, slope, intercept = _stored(image)
    geometry = _geometry(image, array.shape)
    volume = Volume(array, geometry.affine, slope, intercept, warnings=geometry.warnings, forms=geometry.forms)
    check_hounsfield(volume)
    return volume


def label_map_of_image(image: nib.nifti1.Nifti1Pair) -> LabelMap:
    """Return a label map in memory, with the checks of :func:`fseft_edge.runtime.scans.nifti.read_label_map`.

    Args:
        image: NIfTI image of nibabel with label values, ``[X, Y, Z]``.

    Raises:
        UnreadableFileError: the image belongs to a file that can no longer be read.
        LabelError: the image is not three-dimensional, or a value is negative, too large or not a whole number.
        GeometryError: the geometry is missing or impossible, or sform, qform and ``pixdim`` disagree.
    """
    array, slope, intercept = _stored(image)
    geometry = _geometry(image, array.shape)
    labels = label_values_of(array, slope, intercept, _NAME)
    log_warnings(_NAME, geometry.warnings)
    return LabelMap(labels, geometry.affine, forms=geometry.forms)


def image_of_label_map(labels: LabelMap, names: Mapping[int, str] = MappingProxyType({})) -> nib.Nifti1Image:
    """Return a label map as an image of nibabel, with the geometry and the names of a mask file.

    ``nibabel.save`` writes the file that :func:`fseft_edge.runtime.scans.nifti.write_label_map` writes, apart from
    compression.

    Args:
        labels: label map.
        names: name of each label value; empty stores no names.
    """
    dtype = np.min_scalar_type(int(labels.array.max()))
    header = header_for(labels, dtype)
    kind: type[nib.Nifti1Image] = nib.Nifti2Image if isinstance(header, nib.nifti2.Nifti2Header) else nib.Nifti1Image
    for code, content in extensions_of(names):
        header.extensions.append(nib.nifti1.Nifti1Extension(code, content))
    return kind(labels.array.astype(dtype, copy=False), header.get_best_affine(), header)


def _stored(image: nib.nifti1.Nifti1Pair) -> tuple[NDArray[Any], float, float]:
    """Return stored values, slope and intercept. An array in memory holds the values themselves."""
    proxy = image.dataobj
    if isinstance(proxy, nib.arrayproxy.ArrayProxy):
        try:
            with np.errstate(over="ignore"):  # numpy computes the length of an impossible shape
                return squeezed(np.asanyarray(proxy.get_unscaled())), float(proxy.slope), float(proxy.inter)
        except (OSError, ValueError, EOFError, OverflowError, MemoryError, zlib.error) as error:
            raise UnreadableFileError(
                "The voxels of the image in memory cannot be read from its file: the file is damaged, or was changed.",
                remedy="Load the image again, or copy its file again from its source.",
            ) from error
    return squeezed(np.asanyarray(proxy)), 1.0, 0.0


def _geometry(image: nib.nifti1.Nifti1Pair, shape: tuple[int, ...]) -> Geometry:
    """Return the geometry that nibabel would save with the image.

    nibabel corrects impossible values silently when it loads a file. If the geometry in memory is still that of the
    file, the header in the file is checked.
    """
    header = image.header
    if image.affine is not None and not np.isfinite(image.affine).all():
        raise GeometryError(f"{_NAME} has an affine that is not finite.", remedy="Give the affine of the scan.")
    if image.affine is not None and not np.allclose(image.affine, header.get_best_affine()):
        header = header.copy()  # nibabel would do the same on saving
        header.set_sform(image.affine, code="aligned")
        header.set_qform(image.affine, code="unknown")
        return geometry_in(header, shape, _NAME)
    return geometry_in(_header_in_file(image) or header, shape, _NAME)


def _header_in_file(image: nib.nifti1.Nifti1Pair) -> nib.nifti1.Nifti1Header | None:
    """Return the uncorrected header of the file of an image, if the image still has the geometry of its file."""
    path = image.get_filename()
    if path is None or not isinstance(image.dataobj, nib.arrayproxy.ArrayProxy):
        return None
    try:
        stored, loaded = read_header(Path(path)), cast("nib.nifti1.Nifti1Header", nib.load(path).header)
    except (InputError, OSError, nib.filebasedimages.ImageFileError):
        return None
    unchanged = all(np.array_equal(image.header[field], loaded[field], equal_nan=True) for field in _GEOMETRY)
    return stored if unchanged else None
