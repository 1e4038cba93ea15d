"""A batch of DICOM series: pseudonyms in all results, errors without names, duplicates recognised."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from doubles.dicom import PATIENT, Series, zipped
from doubles.encoder import SPACING, scan, write_random_adapter, write_tiny_encoder

from fseft_edge.batch.coordinator import run_batch
from fseft_edge.batch.settings import BatchSettings, BatchSummary
from fseft_edge.outbox.records import CaseState
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.segmentation.segmenter import SegmentationSettings

SURNAME = PATIENT.partition("^")[0]


def test_a_batch_of_dicom_series_names_no_patient(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three series are complete: one of them is a copy. One has a gap, and one folder contains two patients."""
    caplog.set_level("DEBUG")
    inbox, outbox = tmp_path / "inbox", tmp_path / "outbox"
    series = Series(np.asarray(scan(1).volume.array[16:48, 8:40, 16:40], np.int16), spacing=SPACING)
    names = [f"{PATIENT}/IM{number:03d}" for number in range(series.hu.shape[2])]
    series.write(inbox / f"{PATIENT} exam", names=names)
    copied = shutil.copytree(inbox / f"{PATIENT} exam" / PATIENT, inbox / f"{PATIENT} sent again")
    (copied / "IM000").rename(copied / "renamed")
    series.write(inbox / f"{PATIENT} gap", lambda dataset, _: setattr(dataset, "PatientComments", "x"), names)
    (inbox / f"{PATIENT} gap" / names[10]).unlink()
    both = series.write(inbox / f"{PATIENT} and another", names=names)
    Series(series.hu[:, :, :9]).write(both / "b", lambda dataset, _: setattr(dataset, "PatientID", "another"))
    zipped(Series(series.hu[:, :, :16], spacing=SPACING).write(tmp_path / "z"), inbox / f"{PATIENT}.zip")
    write_random_adapter(tmp_path / "liver.adapter", write_tiny_encoder(tmp_path / "tiny.encoder"))

    segmentation = SegmentationSettings(
        (tmp_path / "liver.adapter",), preview=True, dicom=("seg", "rtstruct"), device="cpu", backend="torch"
    )
    done = run_batch(BatchSettings(inbox, outbox, segmentation, settle=0.0))
    assert done == BatchSummary(done=2, failed=2, waiting=0)
    with BatchStore(state_path(outbox)) as store:
        cases, duplicates = store.cases(), store.duplicates()
    assert len(duplicates) == 1
    assert {case.problem for case in cases if case.state == CaseState.FAILED} == {
        "MissingSliceError",
        "SeveralPatientsError",
    }
    for case in cases:
        assert SURNAME not in case.reason + case.remedy
        if case.state == CaseState.DONE:
            made = {path.name.removeprefix(case.key) for path in (outbox / case.key).iterdir()}
            assert made >= {".nii.gz", ".json", ".png", ".seg.dcm", ".rtstruct.dcm"}
    assert SURNAME not in caplog.text
    for path in outbox.rglob("*"):
        assert SURNAME not in str(path.relative_to(outbox))
        if path.is_file() and path.suffix != ".dcm" and ".fseft-edge" not in path.parts:
            assert SURNAME.encode() not in path.read_bytes()
