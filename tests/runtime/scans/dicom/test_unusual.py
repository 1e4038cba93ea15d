"""Unusual headers that have one right reading are read as by SimpleITK and dcm2niix, with a warning where needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from doubles.dicom import CT_IMAGE, save, zipped
from doubles.dicom_readers import assert_agrees, hu_of, read_with_simpleitk
from doubles.odd_dicom import READABLE, SERIES, raw, with_commas
from pydicom.dataset import Dataset

from fseft_edge.runtime.scans.dicom import choose_series, find_series
from fseft_edge.runtime.scans.sources import read_scan


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """HU and affine of the series according to SimpleITK."""
    return read_with_simpleitk(SERIES.write(tmp_path_factory.mktemp("usual")))


@pytest.mark.parametrize("case", READABLE)
def test_an_unusual_series_is_read_as_the_usual_one(tmp_path, usual, case):
    write, warning = READABLE[case]
    scan = read_scan(write(tmp_path / "in"))
    assert_agrees(scan, usual, voxels=0.1)
    if warning:
        assert any(warning in sentence for sentence in scan.warnings)
    else:
        assert [sentence for sentence in scan.warnings if "several values" not in sentence] == []
    assert "Secretname" not in "".join(scan.warnings)
    np.testing.assert_array_equal(hu_of(scan), SERIES.hu)


@pytest.mark.parametrize("case", ["no preamble", "no file meta, implicit", "deflated", "truncated ultrasound"])
def test_an_archive_of_an_unusual_series_equals_its_folder(tmp_path, case):
    write, _ = READABLE[case]
    folder = write(tmp_path / "in")
    scan, packed = read_scan(folder), read_scan(zipped(folder, tmp_path / "in.zip"))
    np.testing.assert_array_equal(hu_of(packed), hu_of(scan))
    np.testing.assert_array_equal(packed.affine, scan.affine)
    assert packed.warnings == scan.warnings


@pytest.mark.parametrize(
    "case", ["decimal commas everywhere", "no SOPClassUID", "no preamble", "no file meta, implicit"]
)
def test_headers_of_an_unusual_series_are_complete(tmp_path, case):
    """DICOM results refer to these headers, and find their slices by position."""
    write, _ = READABLE[case]
    headers = choose_series(find_series(write(tmp_path / "in"))).headers()
    positions = [[float(value) for value in header.ImagePositionPatient] for header in headers]
    np.testing.assert_allclose(positions, [SERIES.position(place) for place in range(8)], atol=1e-3)
    assert {header.SOPClassUID for header in headers} == {CT_IMAGE}
    assert all([float(value) for value in header.PixelSpacing] == [3.0, 3.0] for header in headers)
    assert all("PixelData" not in header and header.file_meta.TransferSyntaxUID for header in headers)


@pytest.mark.parametrize(("case", "keyword"), [("cosines", "ImageOrientationPatient"), ("spacing", "PixelSpacing")])
def test_headers_of_a_stack_agree_in_their_plane(tmp_path, case, keyword):
    """DICOM SEG can only refer to slices of one orientation."""
    write, _ = READABLE[f"rounded {case}"]
    folder = write(tmp_path / "in")
    (value,) = {
        tuple(float(part) for part in one[keyword].value) for one in choose_series(find_series(folder)).headers()
    }
    scan = read_scan(folder)
    assert float(np.linalg.norm(value[:3])) == pytest.approx(1 if case == "cosines" else 3.00005 * 2**0.5)
    if case == "cosines":
        np.testing.assert_allclose(np.multiply(value[:3], (-1, -1, 1)), scan.affine[:3, 0] / 3, atol=1e-7)


def test_a_copy_of_an_enhanced_image_is_left_out(tmp_path):
    dataset = SERIES.enhanced([3, 1, 0, 2, 7, 5, 6, 4])
    save(dataset, tmp_path / "a")
    save(dataset, tmp_path / "b")
    scan = read_scan(tmp_path)
    np.testing.assert_array_equal(hu_of(scan), SERIES.hu)
    assert scan.warnings == ("8 copies of slices were left out: position and pixels are equal.",)


def test_decimal_commas_in_an_enhanced_image(tmp_path):
    dataset = SERIES.enhanced()
    with_commas(dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0], "PixelSpacing")
    for group in dataset.PerFrameFunctionalGroupsSequence:
        with_commas(group.PlanePositionSequence[0], "ImagePositionPatient")
    scan = read_scan(save(dataset, tmp_path / "a"))
    np.testing.assert_array_equal(hu_of(scan), SERIES.hu)
    np.testing.assert_allclose(scan.affine[:3, 3], (36, 30, -400), atol=1e-9)
    assert len(scan.warnings) == 2
    (header,) = choose_series(find_series(tmp_path / "a")).headers()
    first = header.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
    assert [float(value) for value in first.ImagePositionPatient] == [-36, -30, -400]


def test_padding_values_beside_the_first_never_remove_tissue(tmp_path):
    """The second value, 60 HU, would make tissue to air. The third one is air."""
    first, tissue, air = -2000, 60 + 1024, -1500

    def change(dataset: Dataset, _: int) -> None:
        raw(dataset, "PixelPaddingValue", "SS", np.array([first, tissue, air], "<i2").tobytes())
        stored = np.frombuffer(dataset.PixelData, "<i2").copy()
        stored[:3] = first, tissue, air
        dataset.PixelData = stored.tobytes()

    scan = read_scan(SERIES.write(tmp_path, change))
    np.testing.assert_array_equal(hu_of(scan)[:3, 0, 0], [-1024, 60, -1024])
    assert "PixelPaddingValue (0028,0120) has several values" in scan.warnings[0]


def test_the_series_without_uid_of_two_frames_of_reference_are_two_series(tmp_path):
    for name, frame in (("a", "1.2.3"), ("b", "1.2.4")):
        series = replace(SERIES, hu=SERIES.hu[:, :, : 8 if name == "a" else 5], frame_of_reference=frame)
        series.write(tmp_path / name, lambda dataset, _: delattr(dataset, "SeriesInstanceUID"))
    assert [len(series.slices) for series in find_series(tmp_path)] == [8, 5]
