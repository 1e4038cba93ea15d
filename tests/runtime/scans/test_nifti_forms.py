"""The two geometries of a NIfTI file: accepted if they agree, refused if they do not, repeated in masks bit for bit."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from doubles import nifti_files as files
from doubles.errors import refused
from doubles.nifti_files import AFFINE, affine_in_itk, affine_in_nibabel, moved, turned, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fseft_edge.runtime.errors import FseftEdgeError, GeometryError
from fseft_edge.runtime.scans.images import volume_of_image
from fseft_edge.runtime.scans.lattice import deviation
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map, write_ct, write_label_map
from fseft_edge.runtime.scans.nifti_forms import NiftiForms, geometry_of

STEPS = AFFINE @ np.diag([1, 1, 6.65 / 5, 1])
MIRRORED = np.diag([-1.0, 1.0, 1.0, 1.0]) @ AFFINE
SHEARED = AFFINE.copy()
SHEARED[1, 2] = 1.0
OBLIQUE = turned((3, 7, -12))


def mask_of(scan: Path, path: Path) -> Path:
    """Write a mask on the lattice of a scan, as ``segment`` does."""
    volume = read_ct(scan)
    write_label_map(path, volume.label_map(files.organs(np.asarray(volume.array))), {1: "liver", 2: "lung"})
    return path


TWO_GEOMETRIES = {
    "z steps of the sform a third larger": ({"sform": STEPS}, "6.65", "24."),
    "all steps of the sform 1 mm": ({"sform": AFFINE @ np.diag([0.2, 0.2, 0.2, 1])}, "1 x 1 x 1 mm", "5 x 5 x 5 mm"),
    "30 mm apart": ({"qform": moved(by=(0, 30, 0))}, "30 mm"),
    "mirrored": ({"qform": MIRRORED}, "240 mm"),
    "origins 0.6 mm apart": ({"qform": moved(by=(0.6, 0, 0))}, "0.6 mm"),
    "turned by half a degree": ({"qform": turned((0.5, 0, 0))}, "sform", "qform"),
    "standard brain and scanner": ({"sform": moved(by=(20, 0, 0)), "codes": (4, 1)}, "code 4", "code 1", "20 mm"),
    "scanner and standard brain": ({"sform": moved(by=(20, 0, 0)), "codes": (1, 4)}, "code 1", "code 4"),
    "pixdim of another scan, without qform": ({"sform": STEPS, "codes": (1, 0)}, "5 x 5 x 6.65", "pixdim", "ITK"),
    "pixdim 1, without qform": ({"codes": (2, 0), "patches": [(files.PIXDIM, "4f", (1, 1, 1, 1))]}, "1 x 1 x 1"),
    "metres": ({"sform": STEPS / 1e3, "qform": AFFINE / 1e3, "unit": "meter"}, "6.65 mm", "24."),
    "NIfTI-2": ({"sform": STEPS, "kind": nib.Nifti2Image}, "6.65"),
    "sheared and 30 mm apart": ({"sform": SHEARED, "qform": moved(SHEARED, by=(30, 0, 0))}, "30 mm"),
}


@pytest.mark.parametrize("name", TWO_GEOMETRIES)
def test_two_geometries_that_disagree_are_refused_and_the_message_says_how_to_repair_the_file(tmp_path, name):
    settings, *named = TWO_GEOMETRIES[name]
    path = write(tmp_path / "ct.nii", **settings)
    for read in (read_ct, read_label_map):
        with refused(GeometryError, path, "two geometries that disagree", "sform", *named) as caught:
            read(path)
        assert "set_qform(image.affine, code=1)" in caught.value.remedy
    with refused(GeometryError, *named):
        volume_of_image(nib.load(path))


def test_the_remedy_repairs_the_file(tmp_path):
    image = nib.load(write(tmp_path / "ct.nii", sform=STEPS))
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    nib.save(image, tmp_path / "sform.nii.gz")
    np.testing.assert_allclose(read_ct(tmp_path / "sform.nii.gz").affine, STEPS, rtol=1e-6)
    image = nib.load(tmp_path / "ct.nii")
    image.set_sform(image.get_qform(), code=1)
    nib.save(image, tmp_path / "qform.nii.gz")
    np.testing.assert_allclose(read_ct(tmp_path / "qform.nii.gz").affine, AFFINE, rtol=1e-6)


ZEROS = (files.SROW, "12f", [0.0] * 12)

IMPOSSIBLE = {
    **{
        f"pixdim[3] {value}, {name}": ({"codes": codes, "patches": [(files.PIXDIM + 12, "f", [value])]}, "pixdim[3]")
        for value in (0.0, -5.0, np.nan, np.inf, -0.0)
        for name, codes in {"qform only": (0, 1), "sform only": (1, 0), "both": (1, 1)}.items()
    },
    "pixdim[1] 0": ({"codes": (0, 1), "patches": [(files.PIXDIM + 4, "f", [0.0])]}, "pixdim[1]"),
    "pixdim[3] a kilometre": ({"codes": (0, 1), "patches": [(files.PIXDIM + 12, "f", [1e6])]}, "1000000.0"),
    "pixdim[3] tiny": ({"codes": (0, 1), "patches": [(files.PIXDIM + 12, "f", [1e-30])]}, "0.01"),
    "no form": ({"codes": (0, 0)}, "not set"),
    "unknown sform code": ({"patches": [(files.SFORM_CODE, "h", [7])]}, "7"),
    "negative qform code": ({"patches": [(files.QFORM_CODE, "h", [-1])]}, "-1"),
    "qfac 2": ({"codes": (0, 1), "patches": [(files.PIXDIM, "f", [2.0])]}, "qfac"),
    "qfac -2, read with both signs": ({"codes": (0, 1), "patches": [(files.PIXDIM, "f", [-2.0])]}, "qfac"),
    "qfac not a number": ({"codes": (0, 1), "patches": [(files.PIXDIM, "f", [np.nan])]}, "qfac"),
    "quaternion far too long": ({"codes": (0, 1), "patches": [(files.QUATERNION, "3f", (0, 0, 1.05))]}, "1.1025"),
    "quaternion not a number": ({"patches": [(files.QUATERNION, "f", [np.nan])]}, "qform"),
    "offset infinite": ({"patches": [(files.QOFFSET, "f", [np.inf])]}, "qform"),
    "sform of zeros alone": ({"codes": (1, 0), "patches": [ZEROS]}, "zeros"),
    "sform not a number": ({"patches": [(files.SROW + 4, "f", [np.nan])]}, "sform"),
    "sform singular": ({"patches": [(files.SROW, "4f", (0, -5, 0, 0))]}, "singular"),
    "metres that are mm": ({"unit": "meter"}, "metres", "5000 x 5000 x 5000 mm"),
    "micrometres that are mm": ({"unit": "micron"}, "micrometres", "0.005 x 0.005 x 0.005 mm"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_geometry_that_no_program_may_invent_is_refused(tmp_path, name):
    settings, *named = IMPOSSIBLE[name]
    for read, array in ((read_ct, files.phantom()), (read_label_map, files.organs(files.phantom()))):
        path = write(tmp_path / "ct.nii", array, **settings)
        with refused(GeometryError, path, *named):
            read(path)


def test_axes_in_one_plane_are_refused_without_a_warning_of_numpy():
    header = nib.Nifti2Header()
    header.set_sform([[6.3e-318, 0, 0, 0], [0, 0, 0, 0], [-0.1, -0.2, 2.4, 100], [0, 0, 0, 1]], code=1)
    with refused(GeometryError, "ct.nii", "singular"):
        geometry_of(NiftiForms.of(header), (4, 4, 4), "ct.nii")


def test_an_image_in_memory_shows_no_correction_of_nibabel(tmp_path):
    path = write(tmp_path / "ct.nii", codes=(0, 1), patches=[(files.PIXDIM + 12, "f", [0.0])])
    image = nib.load(path)
    assert image.header.get_zooms()[2] == 1  # invented
    with refused(GeometryError, "pixdim[3]"):
        volume_of_image(image)


ACCEPTED = {
    "both forms": {},
    "sform only": {"codes": (2, 0)},
    "qform only": {"codes": (0, 1)},
    "qform of another code": {"codes": (2, 3)},
    "sform of a standard brain alone": {"codes": (4, 0)},
    "oblique": {"sform": OBLIQUE, "qform": OBLIQUE},
    "oblique, qform only": {"sform": OBLIQUE, "qform": OBLIQUE, "codes": (0, 2)},
    "cosines of four digits": {"sform": turned((3, 7, -12), 4), "qform": turned((3, 7, -12), 4)},
    "left-handed": {"sform": MIRRORED, "qform": MIRRORED},
    "left-handed, qform only": {"sform": MIRRORED, "qform": MIRRORED, "codes": (0, 1)},
    "origins 0.4 mm apart": {"qform": moved(by=(0.4, 0, 0))},
    "garbage in the qform that is not set": {"codes": (1, 0), "patches": [(files.QUATERNION, "6f", [np.nan] * 6)]},
    "garbage in the sform that is not set": {"codes": (0, 1), "patches": [(files.SROW, "12f", [7.0] * 12)]},
    "qfac 0": {"codes": (0, 1), "patches": [(files.PIXDIM, "f", [0.0])]},
    "no unit": {"unit": "unknown"},
    "rotation by 180 degrees and a little": {"sform": turned((0.03, 0, 0)), "qform": turned((0.03, 0, 0))},
    "quaternion longer than 1 by 2e-7": {"codes": (0, 1), "patches": [(files.QUATERNION, "3f", (0, 0, 1 + 1.2e-7))]},
    "time in seconds": {"patches": [(files.UNITS, "B", [10])]},
}

WARNED = {
    "sform of zeros": ({"patches": [ZEROS]}, "zeros"),
    "metres": ({"sform": AFFINE * 1e-3, "qform": AFFINE * 1e-3, "unit": "meter"}, "metres"),
    "micrometres": ({"sform": AFFINE * 1e3, "qform": AFFINE * 1e3, "unit": "micron"}, "micrometres"),
    "metres, qform only": ({"qform": AFFINE * 1e-3, "unit": "meter", "codes": (0, 1)}, "metres"),
    "quaternion longer than 1 by 4e-7": (
        {"codes": (0, 1), "patches": [(files.QUATERNION, "3f", (0, 0, np.sqrt(1 + 4.5e-7)))]},
        "quaternion",
    ),
    "unknown unit": ({"patches": [(files.UNITS, "B", [5])]}, "unit"),
    "sheared": ({"sform": SHEARED, "qform": SHEARED}, "perpendicular"),
}
for affected in ("metres", "micrometres", "metres, qform only"):
    for form in ("sform", "qform"):
        if form in WARNED[affected][0]:
            WARNED[affected][0][form] = WARNED[affected][0][form].copy()
            WARNED[affected][0][form][3, 3] = 1.0


@pytest.mark.parametrize("name", [*ACCEPTED, *WARNED])
def test_scan_and_mask_lie_at_the_same_place_in_every_program(tmp_path, name):
    fields, *named = WARNED.get(name) or (ACCEPTED[name],)
    scan = write(tmp_path / "ct.nii", **fields)
    volume = read_ct(scan)
    assert len(volume.warnings) == len(named)
    for warning, word in zip(volume.warnings, named, strict=True):
        assert word in warning
    mask = mask_of(scan, tmp_path / "mask.nii")
    assert deviation(volume.affine, read_label_map(mask).affine, volume.shape).mm < 1e-4
    if name not in {"sform of zeros", "quaternion longer than 1 by 4e-7"}:  # which nibabel cannot read
        assert deviation(volume.affine, affine_in_nibabel(scan), volume.shape).mm < 2e-3
    assert deviation(volume.affine, affine_in_nibabel(mask), volume.shape).mm < 2e-3
    assert deviation(affine_in_itk(scan), affine_in_itk(mask), volume.shape).mm < 1e-4
    if name not in {"sheared", "origins 0.4 mm apart", "rotation by 180 degrees and a little"}:
        assert deviation(volume.affine, affine_in_itk(scan), volume.shape).mm < 2e-2


def test_metres_become_the_millimetres_that_were_meant(tmp_path):
    """0.005 is no float32; the field of view of the grid depends on the last digit."""
    fields = WARNED["metres"][0]
    np.testing.assert_array_equal(read_ct(write(tmp_path / "ct.nii", **fields)).affine, AFFINE)


UNCHANGED = [
    name for name in [*ACCEPTED, *WARNED] if name not in {"sform of zeros", "quaternion longer than 1 by 4e-7"}
]


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_mask_repeats_the_geometry_of_its_scan_bit_for_bit(tmp_path, name):
    fields = WARNED[name][0] if name in WARNED else ACCEPTED[name]
    scan = write(tmp_path / "ct.nii", **fields)
    assert files.stored_geometry(mask_of(scan, tmp_path / "mask.nii")) == files.stored_geometry(scan)
    write_ct(tmp_path / "copy.nii", read_ct(scan))
    assert files.stored_geometry(tmp_path / "copy.nii") == files.stored_geometry(scan)


def test_a_mask_of_a_scan_in_nifti_2_has_the_same_float64_affine(tmp_path):
    oblique = turned((3.1, 7.2, -12.3))
    scan = write(tmp_path / "ct.nii", sform=oblique, qform=oblique, kind=nib.Nifti2Image)
    assert np.float32(oblique[0, 0]) != oblique[0, 0]
    mask = nib.load(mask_of(scan, tmp_path / "mask.nii"))
    assert isinstance(mask, nib.Nifti2Image)
    np.testing.assert_array_equal(mask.affine, oblique)
    np.testing.assert_array_equal(mask.get_qform(), nib.load(scan).get_qform())


def test_a_big_endian_scan_has_a_mask_with_the_same_values(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_qform(OBLIQUE, 1)
    header.set_sform(OBLIQUE, 2)
    nib.save(nib.Nifti1Image(files.phantom(), None, header), tmp_path / "ct.nii")
    mask = nib.load(mask_of(tmp_path / "ct.nii", tmp_path / "mask.nii"))
    for field in ("srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "sform_code"):
        np.testing.assert_array_equal(mask.header[field], nib.load(tmp_path / "ct.nii").header[field])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    degrees=st.tuples(*[st.floats(-180, 180)] * 3),
    w_squared=st.none() | st.floats(-4e-7, 4e-7),
    codes=st.sampled_from([(0, 1), (1, 0), (1, 1), (2, 1)]),
)
def test_every_rotation_is_read_as_by_itk(tmp_path, degrees, w_squared, codes):
    """Also near 180 degrees, where float32 stores a quaternion coarsely and programs read it differently."""
    affine = turned(degrees)
    fields = {"sform": affine, "qform": affine, "codes": codes}
    if w_squared is not None:
        axis = affine[:3, 0] / 5 * np.sqrt(1 - w_squared)
        fields |= {"codes": (0, 1), "patches": [(files.QUATERNION, "3f", axis.tolist())]}
    scan = write(tmp_path / "ct.nii", **fields)
    volume = read_ct(scan)
    by_itk = affine_in_itk(scan)
    if codes == (0, 1) or w_squared is not None:
        assert deviation(by_itk, volume.affine, volume.shape).mm < 0.02
        apart = deviation(by_itk, affine_in_nibabel(scan), volume.shape) if not volume.warnings else None
        assert apart is None or apart.is_rounding
    else:
        np.testing.assert_allclose(volume.affine, affine, rtol=1e-6, atol=1e-4)
    assert files.stored_geometry(mask_of(scan, tmp_path / "mask.nii")) == files.stored_geometry(scan) or volume.warnings


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.sampled_from([*range(files.PIXDIM, 92), files.UNITS, *range(files.QFORM_CODE, 328)]),
    value=st.integers(0, 255),
)
@example(position=318, value=134)  # a shear and a rounded qform, each below a tenth of a voxel, together above it
def test_after_a_changed_byte_the_geometry_is_refused_or_the_one_of_other_programs(tmp_path, position, value):
    path = write(tmp_path / "ct.nii", sform=OBLIQUE, qform=OBLIQUE, patches=[(position, "B", [value])])
    try:
        volume = read_ct(path)
    except FseftEdgeError:
        return
    if not any("shear" in warning for warning in volume.warnings):  # ITK reads the qform, which has no shear
        assert deviation(volume.affine, affine_in_itk(path), volume.shape).is_rounding
    if not any("unit" in warning for warning in volume.warnings):
        assert deviation(volume.affine, affine_in_nibabel(path), volume.shape).mm < 1e-3
