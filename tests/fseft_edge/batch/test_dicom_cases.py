"""A batch of DICOM series: pseudonyms in all results, errors without names, duplicates recognised."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from doubles.dicom import PATIENT, Series, zipped
from doubles.encoder import SPACING, scan, write_random_adapter, write_tiny_encoder
from doubles.workers import InProcessPool

from fseft_edge.batch.coordinator import run_batch
from fseft_edge.batch.inbox import Inbox
from fseft_edge.batch.settings import BatchSettings, BatchSummary
from fseft_edge.outbox.records import CaseRecord, CaseState
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.segmentation.settings import SegmentationSettings

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


@dataclass(frozen=True)
class Ward:
    """A series that arrives in an inbox, with a batch that segments it."""

    root: Path
    whole: Path

    @property
    def folder(self) -> Path:
        return self.root / "inbox" / f"{PATIENT} exam"

    def arrive(self, first: int, last: int, folder: Path | None = None) -> None:
        """Put slices into the folder of the series, or into another one."""
        folder = folder or self.folder
        folder.mkdir(parents=True, exist_ok=True)
        for place in range(first, last):
            shutil.copy(self.whole / f"IM{place:03d}", folder)

    def run(self, settle: float = 0.0) -> BatchSummary:
        segmentation = SegmentationSettings((self.root / "liver.adapter",), preview=True, device="cpu", backend="torch")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fseft_edge.batch.coordinator.LocalWorkerPool", InProcessPool)
            return run_batch(BatchSettings(self.root / "inbox", self.root / "outbox", segmentation, settle=settle))

    @property
    def cases(self) -> list[CaseRecord]:
        with BatchStore(state_path(self.root / "outbox")) as store:
            return store.cases()

    def slices(self, case: CaseRecord) -> int:
        """Number of slices in the mask of a case, as SimpleITK reads it."""
        image = SimpleITK.ReadImage(str(self.root / "outbox" / case.key / f"{case.key}.nii.gz"))
        return int(image.GetSize()[2])


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    series = Series(np.asarray(scan(1).volume.array[16:48, 8:40, 16:36], np.int16), spacing=SPACING)
    series.write(tmp_path / "whole")
    write_random_adapter(tmp_path / "liver.adapter", write_tiny_encoder(tmp_path / "tiny.encoder"))
    return Ward(tmp_path, tmp_path / "whole")


def test_the_second_half_of_a_series_supersedes_the_mask_of_the_first(
    ward: Ward, caplog: pytest.LogCaptureFixture
) -> None:
    ward.arrive(0, 10)
    assert ward.run() == BatchSummary(done=1, failed=0, waiting=0)
    ward.arrive(10, 20)
    assert ward.run() == BatchSummary(done=1, failed=0, waiting=0)
    first, second = ward.cases
    assert (first.state, first.superseded_by) == (CaseState.SUPERSEDED, second.key)
    assert (second.state, second.superseded_by) == (CaseState.DONE, "")
    assert (ward.slices(first), ward.slices(second)) == (10, 20)
    assert f"{first.key} is superseded by {second.key}" in caplog.text
    report = json.loads((ward.root / "outbox" / "report.json").read_text(encoding="utf-8"))
    assert {case["case"]: case["superseded_by"] for case in report["cases"]} == {
        first.key: second.key,
        second.key: None,
    }
    assert (report["summary"]["superseded"], report["summary"]["done"]) == (1, 1)
    page = (ward.root / "outbox" / "report.html").read_text(encoding="utf-8")
    assert f'superseded by <a href="#{second.key}">{second.key}</a>' in page
    assert SURNAME not in caplog.text + page
    for place in range(10, 20):  # the first half is the content of the folder again: its result is still there
        (ward.folder / f"IM{place:03d}").unlink()
    assert ward.run() == BatchSummary(done=0, failed=0, waiting=0)
    assert [case.state for case in ward.cases] == [CaseState.DONE, CaseState.DONE]
    assert first.key in " ".join(ward.cases[1].warnings)


def test_a_series_in_two_folders_has_a_warning_in_both_cases(ward: Ward) -> None:
    ward.arrive(0, 10)
    ward.arrive(10, 20, ward.root / "inbox" / f"{PATIENT} rest")
    assert ward.run() == BatchSummary(done=2, failed=0, waiting=0, warned=2)
    assert all("same DICOM series" in case.warnings[-1] for case in ward.cases)
    ward.arrive(0, 20, ward.root / "inbox" / f"{PATIENT} sent again")
    assert ward.run() == BatchSummary(done=1, failed=0, waiting=0)
    assert [case.state for case in ward.cases] == [CaseState.SUPERSEDED, CaseState.SUPERSEDED, CaseState.DONE]


def test_a_pause_shorter_than_the_settle_time_gives_one_case_and_the_log_says_why_nothing_happens(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The clock advances by 10 s with each look into the inbox; the second half arrives after 50 s."""
    caplog.set_level("INFO")
    times = count(0, 5)

    def clock() -> float:
        now = float(next(times))
        if now == 50:
            ward.arrive(10, 20)
        return now

    monkeypatch.setattr("fseft_edge.batch.coordinator.Inbox", partial(Inbox, clock=clock))
    monkeypatch.setattr("fseft_edge.batch.coordinator._POLL_SECONDS", 0.0)
    monkeypatch.setattr("fseft_edge.batch.coordinator._INBOX_SECONDS", 0.0)
    ward.arrive(0, 10)
    default = BatchSettings(Path(), Path(), SegmentationSettings(())).settle
    assert default == 60
    assert ward.run(default) == BatchSummary(done=1, failed=0, waiting=0)
    (case,) = ward.cases
    assert ward.slices(case) == 20
    waits = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Waiting:")]
    assert len(waits) == 1
    assert waits[0].startswith("Waiting: 1 scan in the inbox may still be arriving.")
    assert "60 seconds (--settle)" in waits[0]


def test_a_dicom_object_that_fails_costs_no_mask_and_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ValueError(PATIENT)

    inbox, outbox = tmp_path / "inbox", tmp_path / "outbox"
    series = Series(np.asarray(scan(1).volume.array[16:48, 8:40, 16:32], np.int16), spacing=SPACING)
    series.write(inbox / "exam")
    write_random_adapter(tmp_path / "liver.adapter", write_tiny_encoder(tmp_path / "tiny.encoder"))
    monkeypatch.setattr("fseft_edge.dicom_output.segmentation_object._segmentation", failing)
    monkeypatch.setattr("fseft_edge.batch.coordinator.LocalWorkerPool", InProcessPool)
    segmentation = SegmentationSettings((tmp_path / "liver.adapter",), dicom=("seg",), device="cpu", backend="torch")
    done = run_batch(BatchSettings(inbox, outbox, segmentation, settle=0.0))
    assert (done.done, done.failed, done.waiting) == (1, 0, 0)
    with BatchStore(state_path(outbox)) as store:
        (case,) = store.cases()
    assert {path.name.removeprefix(case.key) for path in (outbox / case.key).iterdir()} == {
        ".nii.gz",
        ".json",
        "batch.json",
    }
    (warning,) = case.warnings
    assert "ValueError" in warning
    report = (outbox / "report.html").read_text(encoding="utf-8")
    assert "The DICOM object seg was not written" in report
    assert SURNAME not in report + warning
