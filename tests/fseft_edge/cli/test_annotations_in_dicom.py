"""A site whose annotations are structure sets: `contours`, `adapt`, `segment` and `evaluate` on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from doubles.command_line import Run, Site, assert_error_with_remedy, command_line_site, runner
from doubles.dicom import Series, save
from doubles.encoder import SPACING, label_of, scan
from doubles.structure_sets import Roi, structure_set

from fseft_edge.adaptation.support_set import find_annotated, patients_of
from fseft_edge.adapters.file import read_adapter
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.dicom_output.contours import closed_contours
from fseft_edge.runtime.scans.nifti import write_ct, write_label_map
from fseft_edge.runtime.scans.organs import parse_organs
from fseft_edge.runtime.scans.sources import read_scan
from fseft_edge.runtime.scans.volume import LabelMap

ROIS = {"liver": "Liver", "spleen": "SPLEEN"}
BOX = (slice(12, 52), slice(8, 40), slice(16, 40))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Two phantoms as DICOM series with structure sets, and the same scans and annotations as NIfTI files."""
    site = command_line_site(tmp_path_factory.mktemp("site"))
    for seed in (1, 2):
        folder = site / "patients" / f"p{seed}"
        patient = scan(seed)
        series = Series(np.asarray(patient.volume.array[BOX], np.int16), spacing=SPACING)
        series.write(folder)
        volume = read_scan(folder)
        labels = LabelMap(patient.labels.array[BOX], volume.affine)
        save(structure_set(rois(series, labels.array), series.datasets()), folder / "RS.dcm")
        write_ct(site / "nifti" / "images" / f"p{seed}.nii.gz", volume)
        write_label_map(site / "nifti" / "labels" / f"p{seed}.nii.gz", labels)
    return site


def rois(series: Series, labels: np.ndarray) -> list[Roi]:
    """Return outlines of the organs along the edges of their pixels, in LPS+ mm."""
    found = []
    for number, (organ, name) in enumerate(ROIS.items(), start=5):
        outlines = []
        for place in range(labels.shape[2]):
            for outline in closed_contours((labels[:, :, place] == label_of(organ)).T):
                points = np.zeros((len(outline), 3))
                points[:, :2] = outline * series.spacing[:2]
                outlines.append(points + series.position(place))
        found.append(Roi(name, outlines, number=number))
    return found


def adapt(site: Site, where: Path, labels: Path, organs: list[str], output: Path) -> list[object]:
    moved = ("--images", where, "--labels", labels, "--no-validate", *(f"--organ={organ}" for organ in organs))
    return site.adapt(*moved, output=output)


def test_structure_sets_are_listed(site: Site, run: Run) -> None:
    outcome = run("contours", site / "patients" / "p1", "--json")
    assert outcome.code == 0
    listed = json.loads(outcome.out)
    assert [(row["number"], row["name"]) for row in listed] == [(5, "Liver"), (6, "SPLEEN")]
    labels = sitk.GetArrayFromImage(sitk.ReadImage(site / "nifti" / "labels" / "p1.nii.gz"))
    for row, organ in zip(listed, ROIS, strict=True):
        voxels = np.count_nonzero(labels == label_of(organ))
        assert row["volume_ml"] == pytest.approx(voxels * np.prod(SPACING) / 1000, rel=1e-4)
        assert row["planes"] == np.count_nonzero((labels == label_of(organ)).any(axis=(1, 2)))
        assert row["contours"] >= row["planes"]
        assert row["warnings"] == []
    table = run("contours", site / "patients").out
    assert "1. " in table
    assert "2. " in table
    assert "SPLEEN" in table


def test_patient_names_in_rois_are_printed_only_on_request(site: Site, tmp_path: Path, run: Run) -> None:
    save(structure_set([Roi("Liver Secretname")]), tmp_path / "RS.dcm")
    assert "Secretname" not in run("contours", tmp_path).out
    shown = run("contours", tmp_path, "--show-names", "--json").out
    assert json.loads(shown)[0]["name"] == "Liver Secretname"


def test_an_adapter_from_structure_sets_is_the_adapter_from_label_maps(site: Site, tmp_path: Path, run: Run) -> None:
    by_value = [f"{organ}={label_of(organ)}" for organ in ROIS]
    nifti, dicom = tmp_path / "nifti.adapter", tmp_path / "dicom.adapter"
    assert run(*adapt(site, site / "nifti/images", site / "nifti/labels", by_value, nifti)).code == 0
    assert run(*adapt(site, site / "patients", site / "patients", ["liver", "spleen=SPLEEN|Milz"], dicom)).code == 0
    first, second = read_adapter(nifti), read_adapter(dicom)
    assert first.description.support_annotations == second.description.support_annotations
    for organ, other in zip(first.description.organs, second.description.organs, strict=True):
        assert other.support_volumes_ml == organ.support_volumes_ml
    assert [organ.annotation_names for organ in second.description.organs] == [("liver",), ("SPLEEN", "Milz")]
    for name, tensor in first.adapter.state_dict().items():
        np.testing.assert_allclose(second.adapter.state_dict()[name].numpy(), tensor.numpy(), rtol=1e-3, atol=1e-4)
    masks = tmp_path / "masks"
    assert run(*site.segment(site / "patients/p1", output=masks), "--adapter", dicom).code in (0, 2)


def test_lists_of_scans_and_structure_sets_in_python(site: Site) -> None:
    patients = [site / "patients" / name for name in ("p1", "p2")]
    organs = parse_organs(["liver"])
    annotated = find_annotated(patients, [patient / "RS.dcm" for patient in patients], organs, AdapterSettings())
    for seed, (_, annotation) in enumerate(annotated, start=1):
        mask, expected = annotation.mask(1), scan(seed).labels.array[BOX] == label_of("liver")
        np.testing.assert_array_equal(mask, expected)


def test_series_of_one_patient_are_left_out_together(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    organs, where = parse_organs(["liver"]), site / "patients"
    annotated = find_annotated(where, where, organs, AdapterSettings())
    assert patients_of(annotated, None, images=where) == {"p1": "p1", "p2": "p1"}
    assert "p1, p2" in caplog.text
    assert "4711" not in caplog.text
    shutil.copytree(where, tmp_path / "patients")
    for path in (tmp_path / "patients" / "p2").glob("IM*"):
        image = pydicom.dcmread(path)
        image.PatientID = "another"
        image.save_as(path)
    annotated = find_annotated(tmp_path / "patients", tmp_path / "patients", organs, AdapterSettings())
    assert patients_of(annotated, None, images=tmp_path / "patients") is None


def test_masks_are_compared_with_structure_sets(site: Site, tmp_path: Path, run: Run) -> None:
    shutil.copytree(site / "nifti" / "labels", tmp_path / "masks")
    values = [f"--prediction-organ={organ}={label_of(organ)}" for organ in ROIS]
    where = ("--predictions", tmp_path / "masks", "--references", site / "patients")
    outcome = run("evaluate", *where, "--organ=liver,spleen", *values, "--json", tmp_path / "scores.json")
    assert outcome.code == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["cases"]
    assert [(row["case"], row["organ"]) for row in scores] == [(case, organ) for case in ("p1", "p2") for organ in ROIS]
    assert [row["dsc"] for row in scores] == [1.0] * 4
    swapped = ("--predictions", site / "patients", "--references", tmp_path / "masks")
    organs = [f"--organ={organ}={label_of(organ)}" for organ in ROIS]
    assert run("evaluate", *swapped, *organs, "--json", tmp_path / "swapped.json").code == 0
    swapped_scores = json.loads((tmp_path / "swapped.json").read_text())["cases"]
    assert [row["dsc"] for row in swapped_scores] == [1.0] * 4
    unknown = run("evaluate", *where, "--organ=liver")
    assert unknown.code == 5
    assert "--prediction-organ" in unknown.err


def test_an_absent_organ_is_refused_with_the_names_in_the_structure_sets(site: Site, tmp_path: Path, run: Run) -> None:
    outcome = run(*adapt(site, site / "patients", site / "patients", ["bladder"], tmp_path / "a.adapter"))
    assert_error_with_remedy(outcome)
    assert outcome.code == 3
    assert "Liver (in 2 files), SPLEEN (in 2 files)" in outcome.err
    assert not (tmp_path / "a.adapter").exists()
    outcome = run(*adapt(site, site / "patients", site / "patients", ["liver=1"], tmp_path / "a.adapter"))
    assert_error_with_remedy(outcome)
    assert "label value" in outcome.err


def test_what_is_no_annotation_has_a_clear_error(site: Site, tmp_path: Path, run: Run) -> None:
    for path in (tmp_path / "absent", site / "nifti" / "images", site / "patients" / "p1" / "IM000"):
        outcome = run("contours", path)
        assert outcome.code == 3
        assert_error_with_remedy(outcome)
