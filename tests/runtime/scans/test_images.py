"""CTs and label maps as NIfTI images in memory."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest
from doubles import nifti_files as files
from doubles.errors import refused
from doubles.nifti_files import AFFINE, turned, write

from fseft_edge.runtime.errors import GeometryError, LabelError, NotACtError, UnreadableFileError
from fseft_edge.runtime.scans.images import image_of_label_map, label_map_of_image, volume_of_image
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map, read_label_names, write_label_map
from fseft_edge.runtime.scans.volume import LabelMap

OBLIQUE = turned((3, 7, -12))
NAMES = {1: "liver", 2: "lung"}


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
@pytest.mark.parametrize("codes", [(1, 1), (0, 1), (2, 0)])
def test_a_loaded_image_is_the_volume_of_its_file(tmp_path, name, codes):
    path = write(tmp_path / name, sform=OBLIQUE, qform=OBLIQUE, codes=codes)
    loaded, stored = volume_of_image(nib.load(path)), read_ct(path)
    np.testing.assert_array_equal(loaded.array, stored.array)
    assert loaded.array.dtype == stored.array.dtype
    np.testing.assert_array_equal(loaded.affine, stored.affine)
    for image in (loaded, stored):
        write_label_map(tmp_path / "mask.nii", image.label_map(files.organs(np.asarray(image.array))))
        assert files.stored_geometry(tmp_path / "mask.nii") == files.stored_geometry(path)


def test_stored_values_of_a_loaded_image_are_scaled_only_on_demand(tmp_path):
    stored = (files.phantom() + 1024).astype(np.uint16)
    path = write(tmp_path / "ct.nii", stored, patches=[(files.SLOPE, "2f", (1.0, -1024.0))])
    volume = volume_of_image(nib.load(path))
    assert volume.array.dtype == np.uint16
    assert (volume.slope, volume.intercept) == (1.0, -1024.0)
    np.testing.assert_array_equal(volume.hu((slice(0, 48), slice(0, 40), slice(0, 16))), files.phantom())


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_values_of_an_array_in_memory_are_hu(dtype):
    volume = volume_of_image(nib.Nifti1Image(files.phantom().astype(dtype), AFFINE))
    np.testing.assert_array_equal(volume.array, files.phantom())
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.warnings == ()


def test_the_affine_that_nibabel_would_save_is_the_affine(tmp_path):
    image = nib.load(write(tmp_path / "ct.nii", sform=OBLIQUE, qform=OBLIQUE))
    image.affine[:3, 3] += 7
    volume = volume_of_image(image)
    assert image.header["qform_code"] == 1  # the image of the user is unchanged
    nib.save(image, tmp_path / "saved.nii")
    np.testing.assert_array_equal(volume.affine, read_ct(tmp_path / "saved.nii").affine)
    np.testing.assert_array_equal(volume.affine, nib.load(tmp_path / "saved.nii").affine)


def test_an_image_without_a_usable_affine_is_refused():
    with refused(GeometryError, "not set"):
        volume_of_image(nib.Nifti1Image(files.phantom(), None))
    with refused(GeometryError, "spacing"):
        volume_of_image(nib.Nifti1Image(files.phantom(), AFFINE / 1e6))
    image = nib.Nifti1Image(files.phantom(), AFFINE)
    image.affine[0, 0] = np.nan
    with refused(GeometryError, "not finite"):
        volume_of_image(image)


def test_an_image_that_is_not_a_ct_is_refused():
    with refused(NotACtError, "4 dimensions"):
        volume_of_image(nib.Nifti1Image(np.stack([files.phantom()] * 2, axis=3), AFFINE))
    with refused(NotACtError, "HU"):
        volume_of_image(nib.Nifti1Image(np.abs(files.phantom()), AFFINE))


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
def test_an_image_whose_file_was_cut_off_is_refused(tmp_path, name):
    image = nib.load(write(tmp_path / name))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:900])
    with refused(UnreadableFileError, "image in memory"):
        volume_of_image(image)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, bool])
def test_labels_in_memory_are_whole_numbers_in_the_smallest_type(dtype):
    labels = files.organs(files.phantom()).astype(dtype)
    found = label_map_of_image(nib.Nifti1Image(labels.astype(np.uint8) if dtype is bool else labels, AFFINE))
    assert found.array.dtype == np.uint8
    np.testing.assert_array_equal(found.array, labels)
    np.testing.assert_array_equal(found.affine, AFFINE)


def test_labels_in_memory_that_are_no_labels_are_refused():
    with refused(LabelError, "0.5"):
        label_map_of_image(nib.Nifti1Image(files.organs(files.phantom()) / 2, AFFINE))
    for shape in ((0, 4, 3), (5, 0, 3), (5, 4, 0), (5, 4), (5, 4, 3, 2)):
        with refused(LabelError, shape):
            label_map_of_image(nib.Nifti1Image(np.zeros(shape, np.uint8), AFFINE))


def test_warnings_about_labels_in_memory_are_logged(tmp_path, caplog):
    path = write(tmp_path / "labels.nii", files.organs(files.phantom()), patches=[(files.SROW, "12f", [0.0] * 12)])
    label_map_of_image(nib.load(path))
    assert "sform" in caplog.text


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_mask_in_memory_is_saved_as_the_mask_file(tmp_path, kind):
    scan = read_ct(write(tmp_path / "ct.nii", sform=OBLIQUE, qform=OBLIQUE, codes=(2, 1), kind=kind))
    labels = scan.label_map(files.organs(files.phantom()))
    image = image_of_label_map(labels, NAMES)
    assert isinstance(image, kind)
    np.testing.assert_array_equal(image.affine, scan.affine)
    nib.save(image, tmp_path / "saved.nii")
    write_label_map(tmp_path / "written.nii", labels, NAMES)
    assert (tmp_path / "saved.nii").read_bytes() == (tmp_path / "written.nii").read_bytes()
    assert read_label_names(tmp_path / "saved.nii") == NAMES


def test_a_mask_in_memory_becomes_a_label_map_again():
    labels = LabelMap(files.organs(files.phantom()), AFFINE)
    image = image_of_label_map(labels)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), labels.array)
    again = label_map_of_image(image)
    np.testing.assert_array_equal(again.array, labels.array)
    np.testing.assert_array_equal(again.affine, AFFINE)


def test_a_pair_of_files_can_be_in_memory(tmp_path):
    nib.save(nib.Nifti1Pair(files.organs(files.phantom()), AFFINE), tmp_path / "a.img")
    np.testing.assert_array_equal(
        label_map_of_image(nib.load(tmp_path / "a.hdr")).array, read_label_map(tmp_path / "a.hdr").array
    )


def test_an_image_from_bytes_has_no_file(tmp_path):
    raw = gzip.decompress(write(tmp_path / "ct.nii.gz").read_bytes())
    np.testing.assert_array_equal(volume_of_image(nib.Nifti1Image.from_bytes(raw)).array, files.phantom())
