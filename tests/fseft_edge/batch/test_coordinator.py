"""Batch runs: every case is done exactly once, or failed or set aside with a reason.

Tests about processes use real worker processes. The other tests run the cases in the process of the test.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from doubles.encoder import write_case, write_random_adapter, write_tiny_encoder
from doubles.errors import refused
from doubles.workers import FAULTS_FILE, InProcessPool, faulty_work
from filelock import FileLock

from fseft_edge.adapters.file import read_adapter, write_adapter
from fseft_edge.batch.case_work import CaseTask
from fseft_edge.batch.coordinator import run_batch
from fseft_edge.batch.inbox import signature_of
from fseft_edge.batch.local_pool import LocalWorkerPool
from fseft_edge.batch.messages import PoolEvent, WorkerReady
from fseft_edge.batch.report import write_report
from fseft_edge.batch.settings import BatchSettings, BatchSummary, StopRequest
from fseft_edge.batch.worker import WorkerSettings
from fseft_edge.batch.worker import work as worker_main
from fseft_edge.outbox.content_key import content_key
from fseft_edge.outbox.records import CaseRecord, CaseState
from fseft_edge.outbox.store import (
    FINGERPRINT_KEY,
    SOURCE_MISSING,
    STATE_FOLDER,
    UNREADABLE_PREFIX,
    BatchStore,
    state_path,
)
from fseft_edge.runtime.errors import (
    BatchStateError,
    EnvironmentProblemError,
    InputError,
    OutOfSpaceError,
    UnreadableFileError,
    UsageError,
)
from fseft_edge.runtime.system.machine import network_file_system
from fseft_edge.runtime.system.memory import Budget
from fseft_edge.segmentation.segment import segment
from fseft_edge.segmentation.settings import SegmentationSettings

TIMEOUT = 120.0  # seconds
NAMES = ("DOE^JANE", "ROE^RICHARD", "POE^PAULA")


@dataclass(frozen=True)
class Site:
    """Scans of three patients, an encoder, two adapters, and the masks that `segment` computes from the scans."""

    root: Path

    @property
    def adapters(self) -> tuple[Path, Path]:
        return self.root / "liver.adapter", self.root / "spleen.adapter"

    def scan(self, name: str) -> Path:
        return self.root / "images" / f"{name}.nii.gz"

    def key(self, name: str) -> str:
        return content_key(self.scan(name))

    def mask(self, name: str) -> bytes:
        return (self.root / "masks" / f"{name}.nii.gz").read_bytes()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("site"))
    for seed, name in enumerate(NAMES):
        write_case(site.root, name, seed)
    bundle = write_tiny_encoder(site.root / "tiny.encoder")
    for number, path in enumerate(site.adapters):
        write_random_adapter(path, bundle, (path.stem,), seed=number)
    segment([site.root / "images"], site.adapters, site.root / "masks", device="cpu", backend="torch")
    return site


@dataclass(frozen=True)
class Batch:
    """Inbox and outbox of one test."""

    site: Site
    root: Path

    @property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @property
    def outbox(self) -> Path:
        return self.root / "outbox"

    @property
    def settings(self) -> BatchSettings:
        segmentation = SegmentationSettings(self.site.adapters, preview=True, device="cpu", backend="torch")
        return BatchSettings(self.inbox, self.outbox, segmentation, settle=0.0)

    def run_workers(self, stop: StopRequest | None = None, **changes: Any) -> BatchSummary:
        """Run the batch with worker processes; return its summary without the number of warnings about labels."""
        return run_batch(replace(self.settings, **changes), stop)

    def run(self, **changes: Any) -> BatchSummary:
        """Run the batch in the process of the test."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fseft_edge.batch.coordinator.LocalWorkerPool", InProcessPool)
            return self.run_workers(**changes)

    def add(self, *names: str) -> None:
        """Copy scans into the inbox."""
        for name in names:
            shutil.copy(self.site.scan(name), self.inbox)

    def add_broken(self) -> list[str]:
        """Write broken files into the inbox; return their keys."""
        (self.inbox / "text.nii.gz").write_bytes(b"not a scan")
        whole = self.site.scan(NAMES[0]).read_bytes()
        (self.inbox / "half.nii.gz").write_bytes(whole[: len(whole) // 2])
        (self.inbox / "empty.nii").write_bytes(b"")
        (self.inbox / "header.nii.gz").write_bytes(gzip.compress(gzip.decompress(whole)[:352]))
        return [content_key(self.inbox / name) for name in ("text.nii.gz", "half.nii.gz", "empty.nii", "header.nii.gz")]

    def set_faults(self, **faults: str) -> None:
        """Set the fault of each case, by the name of its scan."""
        (self.root / FAULTS_FILE).write_text(json.dumps({self.site.key(name): fault for name, fault in faults.items()}))

    @property
    def cases(self) -> dict[str, CaseRecord]:
        with BatchStore(state_path(self.outbox)) as store:
            return {case.key: case for case in store.cases()}

    @property
    def running(self) -> bool:
        """Whether a case is running."""
        with contextlib.suppress(UsageError):  # the state file does not exist yet
            return any(case.state == CaseState.RUNNING for case in self.cases.values())
        return False

    def check_done(self, *names: str) -> None:
        """Check that the cases are done, with the masks that `segment` computes."""
        for name in names:
            key = self.site.key(name)
            assert self.cases[key].state == CaseState.DONE
            assert (self.outbox / key / f"{key}.nii.gz").read_bytes() == self.site.mask(name)
            assert sorted(path.suffix for path in (self.outbox / key).iterdir()) == [".gz", ".json", ".json", ".png"]
            assert [organ.name for organ in self.cases[key].organs] == ["liver", "spleen"]

    def check_no_temporary_files(self) -> None:
        """Check that no temporary file remains in the outbox or in the folder for temporary files."""
        done = {key for key, case in self.cases.items() if case.state == CaseState.DONE}
        assert {path.name for path in self.outbox.iterdir() if path.is_dir()} == {STATE_FOLDER, *done}
        assert not [path for path in self.outbox.rglob("*") if "partial" in path.name]
        assert not list(Path(tempfile.gettempdir()).glob("fseft-edge-*"))


@pytest.fixture
def batch(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    (tmp_path / "inbox").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("fseft_edge.batch.local_pool.work", faulty_work)
    return Batch(site, tmp_path)


def test_two_runs_do_every_scan_once_and_name_no_patient(batch: Batch, caplog: pytest.LogCaptureFixture) -> None:
    """The first run has scans, broken files and a copy; before the second run one more scan arrives."""
    caplog.set_level("INFO")
    batch.add(*NAMES[:2])
    broken = batch.add_broken()
    shutil.copy(batch.inbox / f"{NAMES[0]}.nii.gz", batch.inbox / "again.nii.gz")
    assert batch.run_workers() == BatchSummary(done=2, failed=4, waiting=0)
    batch.check_done(*NAMES[:2])
    assert all(batch.cases[key].state == CaseState.FAILED and batch.cases[key].reason for key in broken)
    with BatchStore(state_path(batch.outbox)) as store:
        assert len(store.duplicates()) == 1
    batch.check_no_temporary_files()
    dates = {path: path.stat().st_mtime_ns for path in batch.outbox.rglob("*.nii.gz")}

    batch.add(NAMES[2])
    assert batch.run() == BatchSummary(done=1, failed=0, waiting=0)
    batch.check_done(*NAMES)
    assert all(path.stat().st_mtime_ns == date for path, date in dates.items())

    text = caplog.text + "".join(f"{case.reason}{case.remedy}{case.problem}" for case in batch.cases.values())
    report = [batch.outbox / f"report.{kind}" for kind in ("html", "csv", "json")]
    written = b"".join(path.read_bytes() for path in [*batch.outbox.rglob("*.json"), *report])
    for name in NAMES:
        assert name not in text
        assert name.encode() not in written


def test_a_case_that_crashes_its_worker_is_set_aside_and_the_others_are_done(batch: Batch) -> None:
    batch.add(*NAMES)
    batch.set_faults(**{NAMES[1]: "SIGSEGV"})
    assert batch.run_workers() == BatchSummary(done=2, failed=1, waiting=0)
    batch.check_done(NAMES[0], NAMES[2])
    crashed = batch.cases[batch.site.key(NAMES[1])]
    assert crashed.state == CaseState.SET_ASIDE
    assert crashed.attempts == 2
    assert "SIGSEGV" in crashed.reason
    assert all(case.attempts == 0 for case in batch.cases.values() if case.key != crashed.key)
    batch.check_no_temporary_files()

    batch.set_faults()
    with BatchStore(state_path(batch.outbox)) as store:
        assert store.retry([crashed.key]) == 1
    assert batch.run() == BatchSummary(done=1, failed=0, waiting=0)
    batch.check_done(*NAMES)


def test_a_case_that_exceeds_the_time_limit_is_set_aside_and_the_others_are_done(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit is an hour. The clock of the case that hangs is set forward, so the test needs no long wait."""
    events = LocalWorkerPool.events
    hanging = batch.site.key(NAMES[0])

    def events_an_hour_later(pool: LocalWorkerPool, timeout: float) -> list[PoolEvent]:
        for worker in pool._workers:
            clock = worker.cases.get(hanging)
            if clock is not None and clock.since is not None:
                clock.since -= 3601
        return events(pool, timeout)

    monkeypatch.setattr(LocalWorkerPool, "events", events_an_hour_later)
    batch.add(*NAMES[:2])
    batch.set_faults(**{NAMES[0]: "hang"})
    assert batch.run_workers(limit_minutes=60.0, attempts=1) == BatchSummary(done=1, failed=1, waiting=0)
    late = batch.cases[batch.site.key(NAMES[0])]
    assert (late.state, late.attempts) == (CaseState.SET_ASIDE, 1)
    assert late.reason
    batch.check_done(NAMES[1])


def test_a_full_disk_ends_the_run_and_no_case_fails(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    batch.add(*NAMES[:2])
    batch.set_faults(**dict.fromkeys(NAMES[:2], "full"))
    problem = OutOfSpaceError("The disk is full.", remedy="Free some space.")
    with monkeypatch.context() as patched:
        patched.setattr("fseft_edge.batch.coordinator.disk_problem", lambda folders: problem)
        with pytest.raises(OutOfSpaceError) as caught:
            batch.run()
    assert caught.value is problem
    assert {case.state for case in batch.cases.values()} == {CaseState.WAITING}
    batch.set_faults(**{NAMES[0]: "full"})  # now only this case is too large for the disk
    assert batch.run() == BatchSummary(done=1, failed=1, waiting=0)
    assert batch.cases[batch.site.key(NAMES[0])].problem == "OutOfSpaceError"
    batch.check_done(NAMES[1])


def test_two_workers_without_overlapped_stages_give_equal_masks(batch: Batch) -> None:
    batch.add(*NAMES)
    batch.run_workers(pipeline=False, workers=2)
    batch.check_done(*NAMES)


@pytest.mark.parametrize(("memory_gb", "most"), [(None, 3), (4.0, 1)])
def test_a_worker_with_a_memory_budget_has_one_case_at_a_time(
    batch: Batch, memory_gb: float | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, cases = LocalWorkerPool.submit, []

    def observed(pool: LocalWorkerPool, task: CaseTask, *, exclusive: bool) -> None:
        submit(pool, task, exclusive=exclusive)
        cases.append(max(len(worker.cases) for worker in pool._workers))

    monkeypatch.setattr(LocalWorkerPool, "submit", observed)
    batch.add(*NAMES)
    batch.run_workers(segmentation=replace(batch.settings.segmentation, memory_gb=memory_gb))
    batch.check_done(*NAMES)
    assert max(cases) == most


def test_worker_processes_share_memory_and_cores(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[WorkerSettings] = []

    def pool(settings: WorkerSettings, count: int, limit: float, log: Callable[[str], None]) -> InProcessPool:
        given.append(settings)
        return InProcessPool(settings, count, limit, log)

    monkeypatch.setattr("fseft_edge.batch.coordinator.LocalWorkerPool", pool)
    batch.add(NAMES[0])
    segmentation = replace(batch.settings.segmentation, memory_gb=8.0, vram_gb=2.0)
    batch.run_workers(workers=2, segmentation=segmentation)
    batch.check_done(NAMES[0])
    (settings,) = given
    assert settings.segmentation.budget == Budget(4_000_000_000, 1_000_000_000, processes=2)
    assert settings.pipeline
    assert not settings.overlaps
    assert replace(settings, segmentation=replace(segmentation, memory_gb=None, vram_gb=None)).overlaps
    limits: list[int] = []
    monkeypatch.setattr("fseft_edge.batch.worker.limit_threads", limits.append)
    monkeypatch.setattr("fseft_edge.batch.worker._end_with_coordinator", lambda: None)
    monkeypatch.setattr("fseft_edge.batch.worker._silence_logging", lambda: None)
    coordinator, worker = Pipe()
    coordinator.send(None)
    worker_main(worker, settings)
    assert limits == [2]
    assert isinstance(coordinator.recv(), WorkerReady)


def test_existing_results_are_kept_when_the_state_file_is_lost(batch: Batch) -> None:
    batch.add(NAMES[0])
    batch.run()
    (mask,) = batch.outbox.rglob("*.nii.gz")
    date = mask.stat().st_mtime_ns
    shutil.rmtree(batch.outbox / STATE_FOLDER)
    assert batch.run() == BatchSummary(done=0, failed=0, waiting=0)
    batch.check_done(NAMES[0])
    assert mask.stat().st_mtime_ns == date


def test_a_scan_that_changed_before_it_was_segmented_becomes_a_new_case(batch: Batch) -> None:
    batch.add(NAMES[0])
    batch.run(until=datetime.now().astimezone() - timedelta(minutes=1))
    assert batch.cases == {}  # after `until` the run does not look into the inbox
    with BatchStore(state_path(batch.outbox)) as store:
        store.add(batch.inbox / f"{NAMES[0]}.nii.gz", "another signature", "earlier-case")
    assert batch.run() == BatchSummary(done=1, failed=0, waiting=0)
    assert batch.cases["earlier-case"].state == CaseState.SUPERSEDED
    assert batch.cases["earlier-case"].superseded_by == batch.site.key(NAMES[0])
    batch.check_done(NAMES[0])


def test_a_removed_scan_is_segmented_when_it_is_back(batch: Batch) -> None:
    batch.add(NAMES[0])
    scan, away = batch.inbox / f"{NAMES[0]}.nii.gz", batch.root / "away.nii.gz"
    with BatchStore(state_path(batch.outbox), create=True) as store:
        signature = signature_of(scan)
        assert signature is not None
        store.add(scan, signature, batch.site.key(NAMES[0]))
    scan.rename(away)
    assert batch.run() == BatchSummary(done=0, failed=1, waiting=0)
    (missing,) = batch.cases.values()
    assert (missing.state, missing.problem) == (CaseState.FAILED, SOURCE_MISSING)
    away.rename(scan)
    assert batch.run() == BatchSummary(done=1, failed=0, waiting=0)
    batch.check_done(NAMES[0])


def test_an_unreadable_file_is_listed_and_segmented_once_it_can_be_read(batch: Batch) -> None:
    link = batch.inbox / "link.nii.gz"
    link.symlink_to(batch.root / "later.nii.gz")
    assert batch.run() == BatchSummary(done=0, failed=1, waiting=0)
    (unread,) = batch.cases.values()
    assert unread.key.startswith(UNREADABLE_PREFIX)
    assert "link" not in unread.reason
    shutil.copy(batch.site.scan(NAMES[0]), batch.root / "later.nii.gz")
    assert batch.run() == BatchSummary(done=1, failed=0, waiting=0)
    batch.check_done(NAMES[0])
    assert len(batch.cases) == 1


@pytest.mark.parametrize("times", [1, 2])
def test_the_first_stop_request_finishes_running_cases_and_the_second_drops_them(batch: Batch, times: int) -> None:
    batch.add(*NAMES)
    if times == 2:
        batch.set_faults(**dict.fromkeys(NAMES, "hang"))
    stop = StopRequest()

    def request_stop() -> None:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and not batch.running:
            time.sleep(0.05)
        stop.times = times

    requesting = threading.Thread(target=request_stop)
    requesting.start()
    summary = batch.run_workers(stop, watch=True)
    requesting.join()
    if times == 1:
        batch.check_done(*(name for name in NAMES if batch.cases[batch.site.key(name)].state == CaseState.DONE))
        assert summary.done >= 1
    else:
        assert summary == BatchSummary(done=0, failed=0, waiting=3)
    assert not batch.running
    batch.set_faults()
    batch.run()
    batch.check_done(*NAMES)
    batch.check_no_temporary_files()


def test_wrong_folders_adapters_and_devices_are_refused(batch: Batch) -> None:
    batch.add(NAMES[0])
    with refused(UsageError, batch.inbox / "results"):
        batch.run(outbox=batch.inbox / "results")
    with refused(UnreadableFileError, batch.root / "nowhere"):
        batch.run(inbox=batch.root / "nowhere")
    (batch.root / "file").write_text("")
    with refused(UsageError, batch.root / "file"):
        batch.run(outbox=batch.root / "file")
    with pytest.raises(InputError, match=r"missing\.adapter"):
        batch.run(segmentation=SegmentationSettings((batch.root / "missing.adapter",)))
    with refused(EnvironmentProblemError):
        batch.run_workers(segmentation=replace(batch.settings.segmentation, device="cuda:99"))


def test_unusual_file_names_neither_stop_the_batch_nor_leave_the_inbox(
    batch: Batch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Names with dots, in another encoding, a link with a name that is too long, and a named pipe."""
    caplog.set_level("DEBUG")
    shutil.copy(batch.site.scan(NAMES[0]), batch.inbox / "JANE.LEE.nii.gz")
    shutil.copy(batch.site.scan(NAMES[1]), os.fsencode(batch.inbox / "ROE") + b"\xfc\n.nii.gz")
    shutil.copy(batch.site.scan(NAMES[2]), batch.inbox / "SUE.POE.nii")  # compressed content
    (batch.inbox / "LEE.nii.gz").symlink_to("x" * 300)
    os.mkfifo(batch.inbox / "POE.nii.gz")
    summary = batch.run_workers(show_ids=True)
    assert summary.done >= 2
    assert summary.waiting == 0
    batch.check_done(*NAMES[:2])
    unread = [case for case in batch.cases.values() if case.key.startswith(UNREADABLE_PREFIX)]
    assert len(unread) == 2
    assert "\N{REPLACEMENT CHARACTER}" in (batch.outbox / "report.html").read_text(encoding="utf-8")
    batch.run_workers()  # without names
    text = caplog.text + "".join(capfd.readouterr())
    text += "".join(f"{case.reason}{case.remedy}" for case in batch.cases.values())
    text += "".join(str(path.relative_to(batch.outbox)) for path in batch.outbox.rglob("*"))
    for name in ("LEE", "ROE", "POE", ".lee", ".poe"):
        assert name not in text


def test_another_scan_with_the_same_path_size_and_date_is_a_new_case(batch: Batch) -> None:
    scan = batch.inbox / "scan.nii"
    for number, name in enumerate(NAMES[:2], start=1):
        arriving = batch.root / "arriving"
        arriving.write_bytes(gzip.decompress(batch.site.scan(name).read_bytes()))
        os.utime(arriving, (0, 0))
        arriving.rename(scan)
        assert batch.run() == BatchSummary(done=1, failed=0, waiting=0)
        assert len(batch.cases) == number
    masks = {path.read_bytes() for path in batch.outbox.rglob("case-*.nii.gz")}
    assert masks == {batch.site.mask(name) for name in NAMES[:2]}
    first, second = batch.cases.values()
    assert {first.state, second.state} == {CaseState.DONE}
    assert second.key in first.warnings[-1]  # it is not known whether both files show the same scan


def test_no_case_fails_when_temporary_files_cannot_be_created(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    batch.add(NAMES[0])
    batch.set_faults(**{NAMES[0]: "no temporary files"})
    problem = OutOfSpaceError("The disk is full.", remedy="Free some space.")
    with monkeypatch.context() as patched:
        patched.setattr("fseft_edge.batch.coordinator.disk_problem", lambda folders: problem)
        with pytest.raises(OutOfSpaceError):
            batch.run()
    (case,) = batch.cases.values()
    assert case.state == CaseState.WAITING
    batch.set_faults()
    batch.run()
    batch.check_done(NAMES[0])


def test_no_case_fails_when_the_folder_for_temporary_files_is_deleted(batch: Batch) -> None:
    batch.add(*NAMES[:2])
    batch.set_faults(**{NAMES[0]: "cleaned once"})
    assert batch.run() == BatchSummary(done=2, failed=0, waiting=0)
    batch.check_done(*NAMES[:2])


def test_a_change_of_permissions_during_segmentation_keeps_the_mask(batch: Batch) -> None:
    batch.add(NAMES[0])
    batch.set_faults(**{NAMES[0]: "chmod"})
    assert batch.run() == BatchSummary(done=1, failed=0, waiting=0)
    batch.check_done(NAMES[0])


def test_the_last_report_contains_all_cases_although_reports_take_long(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def slow_report(*arguments: Any, **more: Any) -> Path:
        time.sleep(0.3)
        written.append(len(batch.cases))
        return write_report(*arguments, **more)

    monkeypatch.setattr("fseft_edge.batch.coordinator.write_report", slow_report)
    batch.add(*NAMES)
    batch.run()
    report = json.loads((batch.outbox / "report.json").read_text(encoding="utf-8"))
    assert [case["state"] for case in report["cases"]] == ["done"] * 3
    assert len(written) == 2  # after the first case and at the end


def test_a_bug_in_the_report_does_not_stop_the_batch(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Path:
        raise KeyError(NAMES[0])

    monkeypatch.setattr("fseft_edge.batch.coordinator.write_report", broken)
    batch.add(*NAMES[:2])
    assert batch.run() == BatchSummary(done=2, failed=0, waiting=0)
    batch.check_done(*NAMES[:2])
    assert "The report was not written: An unexpected KeyError in test_coordinator.py" in caplog.text
    assert NAMES[0] not in caplog.text


def test_reasons_name_the_key_and_no_file_that_the_inbox_does_not_have(batch: Batch) -> None:
    broken = batch.add_broken()
    batch.run()
    for key in broken:
        assert f"{key} " in batch.cases[key].reason
        assert f"{key}." not in batch.cases[key].reason


def test_a_state_file_belongs_to_one_outbox(batch: Batch) -> None:
    state = batch.root / "state.sqlite"
    batch.run(state=state)
    with refused(BatchStateError, state):
        batch.run(state=state, outbox=batch.root / "another")
    batch.outbox.rename(batch.root / "renamed")
    batch.run(state=state, outbox=batch.root / "renamed")
    with FileLock(batch.root / "state.sqlite.lock"), refused(UsageError, batch.root / "renamed"):
        batch.run(state=state, outbox=batch.root / "renamed")


def test_only_one_run_at_a_time_can_use_an_outbox(batch: Batch) -> None:
    (batch.outbox / STATE_FOLDER).mkdir(parents=True)
    with FileLock(batch.outbox / STATE_FOLDER / "lock"), refused(UsageError, batch.outbox):
        batch.run()


def test_a_mask_that_was_changed_is_neither_used_nor_overwritten_when_the_state_file_is_lost(batch: Batch) -> None:
    batch.add(*NAMES[:2])
    batch.run()
    keys = [batch.site.key(name) for name in NAMES[:2]]
    mask = batch.outbox / keys[0] / f"{keys[0]}.nii.gz"
    mask.write_bytes(batch.site.mask(NAMES[2]))  # somebody corrected it in the outbox
    shutil.rmtree(batch.outbox / STATE_FOLDER)
    batch.run()
    with BatchStore(state_path(batch.outbox)) as store:
        changed, kept = (store.case(key) for key in keys)
    assert (changed.state, changed.problem) == (CaseState.FAILED, "LabelError")
    assert "changed" in changed.reason
    assert mask.read_bytes() == batch.site.mask(NAMES[2])
    assert kept.state == CaseState.DONE


def test_a_version_that_gave_other_label_values_needs_another_outbox(batch: Batch, tmp_path: Path) -> None:
    """Earlier versions numbered the organs from 1, and wrote no label values into their fingerprint."""
    file = read_adapter(batch.site.adapters[0])
    (organ,) = file.description.organs
    description = file.description.model_copy(update={"organs": (organ.model_copy(update={"label": 6}),)})
    write_adapter(tmp_path / "six.adapter", replace(file, description=description))
    segmentation = replace(
        batch.settings.segmentation,
        adapters=(tmp_path / "six.adapter",),
        encoder=batch.site.root / "tiny.encoder",
    )
    batch.run(segmentation=segmentation)
    with BatchStore(state_path(batch.outbox)) as store:
        fingerprint = json.loads(store.metadata(FINGERPRINT_KEY) or "")
        assert fingerprint.pop("labels") == [6]
        store.set_metadata(FINGERPRINT_KEY, json.dumps(fingerprint, sort_keys=True))
    with refused(BatchStateError, batch.outbox, "label values"):
        batch.run(segmentation=segmentation)


def test_other_adapters_need_another_outbox(batch: Batch) -> None:
    batch.run()
    with refused(BatchStateError, batch.outbox, "What differs: adapters"):
        batch.run(segmentation=replace(batch.settings.segmentation, adapters=batch.site.adapters[:1]))


def test_a_state_file_on_a_network_drive_is_refused(
    tmp_path: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/share {tmp_path}/a\\040share nfs4 rw 0 0\n")
    assert network_file_system(tmp_path / "a share" / "x" / "y", mounts) == "nfs4"
    assert network_file_system(tmp_path / "a shared" / "x", mounts) is None
    assert network_file_system(tmp_path, tmp_path / "no mounts") is None
    monkeypatch.setattr("fseft_edge.outbox.folders.network_file_system", lambda _: "cifs")
    with refused(UsageError, state_path(batch.outbox), "cifs"):
        batch.run()


def test_a_batch_that_is_killed_several_times_does_every_case_once(batch: Batch) -> None:
    """The whole process tree is killed at different moments, then the command runs to its end."""
    batch.add(*NAMES)
    broken = batch.add_broken()
    adapters = [option for path in batch.site.adapters for option in ("--adapter", str(path))]
    command = [sys.executable, "-c", "from fseft_edge.cli.main import main; main()", "batch", "run", str(batch.inbox)]
    command += [str(batch.outbox), *adapters, "--settle", "0", "--device", "cpu", "--backend", "torch"]
    environment = {**os.environ, "TMPDIR": str(batch.root / "tmp"), "OMP_NUM_THREADS": "1"}
    for delay in (0.0, 0.25, 0.5):  # the three good cases take about a second
        process = subprocess.Popen(  # noqa: S603 - a fixed command
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not batch.running:
            time.sleep(0.02)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT)  # noqa: S603 - a fixed command
    assert done.returncode in (0, 5), done.stderr
    batch.check_done(*NAMES)
    assert {key for key, case in batch.cases.items() if case.state == CaseState.FAILED} == set(broken)
    batch.check_no_temporary_files()
    for name in NAMES:
        assert name not in done.stdout + done.stderr
