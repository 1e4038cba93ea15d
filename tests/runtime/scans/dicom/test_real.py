"""A real CT series from an archive, compared with two independent readers."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from fseft_edge.runtime.scans.nifti import read_ct
from fseft_edge.runtime.scans.sources import list_scans, read_scan
from fseft_edge.runtime.scans.volume import Volume

pytestmark = pytest.mark.real_ct


@pytest.fixture(scope="module")
def archive(real_ct: Path) -> Path:
    return real_ct / "dicom" / "chest_61.zip"


@pytest.fixture(scope="module")
def folder(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chest")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


def hu_of(volume: Volume) -> np.ndarray:
    return volume.hu((slice(None), slice(None), slice(None)))


def test_volume_equals_that_of_simpleitk(archive, folder):
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    expected = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    for path in (archive, folder):
        scan = read_scan(path)
        np.testing.assert_allclose(scan.affine, np.diag([-1, -1, 1, 1]) @ lps, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(hu_of(scan), expected)


def test_volume_equals_that_of_dcm2niix(archive, folder, tmp_path):
    converter = Path(sys.executable).with_name("dcm2niix")
    if not converter.exists():
        pytest.skip("dcm2niix is not installed")
    subprocess.run([converter, "-o", tmp_path, "-f", "chest", folder], check=True, capture_output=True)  # noqa: S603 - fixed arguments
    (converted,) = tmp_path.glob("*.nii")
    expected, scan = read_ct(converted), read_scan(archive)
    turned = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(expected.affine), nib.orientations.io_orientation(scan.affine)
    )
    affine = expected.affine @ nib.orientations.inv_ornt_aff(turned, expected.shape)
    np.testing.assert_allclose(scan.affine, affine, rtol=0, atol=2e-4)  # NIfTI has single precision
    np.testing.assert_array_equal(hu_of(scan), nib.orientations.apply_orientation(hu_of(expected), turned))


def test_folder_and_archive_are_one_scan_each(archive, folder):
    assert list_scans(archive) == [archive]
    assert list_scans(folder) == [folder]
    scan = read_scan(folder)
    assert scan.shape == (512, 512, 61)
    np.testing.assert_allclose(scan.spacing, (0.78125, 0.78125, 5))
    assert scan.axcodes == "LPS"
