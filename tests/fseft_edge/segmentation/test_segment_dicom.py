"""Segmentation of DICOM series: equal masks for DICOM and NIfTI, and file names from the path given by the user."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from doubles.dicom import PATIENT, Series, zipped
from doubles.encoder import SPACING, scan, write_random_adapter, write_tiny_encoder
from doubles.errors import refused
from doubles.odd_headers import LEFT_OUT, REFUSED
from numpy.typing import NDArray

from fseft_edge.cli.main import run as run_command
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import encode_scan
from fseft_edge.runtime.errors import SeveralPatientsError, SomeCasesFailedError, UsageError
from fseft_edge.runtime.scans.nifti import read_label_map, write_ct
from fseft_edge.runtime.scans.sources import read_scan
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.segmentation.segment import SegmentedCase, segment


@dataclass(frozen=True)
class Site:
    """An encoder, an adapter, and a DICOM series of a phantom. The file names contain the name of the patient."""

    root: Path
    bundle: EncoderBundle
    series: Series

    @property
    def folder(self) -> Path:
        return self.root / "inbox" / "case_7"

    def segment(self, *scans: Path, output: Path, series: str | None = None) -> list[SegmentedCase]:
        adapter, cache = self.root / "a.adapter", self.root / "cache"
        return segment(scans, [adapter], output, series=series, cache=cache, device="cpu", backend="torch")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    bundle = write_tiny_encoder(root / "tiny.encoder")
    write_random_adapter(root / "a.adapter", bundle, ("liver", "spleen"))
    series = Series(np.asarray(scan(1).volume.array[12:52, 8:40, 16:40], np.int16), spacing=SPACING)
    site = Site(root, bundle, series)
    series.write(site.folder, names=[f"{PATIENT}_{number:03d}.dcm" for number in range(series.hu.shape[2])])
    return site


def test_the_mask_of_a_dicom_series_equals_that_of_the_nifti_file(site: Site, tmp_path: Path) -> None:
    archive = zipped(site.folder, tmp_path / "packed_7.zip")
    write_ct(tmp_path / "nifti" / "nifti_7.nii.gz", read_scan(site.folder))
    cases = site.segment(site.folder, archive, tmp_path / "nifti", output=tmp_path / "out")
    assert [case.case for case in cases] == ["case_7", "packed_7", "nifti_7"]
    folder, packed, nifti = (read_label_map(case.mask) for case in cases)
    np.testing.assert_array_equal(folder.array, nifti.array)
    np.testing.assert_array_equal(packed.array, nifti.array)
    np.testing.assert_array_equal(folder.affine, nifti.affine)
    assert set(np.unique(folder.array)) == {0, 1, 2}


def test_no_output_contains_patient_data(site: Site, tmp_path: Path) -> None:
    (case,) = site.segment(site.folder, output=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["case_7.json", "case_7.nii.gz"]
    assert "Secretname" not in case.mask.with_name("case_7.json").read_text(encoding="utf-8")
    assert json.loads(case.mask.with_name("case_7.json").read_text(encoding="utf-8"))["case"] == "case_7"


def test_the_series_option_chooses_one_of_two_patients(site: Site, tmp_path: Path) -> None:
    other = replace(Series(site.series.hu[:, :, :12]), spacing=SPACING)
    site.series.write(tmp_path / "in" / "a")
    other.write(tmp_path / "in" / "b", lambda dataset, _: setattr(dataset, "PatientID", "another"))
    with refused(SeveralPatientsError, tmp_path / "in"):
        site.segment(tmp_path / "in", output=tmp_path / "out")
    (case,) = site.segment(tmp_path / "in", output=tmp_path / "out", series=other.uid)
    assert read_label_map(case.mask).shape == other.hu.shape


def test_the_series_option_needs_exactly_one_scan(site: Site, tmp_path: Path) -> None:
    archive = zipped(site.folder, tmp_path / "p.zip")
    with refused(UsageError, "--series", 2):
        site.segment(site.folder, archive, output=tmp_path / "out", series="1")


def test_masks_are_not_written_among_the_slices(site: Site, tmp_path: Path) -> None:
    site.series.write(tmp_path / "case")
    for output in (tmp_path / "case", tmp_path / "case" / "masks"):
        with refused(UsageError, output):
            site.segment(tmp_path / "case", output=output)
    site.segment(tmp_path / "case", output=tmp_path)


def test_an_unusable_series_does_not_stop_the_other_scans(site: Site, tmp_path: Path) -> None:
    site.series.write(tmp_path / "gap", names=[f"{PATIENT}{n:02d}" for n in range(site.series.hu.shape[2])])
    (tmp_path / "gap" / f"{PATIENT}09").unlink()
    with refused(SomeCasesFailedError, "gap") as caught:
        site.segment(tmp_path / "gap", site.folder, output=tmp_path / "out")
    assert len(caught.value.completed) == 1


def test_the_command_lists_the_series_and_selects_one(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: object) -> int:
        where = ("--adapter", site.root / "a.adapter", "-o", tmp_path / "out", "--device", "cpu", "--backend", "torch")
        arguments = ["segment", site.folder, *where, "-q", *more]
        monkeypatch.setattr(sys, "argv", ["fseft-edge", *map(str, arguments)])
        return run_command()

    unknown = next(digit for digit in "98" if not site.series.uid.endswith(digit))  # the end of a UID also selects
    assert run("--series", unknown) == 3
    error = capsys.readouterr().err
    assert "1: CT, 24 slices" in error
    assert "Secretname" not in error
    assert run("--series", site.series.uid) == 0
    assert (tmp_path / "out" / "case_7.nii.gz").exists()


@pytest.mark.real_ct
def test_a_real_archive_from_end_to_end(site: Site, real_ct: Path, tmp_path: Path) -> None:
    archive = real_ct / "dicom" / "chest_61.zip"
    (case,) = site.segment(archive, output=tmp_path)
    mask, volume = read_label_map(case.mask), read_scan(archive)
    assert case.case == "chest_61"
    assert mask.shape == volume.shape == (512, 512, 61)
    np.testing.assert_array_equal(mask.affine, volume.affine)
    assert all(organ.volume_ml > 0 for organ in case.organs)


COS, SIN = math.cos(math.radians(20)), math.sin(math.radians(20))
LAYOUTS = {
    "axial": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "reversed": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "oblique": (COS, 0.0, SIN, 0.0, 1.0, 0.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_independent_reader_finds_the_mask_in_the_dicom_objects(site: Site, tmp_path: Path, layout: str) -> None:
    series = replace(site.series, orientation=LAYOUTS[layout])
    folder = series.write(tmp_path / "case")
    adapter, out = site.root / "a.adapter", tmp_path / "out"
    (case,) = segment([folder], [adapter], out, dicom=["seg", "rtstruct"], device="cpu", backend="torch")
    command = ["--inputDICOM", out / "case.seg.dcm", "--outputDirectory", tmp_path, "--prefix", "read"]
    program = Path(sys.executable).with_name("segimage2itkimage")
    subprocess.run([program, *command], check=True, capture_output=True)  # noqa: S603 - a program of dcmqi with fixed arguments
    labels = read_label_map(case.mask)
    for organ in case.organs:
        image = sitk.ReadImage(tmp_path / f"read-{organ.label}.nrrd")
        found = [image.TransformIndexToPhysicalPoint(at.tolist()) for at in _indices(image)]
        expected = np.argwhere(labels.array == organ.label) @ labels.affine[:3, :3].T + labels.affine[:3, 3]
        assert len(found) == len(expected) > 100
        lps = np.asarray(found) * (-1.0, -1.0, 1.0)
        np.testing.assert_allclose(
            lps[np.lexsort(lps.round(1).T)], expected[np.lexsort(expected.round(1).T)], atol=0.01
        )
    for kind in ("seg", "rtstruct"):
        written = pydicom.dcmread(out / f"case.{kind}.dcm")
        assert written.StudyInstanceUID == series.study
        assert series.frame_of_reference in str(written)
        assert written.PatientName == PATIENT


def _indices(image: sitk.Image) -> NDArray[np.intp]:
    return np.argwhere(sitk.GetArrayFromImage(image) > 0)[:, ::-1]


def test_odd_headers_cost_no_mask_and_a_refusal_comes_before_the_work(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {**LEFT_OUT, **{name: (change, [named]) for name, (change, named) in REFUSED.items()}}
    names = ["a date in words", "a study UID with letters", "a slice thickness with its unit"]
    folders = [site.series.write(tmp_path / "in" / name, odd[name][0]) for name in names]
    encoded: list[Path | None] = []

    def encode(volume: Volume, **more: Any) -> object:
        encoded.append(volume.source)
        return encode_scan(volume, **more)

    monkeypatch.setattr("fseft_edge.segmentation.segmenter.encode_scan", encode)
    options: dict[str, Any] = {"device": "cpu", "backend": "torch", "dicom": ["seg", "rtstruct"]}
    with refused(SomeCasesFailedError, "1 of 3", names[1]) as caught:
        segment(folders, [site.root / "a.adapter"], tmp_path / "out", **options)
    assert len(encoded) == 2
    assert len(caught.value.completed) == 2
    for name in (names[0], names[2]):
        (warning,) = json.loads((tmp_path / "out" / f"{name}.json").read_text(encoding="utf-8"))["warnings"]
        assert odd[name][1][0] in warning
        assert f"{name}: {warning}" in caplog.text
        assert {path.name for path in (tmp_path / "out").glob(f"{name}.*")} == {
            f"{name}.{kind}" for kind in ("json", "nii.gz", "seg.dcm", "rtstruct.dcm")
        }
    assert not any(secret in caplog.text + str(caught.value) for secret in ("Secretname", "1949"))
    segment([folders[1]], [site.root / "a.adapter"], tmp_path / "plain", device="cpu", backend="torch")


def test_the_mask_survives_a_dicom_object_that_fails(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ValueError(PATIENT)

    monkeypatch.setattr("fseft_edge.dicom_output.segmentation_object._segmentation", failing)
    options: dict[str, Any] = {"device": "cpu", "backend": "torch", "dicom": ["seg", "rtstruct"]}
    with refused(SomeCasesFailedError, "case_7 (seg)") as caught:
        segment([site.folder], [site.root / "a.adapter"], tmp_path, **options)
    assert caught.value.exit_code == 5
    (case,) = caught.value.completed
    assert isinstance(case, SegmentedCase)
    assert case.not_written == ("seg",)
    assert {path.name for path in tmp_path.iterdir()} == {"case_7.json", "case_7.nii.gz", "case_7.rtstruct.dcm"}
    fields = json.loads((tmp_path / "case_7.json").read_text(encoding="utf-8"))
    assert fields["not_written"] == ["seg"]
    assert "ValueError" in fields["warnings"][0]
    assert "Secretname" not in caplog.text + str(caught.value) + json.dumps(fields)


def test_an_empty_mask_has_no_dicom_object_and_a_warning(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fseft_edge.segmentation.segmenter.post_process", lambda labels, _: np.zeros_like(labels))
    (tmp_path / "case_7.seg.dcm").write_bytes(b"of another mask")
    options: dict[str, Any] = {"device": "cpu", "backend": "torch", "dicom": ["seg"]}
    (case,) = segment([site.folder], [site.root / "a.adapter"], tmp_path, **options)
    assert any("empty" in warning for warning in case.warnings)
    assert case.not_written == ()
    assert not (tmp_path / "case_7.seg.dcm").exists()
    (again,) = segment([site.folder], [site.root / "a.adapter"], tmp_path, skip_existing=True, **options)
    assert again.existing


def test_dicom_output_needs_a_dicom_series(site: Site, tmp_path: Path) -> None:
    write_ct(tmp_path / "in" / "nifti.nii.gz", read_scan(site.folder))
    with refused(UsageError, tmp_path / "in" / "nifti.nii.gz", "--dicom"):
        segment([tmp_path / "in"], [site.root / "a.adapter"], tmp_path / "out", dicom=["seg"])
    assert not (tmp_path / "out").exists()
