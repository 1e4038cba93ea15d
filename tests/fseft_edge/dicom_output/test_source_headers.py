"""Headers that DICOM does not allow: what a result does not need is left out, and the rest is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from doubles.dicom import PATIENT, Series, save, some_hu
from doubles.errors import refused
from doubles.odd_headers import LEFT_OUT, REFUSED, put, raw
from pydicom.dataset import Dataset

from fseft_edge.dicom_output import SegmentationAlgorithm, SourceHeaders, WrittenDicom, write_dicom_results
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.runtime.errors import GeometryError, InputError
from fseft_edge.runtime.scans.dicom import choose_series, find_series, read_series
from fseft_edge.runtime.scans.volume import LabelMap, Volume

SERIES = Series(some_hu((9, 8, 6)), spacing=(2.0, 2.0, 2.5))
ORGANS = (SegmentedOrgan("liver", 300, 1.0, ()), SegmentedOrgan("spleen", 7, 1.0, ()))


def read(folder: Path) -> tuple[list[Dataset], Volume]:
    series = choose_series(find_series(folder), None)
    return series.headers(), read_series(series)


def mask(volume: Volume) -> LabelMap:
    array = np.zeros(volume.shape, np.uint16)
    array[2:7, 1:5, 1:4] = 300
    array[3:5, 5:7, 2:5] = 7
    return volume.label_map(array)


def write(folder: Path, source: list[Dataset] | tuple[Dataset, ...], volume: Volume) -> tuple[WrittenDicom, ...]:
    algorithm = SegmentationAlgorithm("0" * 64)
    return write_dicom_results(
        folder, "case", ("seg", "rtstruct"), labels=mask(volume), organs=ORGANS, source=source, algorithm=algorithm
    )


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_result_does_not_need_is_left_out_with_a_warning(tmp_path: Path, name: str) -> None:
    change, named = LEFT_OUT[name]
    headers, volume = read(SERIES.write(tmp_path / "in", change))
    found = SourceHeaders.checked(headers, volume)
    for element in named:
        assert any(element in warning for warning in found.warnings)
    assert len(found.warnings) == len(named)
    assert not any(secret in "".join(found.warnings) for secret in ("Secretname", "1949"))
    of_raw, of_checked = write(tmp_path / "raw", headers, volume), write(tmp_path / "out", found.images, volume)
    assert of_raw[0].warnings == found.warnings
    assert of_checked[0].warnings == tuple(warning for warning in found.warnings if "unchanged" in warning)
    for kind in ("seg", "rtstruct"):
        path = tmp_path / "out" / f"case.{kind}.dcm"
        assert path.read_bytes() == (tmp_path / "raw" / f"case.{kind}.dcm").read_bytes()
        written = pydicom.dcmread(path)
        # Every element is converted. UIDs are left out, because their random digits can contain any number.
        texts = "".join(str(element.value) for element in written.iterall() if element.VR not in ("UI", "SQ"))
        assert not any(secret in texts.replace(PATIENT, "") for secret in ("Secretname", "1949"))
        assert all(keyword in written for keyword in ("StudyDate", "StudyTime", "PatientSex", "StudyID"))
        assert written.StudyInstanceUID == headers[0].StudyInstanceUID
    read_again = highdicom.seg.segread(tmp_path / "out" / "case.seg.dcm")
    found_mask = read_again.get_volume(combine_segments=True)
    assert (found_mask.array > 0).sum() == (mask(volume).array > 0).sum()


def test_an_independent_reader_finds_the_mask_at_its_place(tmp_path: Path) -> None:
    changes = [LEFT_OUT[name][0] for name in ("two dates", "a slice thickness with its unit", "a time in words")]

    def change(dataset: Dataset, place: int) -> None:
        for one in changes:
            one(dataset, place)

    headers, volume = read(SERIES.write(tmp_path / "in", change))
    write(tmp_path, headers, volume)
    program = Path(sys.executable).with_name("segimage2itkimage")
    command = ["--inputDICOM", tmp_path / "case.seg.dcm", "--outputDirectory", tmp_path, "--prefix", "r"]
    subprocess.run([program, *command], check=True, capture_output=True)  # noqa: S603 - a program of dcmqi with fixed arguments
    labels = mask(volume)
    for number, organ in enumerate(ORGANS, start=1):
        image = sitk.ReadImage(tmp_path / f"r-{number}.nrrd")
        places = np.argwhere(sitk.GetArrayFromImage(image) > 0)[:, ::-1]
        found = np.array([image.TransformIndexToPhysicalPoint(at.tolist()) for at in places]) * (-1, -1, 1)
        expected = np.argwhere(labels.array == organ.label) @ labels.affine[:3, :3].T + labels.affine[:3, 3]
        np.testing.assert_allclose(
            found[np.lexsort(found.round(1).T)], expected[np.lexsort(expected.round(1).T)], atol=0.01
        )


@pytest.mark.parametrize(
    ("written", "date"),
    [(b"2020-01-31", "20200131"), (b"2020.01.31", "20200131"), (b"2020/01/31", "20200131"), (b"2020-02-31", "")],
)
def test_a_date_in_another_form_is_corrected_if_it_has_one_meaning(tmp_path: Path, written: bytes, date: str) -> None:
    def change(dataset: Dataset, place: int) -> None:
        raw("StudyDate", written)(dataset, place)
        raw("StudyTime", b"10:11:12")(dataset, place)

    headers, volume = read(SERIES.write(tmp_path / "in", change))
    found = SourceHeaders.checked(headers, volume)
    assert len(found.warnings) == 2
    write(tmp_path, found.images, volume)
    for kind in ("seg", "rtstruct"):
        dataset = pydicom.dcmread(tmp_path / f"case.{kind}.dcm")
        assert (dataset.StudyDate, dataset.StudyTime) == (date, "101112")
    assert pydicom.dcmread(tmp_path / "case.seg.dcm").ContentDate == (date or "19000101")


def test_a_valid_series_is_copied_without_a_warning(tmp_path: Path) -> None:
    def change(dataset: Dataset, _: int) -> None:
        dataset.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        dataset.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"
        dataset.StudyDate, dataset.StudyTime, dataset.PatientSex = "20240229", "101112.5", "F"
        dataset.LossyImageCompression, dataset.LossyImageCompressionMethod = "01", "ISO_10918_1"
        dataset.LossyImageCompressionRatio, dataset.SliceThickness = "12.5", "1.25"

    headers, volume = read(SERIES.write(tmp_path / "in", change))
    found = SourceHeaders.checked(headers, volume)
    assert found.warnings == ()
    write(tmp_path, found.images, volume)
    for kind in ("seg", "rtstruct"):
        dataset = pydicom.dcmread(tmp_path / f"case.{kind}.dcm")
        assert str(dataset.PatientName) == "Yamada^Tarou=山田^太郎=やまだ^たろう"
        assert (dataset.StudyDate, dataset.StudyTime, dataset.PatientSex) == ("20240229", "101112.5", "F")
    segmentation = pydicom.dcmread(tmp_path / "case.seg.dcm")
    measures = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert float(measures.SliceThickness) == 1.25


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_result_must_contain_is_refused(tmp_path: Path, name: str) -> None:
    change, named = REFUSED[name]
    headers, volume = read(SERIES.write(tmp_path / "in", change))
    kind = GeometryError if name == "no frame of reference" else InputError
    with refused(kind, named) as caught:
        SourceHeaders.checked(headers, volume)
    assert not any(secret in str(caught.value) for secret in ("Secretname", "1949"))
    with refused(kind, named):
        write(tmp_path / "out", headers, volume)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_a_position_that_is_no_number_is_refused_and_named(tmp_path: Path, keyword: str) -> None:
    headers, volume = read(SERIES.write(tmp_path / "in"))
    put(headers[2], keyword, b"Secretname\\1949")
    with refused(GeometryError, keyword, "(00") as caught:
        SourceHeaders.checked(headers, volume)
    assert not any(secret in str(caught.value) for secret in ("Secretname", "1949"))


def test_numbers_that_are_too_long_are_shortened(tmp_path: Path) -> None:
    headers, volume = read(SERIES.write(tmp_path / "in"))
    for header in headers:
        exact = [float(value) for value in header.ImagePositionPatient]
        put(header, "ImagePositionPatient", "\\".join(f"{value:.20f}" for value in exact).encode())
    write(tmp_path, SourceHeaders.checked(headers, volume).images, volume)
    for item in pydicom.dcmread(tmp_path / "case.seg.dcm").PerFrameFunctionalGroupsSequence:
        position = item.PlanePositionSequence[0].ImagePositionPatient
        assert all(len(str(value)) <= 16 for value in position)


def test_frames_of_a_multi_frame_image_are_cleaned_too(tmp_path: Path) -> None:
    image = SERIES.enhanced([4, 2, 0, 5, 1, 3])
    put(image.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0], "SliceThickness", b"1949mm")
    put(image, "StudyDate", b"Secretname")
    save(image, tmp_path / "in" / "all.dcm")
    headers, volume = read(tmp_path / "in")
    found = SourceHeaders.checked(headers, volume)
    assert len(found.warnings) == 2
    write(tmp_path, found.images, volume)
    segmentation: Any = highdicom.seg.segread(tmp_path / "case.seg.dcm")
    assert (segmentation.get_volume(combine_segments=True).array > 0).sum() == (mask(volume).array > 0).sum()
