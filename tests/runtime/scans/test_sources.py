"""Scans at a path: NIfTI files, or a DICOM series in a folder, an archive or a file."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from doubles.dicom import Series, save, some_hu, zipped
from doubles.errors import refused

from fseft_edge.runtime.errors import UnreadableFileError, UsageError
from fseft_edge.runtime.scans.sources import list_scans, read_scan, scan_name


def nifti(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(some_hu(), np.eye(4)), path)
    return path


def test_a_folder_with_nifti_files_contains_these_scans_even_with_dicom_files(tmp_path):
    Series(some_hu()).write(tmp_path)
    Series(some_hu()).write(tmp_path / "below")
    files = [nifti(tmp_path / "a.nii.gz"), nifti(tmp_path / "b.nii")]
    assert list_scans(tmp_path) == files
    assert [read_scan(file).source for file in files] == files


def test_a_folder_with_dicom_in_a_subfolder_is_one_scan(tmp_path):
    Series(some_hu()).write(tmp_path / "in" / "study" / "series")
    nifti(tmp_path / "in" / "other" / "a.nii.gz")
    assert list_scans(tmp_path / "in") == [tmp_path / "in"]
    assert read_scan(tmp_path / "in").shape == some_hu().shape


def test_files_and_archives_are_one_scan_each(tmp_path):
    archive = zipped(Series(some_hu()).write(tmp_path / "in"), tmp_path / "p.zip")
    image = save(Series(some_hu()).enhanced(), tmp_path / "p.dcm")
    bare = save(Series(some_hu()).enhanced(), tmp_path / "p")
    for path in (archive, image, bare):
        assert list_scans(path) == [path]
        assert read_scan(path).source == path


def test_a_nifti_pair_is_one_scan_and_dicom_files_named_img_are_a_series(tmp_path):
    (tmp_path / "nifti").mkdir()
    nib.save(nib.Nifti1Pair(some_hu(), np.diag([5.0, 5.0, 5.0, 1.0])), tmp_path / "nifti" / "a.img")
    header, voxels = tmp_path / "nifti" / "a.hdr", tmp_path / "nifti" / "a.img"
    assert list_scans(tmp_path / "nifti") == [header]
    for path in (header, voxels):
        assert list_scans(path) == [header]
        assert scan_name(path) == "a"
        np.testing.assert_array_equal(read_scan(path).array, some_hu())
    for file in sorted(Series(some_hu()).write(tmp_path / "dicom").iterdir()):
        file.rename(file.with_suffix(".img"))
    assert list_scans(tmp_path / "dicom") == [tmp_path / "dicom"]
    assert read_scan(tmp_path / "dicom").shape == some_hu().shape
    image = save(Series(some_hu()).enhanced(), tmp_path / "slice.img")
    assert list_scans(image) == [image]
    assert read_scan(image).shape == some_hu().shape


@pytest.mark.parametrize("name", ["empty", "texts", "notes.txt", "missing", "missing.nii.gz", "texts.zip"])
def test_a_path_without_nifti_and_dicom_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "notes.txt").write_text("text")
    zipped(tmp_path / "texts", tmp_path / "texts.zip")
    with refused(UnreadableFileError, tmp_path / name):
        list_scans(tmp_path / name)


def test_scan_name_is_the_name_without_suffix(tmp_path, monkeypatch):
    (tmp_path / "1.2.3").mkdir()
    (tmp_path / "b.zip").mkdir()
    names = {"a.nii.gz": "a", "A.NII": "A", "a.zip": "a", "a.b.ZIP": "a.b", "a.dcm": "a", "IM1": "IM1"}
    names |= {"1.2.3": "1.2.3", "b.zip": "b.zip"}
    assert {name: scan_name(tmp_path / name) for name in names} == names
    monkeypatch.chdir(tmp_path / "1.2.3")
    assert scan_name(Path()) == "1.2.3"


def test_a_series_of_a_nifti_file_is_refused(tmp_path):
    with refused(UsageError, "a.nii", "--series"):
        read_scan(nifti(tmp_path / "a.nii"), "1")
