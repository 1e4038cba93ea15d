"""NIfTI files whose headers say something else than usual, and what other programs read in them."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK
from numpy.typing import NDArray

AFFINE = np.array([[-5.0, 0, 0, 120], [0, -5, 0, 100], [0, 0, 5, -400], [0, 0, 0, 1]])

PIXDIM, VOX_OFFSET, SLOPE, INTERCEPT, UNITS = 76, 108, 112, 116, 123
QFORM_CODE, SFORM_CODE, QUATERNION, QOFFSET, SROW = 252, 254, 256, 268, 280
"""Offsets of fields in the header of NIfTI-1."""


def phantom(shape: tuple[int, int, int] = (48, 40, 16)) -> NDArray[np.int16]:
    """A body of 40 HU in air with a 'liver' (110), a 'lung' opposite (-850, upper slices only) and a 'spine' (600)."""
    nx, ny, nz = shape
    x, y, z = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000, np.int16)
    hu[((x - nx / 2) / (nx * 0.42)) ** 2 + ((y - ny / 2) / (ny * 0.40)) ** 2 < 1] = 40
    hu[((x - nx * 0.3) / (nx * 0.13)) ** 2 + ((y - ny * 0.45) / (ny * 0.2)) ** 2 < 1] = 110
    hu[(((x - nx * 0.68) / (nx * 0.1)) ** 2 + ((y - ny * 0.45) / (ny * 0.16)) ** 2 < 1) & (z > nz * 0.4)] = -850
    hu[((x - nx * 0.5) / (nx * 0.06)) ** 2 + ((y - ny * 0.75) / (ny * 0.08)) ** 2 < 1] = 600
    return hu


def organs(hu: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Liver (1) and lung (2) of the phantom."""
    labels: NDArray[np.uint8] = ((hu == 110) * 1 + (hu == -850) * 2).astype(np.uint8)
    return labels


def write(
    path: Path,
    array: NDArray[Any] | None = None,
    sform: NDArray[np.float64] | None = AFFINE,
    qform: NDArray[np.float64] | None = AFFINE,
    *,
    codes: tuple[int, int] = (1, 1),
    unit: str = "mm",
    patches: Sequence[tuple[int, str, Sequence[float]]] = (),
    kind: type[nib.Nifti1Image] = nib.Nifti1Image,
) -> Path:
    """Write a file with two forms.

    Args:
        path: file to write.
        array: stored values; None writes the phantom.
        sform, qform: affines of the forms; ``pixdim`` belongs to the qform.
        codes: ``sform_code`` and ``qform_code``.
        unit: unit of length.
        patches: offset, format of :mod:`struct` and values that are put into the bytes of the header.
        kind: version of NIfTI.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    image = kind(phantom() if array is None else array, None)
    image.header.set_qform(qform, codes[1])
    image.header.set_sform(sform, codes[0])
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    if patches:
        packed = path.name.endswith(".gz")
        content = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
        for offset, form, values in patches:
            struct.pack_into(f"<{form}", content, offset, *values)
        path.write_bytes(gzip.compress(bytes(content), mtime=0) if packed else bytes(content))
    return path


def moved(affine: NDArray[np.float64] = AFFINE, *, by: Sequence[float] = (0, 0, 0)) -> NDArray[np.float64]:
    """Return an affine with another origin."""
    other = affine.copy()
    other[:3, 3] += by
    return other


def turned(degrees: Sequence[float], digits: int | None = None, spacing: float = 5.0) -> NDArray[np.float64]:
    """Return an oblique affine; its direction cosines may be rounded to some digits, as scanners write them."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    cosines = (
        np.array([[ca, -sa, 0], [sa, ca, 0], [0, 0, 1]])
        @ np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
        @ np.array([[1, 0, 0], [0, cc, -sc], [0, sc, cc]])
    )
    if digits is not None:
        cosines = np.round(cosines, digits)
        cosines[:, 2] = np.cross(cosines[:, 0], cosines[:, 1])
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ cosines * spacing
    affine[:3, 3] = AFFINE[:3, 3]
    return affine


def drawn_with_itk(scan: Path, labels: NDArray[np.uint8], path: Path) -> Path:
    """Write an annotation as programs do that use ITK: with its rounding of direction cosines."""
    image = SimpleITK.GetImageFromArray(labels.T.copy())
    image.CopyInformation(SimpleITK.ReadImage(str(scan)))
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))
    return path


def affine_in_itk(path: Path) -> NDArray[np.float64]:
    """Return the affine that ITK reads, voxel index to RAS+ mm."""
    image = SimpleITK.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def affine_in_nibabel(path: Path) -> NDArray[np.float64]:
    """Return the affine that nibabel reads, in mm. nibabel itself returns the unit of the file."""
    image = nib.load(path)
    to_mm = {1: 1e3, 3: 1e-3}.get(int(image.header["xyzt_units"]) & 7, 1.0)
    affine: NDArray[np.float64] = np.diag([to_mm, to_mm, to_mm, 1.0]) @ image.affine
    return affine


def stored_geometry(path: Path) -> bytes:
    """Return every byte of a NIfTI-1 header that places voxels: codes, both forms, qfac, spacing and unit of length."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    return raw[PIXDIM : PIXDIM + 16] + bytes([raw[UNITS] & 7]) + raw[QFORM_CODE : SROW + 48]
