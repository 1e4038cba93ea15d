"""The geometry in a NIfTI header: sform, qform, ``pixdim`` and unit, and the one affine that they describe together.

A NIfTI header holds the place of its voxels twice: as the matrix ``sform``, and as ``qform``, a rotation, an offset and
the voxel spacing ``pixdim`` (https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h). Programs choose differently:
nibabel and FSL read the sform; ITK (3D Slicer, ITK-SNAP, elastix, ANTs) reads the spacing from ``pixdim`` in every
case, and the rotation from the sform or from the qform, depending on their codes. This toolkit therefore accepts a file
only if all that is set describes the same lattice, and writes sform, qform, codes, ``pixdim`` and unit of a scan
unchanged into its masks, so that every program shows a mask where it shows the scan.

Both forms may lead to different spaces: code 1 is the scanner, code 4 a standard brain. Then they rightly disagree.
Such a scan is refused nevertheless. Its organs would have two volumes in ml and two places, and only its author knows
which of them is the patient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import GeometryError
from fseft_edge.runtime.scans.lattice import PLAUSIBLE_SPACING_MM, deviation

_CODES: Final = range(6)
_UNITS: Final = {0: ("mm", 1.0), 1: ("metres", 1e3), 2: ("mm", 1.0), 3: ("micrometres", 1e-3)}
_UNIT_BITS: Final = 7

_QUATERNION_ROUNDING: Final = 1e-5
"""Largest accepted excess of b² + c² + d² over 1. It allows for values that were printed with six digits."""

_STORED_ROUNDING: Final = {1: 3e-7, 2: 5e-16}
"""Error of b² + c² + d² from the float type of NIfTI-1 and NIfTI-2. Beyond it, nibabel refuses a quaternion."""

_LARGEST: Final = 1e9
"""No length in a header is larger in any unit."""

_SMALLEST_SQUARE: Final = {1: 1e-7, 2: 0.0}
"""Below this, w² is rounding and w is 0. The value for NIfTI-1 is that of nifti1_io, which ITK uses."""

_CONVERT = "Convert the original DICOM series again with a program that keeps the geometry"
_REPAIR = (
    "{convert}, or repair the file with nibabel. If the sform is right: image = nibabel.load(FILE); "
    "image.set_qform(image.affine, code=1); image.set_sform(image.affine, code=1); nibabel.save(image, NEW_FILE). If "
    "the qform is right: image.set_sform(image.get_qform(), code=1) in place of the two calls."
)


@dataclass(frozen=True, eq=False)
class NiftiForms:
    """The geometry of a NIfTI file as its header stores it; float64 holds the float32 of NIfTI-1 exactly.

    Attributes:
        version: 1 or 2, the version of NIfTI.
        sform_code: 0 if the sform is not set, else the space that it leads to.
        sform: rows ``srow_x``, ``srow_y`` and ``srow_z``, 3x4.
        qform_code: 0 if the qform is not set, else the space that it leads to.
        quaternion: ``quatern_b``, ``quatern_c`` and ``quatern_d``.
        offset: ``qoffset_x``, ``qoffset_y`` and ``qoffset_z``.
        pixdim: ``pixdim[0]`` (the handedness ``qfac`` of the qform) and the voxel spacing along x, y and z.
        unit: the three bits of ``xyzt_units`` that state the unit of length.
    """

    version: int
    sform_code: int
    sform: NDArray[np.float64]
    qform_code: int
    quaternion: NDArray[np.float64]
    offset: NDArray[np.float64]
    pixdim: NDArray[np.float64]
    unit: int

    @classmethod
    def of(cls, header: nib.nifti1.Nifti1Header) -> NiftiForms:
        """Return the geometry in a header."""

        def stored(*names: str) -> NDArray[np.float64]:
            with np.errstate(invalid="ignore"):  # a signalling NaN in a field that may not even be set
                return np.array([header[name] for name in names]).astype(np.float64)

        return cls(
            version=2 if isinstance(header, nib.nifti2.Nifti2Header) else 1,
            sform_code=int(header["sform_code"]),
            sform=stored("srow_x", "srow_y", "srow_z"),
            qform_code=int(header["qform_code"]),
            quaternion=stored("quatern_b", "quatern_c", "quatern_d"),
            offset=stored("qoffset_x", "qoffset_y", "qoffset_z"),
            pixdim=stored("pixdim")[0, :4],
            unit=int(header["xyzt_units"]) & _UNIT_BITS,
        )

    def write_to(self, header: nib.nifti1.Nifti1Header) -> None:
        """Store the geometry in a header of the same version of NIfTI."""
        header["sform_code"], header["qform_code"] = self.sform_code, self.qform_code
        with np.errstate(invalid="ignore"):
            header["srow_x"], header["srow_y"], header["srow_z"] = self.sform
            header["quatern_b"], header["quatern_c"], header["quatern_d"] = self.quaternion
            header["qoffset_x"], header["qoffset_y"], header["qoffset_z"] = self.offset
            header["pixdim"][:4] = self.pixdim
        header["xyzt_units"] = self.unit


@dataclass(frozen=True, eq=False)
class Geometry:
    """The geometry of a NIfTI file after all checks.

    Attributes:
        affine: float64 4x4, voxel index to RAS+ mm.
        forms: what a mask of this image stores.
        warnings: what was corrected or assumed, one sentence each.
    """

    affine: NDArray[np.float64]
    forms: NiftiForms
    warnings: tuple[str, ...]


def geometry_of(forms: NiftiForms, shape: tuple[int, ...], name: object) -> Geometry:
    """Check the geometry in a NIfTI header and return its affine: the sform if its code is set, else the qform.

    Args:
        forms: geometry as stored.
        shape: voxels along x, y, z.
        name: file, for messages.

    Raises:
        GeometryError: no form is set, a value is impossible, or the forms describe different lattices.
    """
    _check_values(forms, name)
    forms, warnings = _without_rounding(*_without_empty_sform(forms, name))
    label, to_mm = _UNITS.get(forms.unit, ("mm", 1.0))
    if forms.unit not in _UNITS:
        warnings += ("The unit of length in the header is not defined by NIfTI; millimetres are assumed.",)
    elif to_mm != 1.0:
        _check_unit(forms, label, to_mm, name)
        warnings += (f"The header gives lengths in {label}; they were converted to mm.",)
    if forms.sform_code == 0:
        affine = _qform(forms)
        warnings += _coarse_rotation(forms, affine, shape)
    else:
        affine = np.vstack([forms.sform, (0.0, 0.0, 0.0, 1.0)])
        _check_axes(affine, name)
        if forms.qform_code == 0:
            _check_spacing(forms, affine, shape, name, label)
        else:
            warnings += _check_both(forms, affine, shape, name, to_mm)
    return Geometry(_in_mm(affine, to_mm, forms.version), forms, warnings)


def _in_mm(affine: NDArray[np.float64], to_mm: float, version: int) -> NDArray[np.float64]:
    """Return an affine in mm, rounded as its numbers are stored: 0.005 m in float32 are 5 mm and not 4.99999988 mm."""
    if to_mm == 1.0:
        return affine
    scaled: NDArray[np.float64] = np.diag([to_mm, to_mm, to_mm, 1.0]) @ affine
    return scaled.astype(np.float32).astype(np.float64) if version == 1 else scaled


def _check_values(forms: NiftiForms, name: object) -> None:
    for field, code in (("sform_code", forms.sform_code), ("qform_code", forms.qform_code)):
        if code not in _CODES:
            raise _refused(name, f"the value {code} of {field}, but NIfTI defines 0 to {_CODES[-1]}")
    if forms.sform_code == 0 and forms.qform_code == 0:
        raise GeometryError(f"{name} has no geometry: its sform and its qform are not set.", remedy=f"{_CONVERT}.")
    for number, spacing in enumerate(forms.pixdim[1:].tolist(), start=1):
        if not 0 < spacing <= _LARGEST:
            raise _refused(name, f"the voxel spacing {spacing:g} along axis {number} (pixdim[{number}])")
    if forms.sform_code and not _in_range(forms.sform):
        raise _refused(name, "an sform with values that are not finite or impossibly large")
    if forms.qform_code:
        if not (_in_range(forms.quaternion) and _in_range(forms.offset)):
            raise _refused(name, "a qform with values that are not finite or impossibly large")
        # A qfac of 0 counts as 1 (nifti1.h, method 2). Other values are read with either sign.
        if forms.pixdim[0] not in (-1.0, 0.0, 1.0):
            raise _refused(name, f"the value {forms.pixdim[0]:g} of qfac (pixdim[0]), which must be 1 or -1")
        if (excess := -_w_squared(forms)) > _QUATERNION_ROUNDING:
            raise _refused(name, f"a qform that is no rotation: b² + c² + d² of its quaternion is {1 + excess:g}")


def _in_range(values: NDArray[np.float64]) -> bool:
    return bool((np.abs(values) <= _LARGEST).all())


def _without_empty_sform(forms: NiftiForms, name: object) -> tuple[NiftiForms, tuple[str, ...]]:
    """Return the geometry without an sform of zeros: every mask stores the sform as not set, with the same place."""
    if forms.sform_code == 0 or forms.sform[:, :3].any():
        return forms, ()
    if forms.qform_code == 0:
        raise _refused(name, "an sform of zeros, and no qform")
    warning = "The sform of the scan is declared, but contains only zeros; the qform was used."
    return replace(forms, sform_code=0), (warning,)


def _without_rounding(forms: NiftiForms, warnings: tuple[str, ...]) -> tuple[NiftiForms, tuple[str, ...]]:
    """Return the geometry with a quaternion that every program can read.

    ITK scales a quaternion that is longer than 1; nibabel refuses the file. Both read the scaled quaternion.
    """
    length = float(np.linalg.norm(forms.quaternion))
    if forms.qform_code == 0 or length**2 <= 1 + _STORED_ROUNDING[forms.version]:
        return forms, warnings
    warning = "The quaternion of the qform is longer than 1 by rounding; it was scaled to 1."
    return replace(forms, quaternion=forms.quaternion / length), (*warnings, warning)


def _qform(forms: NiftiForms, w: float | None = None) -> NDArray[np.float64]:
    """Return the affine of the qform in the unit of the file.

    Args:
        forms: geometry.
        w: first part of the quaternion; None computes it from the others.
    """
    if w is None:
        square = _w_squared(forms)
        w = 0.0 if square < _SMALLEST_SQUARE[forms.version] else float(np.sqrt(square))
    rotation = nib.quaternions.quat2mat([w, *forms.quaternion])
    affine = np.eye(4)
    affine[:3, :3] = rotation * forms.pixdim[1:]
    affine[:3, 2] *= -1.0 if forms.pixdim[0] < 0 else 1.0
    affine[:3, 3] = forms.offset
    return affine


def _w_squared(forms: NiftiForms) -> float:
    return 1 - float(forms.quaternion @ forms.quaternion)


def _coarse_rotation(forms: NiftiForms, affine: NDArray[np.float64], shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return a warning if readers of a qform differ: near a rotation of 180 degrees, w is smaller than its rounding."""
    if forms.version != 1 or abs(_w_squared(forms)) >= nib.nifti1.Nifti1Header.quaternion_threshold:
        return ()  # else nibabel takes w as 0
    apart = deviation(affine, _qform(forms, 0.0), shape)
    if apart.is_rounding:
        return ()
    return (f"The qform stores the rotation so coarsely that programs place voxels up to {apart.mm:.2g} mm apart.",)


def _check_unit(forms: NiftiForms, label: str, to_mm: float, name: object) -> None:
    spacing = forms.pixdim[1:] * to_mm
    if spacing.min() < PLAUSIBLE_SPACING_MM[0] or spacing.max() > PLAUSIBLE_SPACING_MM[1]:
        raise GeometryError(
            f"{name} gives its lengths in {label}, so that its voxel spacing would be "
            f"{' x '.join(f'{step:g}' for step in spacing)} mm.",
            remedy=f"{_CONVERT}; if the lengths are in mm, set the unit with nibabel: "
            'image.header.set_xyzt_units("mm").',
        )


def _check_axes(affine: NDArray[np.float64], name: object) -> None:
    """Raise GeometryError if an axis of the sform has no length, or all axes are in one plane."""
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    with np.errstate(all="ignore"):  # a singular matrix may divide by zero
        volume = abs(np.linalg.det(affine[:3, :3] / steps))
    if not ((steps > 0).all() and volume >= 1e-3):
        raise _refused(name, "a singular sform: its axes have no length or are in one plane")


def _check_spacing(
    forms: NiftiForms, affine: NDArray[np.float64], shape: tuple[int, ...], name: object, label: str
) -> None:
    """Raise GeometryError if ``pixdim`` gives other distances than the sform. ITK reads only ``pixdim``."""
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if deviation(np.diag([*steps, 1.0]), np.diag([*forms.pixdim[1:], 1.0]), shape).is_rounding:
        return
    raise GeometryError(
        f"{name} has two geometries that disagree: the voxel spacing is {_printed(steps)} {label} in its sform, but "
        f"{_printed(forms.pixdim[1:])} {label} in its pixdim, which ITK reads.",
        remedy=_REPAIR.format(convert=_CONVERT),
    )


def _check_both(
    forms: NiftiForms, affine: NDArray[np.float64], shape: tuple[int, ...], name: object, to_mm: float
) -> tuple[str, ...]:
    """Compare sform and qform.

    A qform cannot contain shear. A sheared sform is therefore compared as the nearest matrix without shear, which is
    what programs store as its qform.

    Returns:
        A warning if the sform is sheared.

    Raises:
        GeometryError: the forms place a voxel differently by more than rounding.
    """
    straight = without_shear(affine)
    apart = deviation(straight, _qform(forms), shape)
    if not apart.is_rounding:
        apart = min(apart, deviation(straight, _qform_nearest(forms, straight), shape), key=lambda found: found.voxels)
    if not apart.is_rounding:
        steps = np.linalg.norm(affine[:3, :3], axis=0) * to_mm
        raise GeometryError(
            f"{name} has two geometries that disagree: its sform (code {forms.sform_code}) and its qform (code "
            f"{forms.qform_code}) place voxels up to {apart.mm * to_mm:.3g} mm apart, at the voxel "
            f"{list(apart.corner)}. The voxel spacing is {_printed(steps)} mm in the sform and "
            f"{_printed(forms.pixdim[1:] * to_mm)} mm in the qform (pixdim).",
            remedy=_REPAIR.format(convert=_CONVERT),
        )
    # Each of two differences can be rounding, and their sum can be more: programs may read either form.
    read = (deviation(form, affine, shape) for form in (_qform(forms), _qform_nearest(forms, straight)))
    candidates = (deviation(straight, affine, shape), min(read, key=lambda found: found.voxels))
    shear = max(candidates, key=lambda found: found.voxels)
    if shear.is_rounding:
        return ()
    return (
        "The axes of the sform are not perpendicular, as after a tilt of the gantry. Programs that read only the qform "
        f"show scan and mask without this shear, up to {shear.mm * to_mm:.3g} mm away.",
    )


def without_shear(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the affine with the nearest perpendicular axes, and with the same voxel spacing and offset."""
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / steps)
    straight = affine.copy()
    straight[:3, :3] = (left @ right) * steps
    return straight


def _qform_nearest(forms: NiftiForms, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the affine of the qform whose w, within the rounding of the stored float32, is nearest to an affine's."""
    rounding = _STORED_ROUNDING[forms.version]
    low, high = (float(np.sqrt(max(0.0, _w_squared(forms) + error))) for error in (-rounding, rounding))
    rotation = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    rotation[:, 2] *= -1.0 if forms.pixdim[0] < 0 else 1.0
    if np.linalg.det(rotation) < 0:
        return _qform(forms)
    wanted = nib.quaternions.mat2quat(rotation)
    return _qform(forms, float(np.clip(abs(wanted[0]), low, high)))


def _printed(spacing: NDArray[np.float64]) -> str:
    return " x ".join(f"{step:.6g}" for step in spacing)


def _refused(name: object, what: str) -> GeometryError:
    return GeometryError(f"{name} has {what}.", remedy=f"{_CONVERT}.")
