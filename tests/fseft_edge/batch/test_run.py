"""The batch with real worker processes: every case done once or set aside with a reason, whatever happens."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from doubles.encoder import write_case, write_random_adapter, write_tiny_encoder
from doubles.workers import MISCHIEF, mischievous_work
from filelock import FileLock

from fseft_edge.batch.coordinator import run_batch
from fseft_edge.batch.inbox import signature_of
from fseft_edge.batch.report import write_report
from fseft_edge.batch.settings import BatchSettings, BatchSummary, StopRequest
from fseft_edge.outbox.content_key import content_key
from fseft_edge.outbox.records import CaseRecord, CaseState
from fseft_edge.outbox.store import STATE_FOLDER, UNREADABLE, BatchStore, state_path
from fseft_edge.runtime.errors import (
    BatchStateError,
    EnvironmentProblemError,
    InputError,
    OutOfSpaceError,
    UnreadableFileError,
    UsageError,
)
from fseft_edge.runtime.system.machine import network_file_system
from fseft_edge.segmentation.segment import segment
from fseft_edge.segmentation.segmenter import SegmentationSettings

PATIENCE = 120.0
NAMES = ("DOE^JANE", "ROE^RICHARD", "POE^PAULA")


@dataclass(frozen=True)
class Site:
    """Scans of three patients, an encoder, two adapters, and the masks that `segment` makes of them."""

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
class Night:
    """An inbox and an outbox of a test of its own."""

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

    def run(self, stop: StopRequest | None = None, **changes: Any) -> BatchSummary:
        return run_batch(replace(self.settings, **changes), stop)

    def arrive(self, *names: str) -> None:
        for name in names:
            shutil.copy(self.site.scan(name), self.inbox)

    def break_in(self) -> list[str]:
        """Let broken files arrive; return their keys."""
        (self.inbox / "text.nii.gz").write_bytes(b"not a scan")
        whole = self.site.scan(NAMES[0]).read_bytes()
        (self.inbox / "half.nii.gz").write_bytes(whole[: len(whole) // 2])
        (self.inbox / "empty.nii").write_bytes(b"")
        (self.inbox / "header.nii.gz").write_bytes(gzip.compress(gzip.decompress(whole)[:352]))
        return [content_key(self.inbox / name) for name in ("text.nii.gz", "half.nii.gz", "empty.nii", "header.nii.gz")]

    def does(self, **mischief: str) -> None:
        """Let cases crash, by the names of their scans."""
        (self.root / MISCHIEF).write_text(json.dumps({self.site.key(name): what for name, what in mischief.items()}))

    @property
    def cases(self) -> dict[str, CaseRecord]:
        with BatchStore(state_path(self.outbox)) as store:
            return {case.key: case for case in store.cases()}

    @property
    def running(self) -> bool:
        """Whether a case is in hand."""
        with contextlib.suppress(UsageError):  # not there yet
            return any(case.state == CaseState.RUNNING for case in self.cases.values())
        return False

    def check_good(self, *names: str) -> None:
        """The cases are done, with the very masks that `segment` makes."""
        for name in names:
            key = self.site.key(name)
            assert self.cases[key].state == CaseState.DONE
            assert (self.outbox / key / f"{key}.nii.gz").read_bytes() == self.site.mask(name)
            assert sorted(path.suffix for path in (self.outbox / key).iterdir()) == [".gz", ".json", ".json", ".png"]
            assert [organ.name for organ in self.cases[key].organs] == ["liver", "spleen"]

    def check_tidy(self) -> None:
        """Nothing temporary is left, in the outbox or where temporary files lie."""
        done = {key for key, case in self.cases.items() if case.state == CaseState.DONE}
        assert {path.name for path in self.outbox.iterdir() if path.is_dir()} == {STATE_FOLDER, *done}
        assert not [path for path in self.outbox.rglob("*") if "partial" in path.name]
        assert not list(Path(tempfile.gettempdir()).glob("fseft-edge-*"))


@pytest.fixture
def night(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Night:
    (tmp_path / "inbox").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("fseft_edge.batch.local_pool.work", mischievous_work)
    return Night(site, tmp_path)


def test_a_night_in_small(night: Night, caplog: pytest.LogCaptureFixture) -> None:
    """Good and broken scans, a copy, then a second run with one more: each done once, and nobody named."""
    caplog.set_level("INFO")
    night.arrive(*NAMES[:2])
    broken = night.break_in()
    shutil.copy(night.inbox / f"{NAMES[0]}.nii.gz", night.inbox / "again.nii.gz")
    assert night.run() == BatchSummary(done=2, failed=4, waiting=0)
    night.check_good(*NAMES[:2])
    assert all(night.cases[key].state == CaseState.FAILED and night.cases[key].reason for key in broken)
    with BatchStore(state_path(night.outbox)) as store:
        assert len(store.duplicates()) == 1
    night.check_tidy()
    made = {path: path.stat().st_mtime_ns for path in night.outbox.rglob("*.nii.gz")}

    night.arrive(NAMES[2])
    assert night.run() == BatchSummary(done=1, failed=0, waiting=0)
    night.check_good(*NAMES)
    assert all(path.stat().st_mtime_ns == date for path, date in made.items())

    said = caplog.text + "".join(f"{case.reason}{case.remedy}{case.problem}" for case in night.cases.values())
    report = [night.outbox / f"report.{kind}" for kind in ("html", "csv", "json")]
    written = b"".join(path.read_bytes() for path in [*night.outbox.rglob("*.json"), *report])
    for name in NAMES:
        assert name not in said
        assert name.encode() not in written


def test_a_case_that_crashes_its_worker_is_set_aside_and_no_other_suffers(night: Night) -> None:
    night.arrive(*NAMES)
    night.does(**{NAMES[1]: "SIGSEGV"})
    assert night.run() == BatchSummary(done=2, failed=1, waiting=0)
    night.check_good(NAMES[0], NAMES[2])
    crashed = night.cases[night.site.key(NAMES[1])]
    assert crashed.state == CaseState.SET_ASIDE
    assert crashed.attempts == 2
    assert "SIGSEGV" in crashed.reason
    assert all(case.attempts == 0 for case in night.cases.values() if case is not crashed and case.key != crashed.key)
    night.check_tidy()

    night.does()
    with BatchStore(state_path(night.outbox)) as store:
        assert store.retry([crashed.key]) == 1
    assert night.run() == BatchSummary(done=1, failed=0, waiting=0)
    night.check_good(*NAMES)


def test_a_case_that_takes_too_long_is_set_aside_and_the_others_are_done(night: Night) -> None:
    night.arrive(*NAMES[:2])
    night.does(**{NAMES[0]: "hang"})
    assert night.run(limit_minutes=20 / 60, attempts=1) == BatchSummary(done=1, failed=1, waiting=0)
    late = night.cases[night.site.key(NAMES[0])]
    assert late.state == CaseState.SET_ASIDE
    assert "longer than" in late.reason
    night.check_good(NAMES[1])


def test_a_full_disk_ends_the_run_and_costs_no_case(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    night.arrive(*NAMES[:2])
    night.does(**dict.fromkeys(NAMES[:2], "full"))
    trouble = OutOfSpaceError("The disk is full.", remedy="Free some space.")
    with monkeypatch.context() as patched:
        patched.setattr("fseft_edge.batch.coordinator.no_room", lambda folders: trouble)
        with pytest.raises(OutOfSpaceError, match="disk is full"):
            night.run()
    assert {case.state for case in night.cases.values()} == {CaseState.WAITING}
    night.does(**{NAMES[0]: "full"})  # now it is this case alone that does not fit
    assert night.run() == BatchSummary(done=1, failed=1, waiting=0)
    assert night.cases[night.site.key(NAMES[0])].problem == "OutOfSpaceError"
    night.check_good(NAMES[1])


def test_one_by_one_and_by_two_workers_the_masks_are_the_same(night: Night) -> None:
    night.arrive(*NAMES)
    night.run(pipeline=False, workers=2)
    night.check_good(*NAMES)


def test_a_result_that_is_there_is_not_made_again_when_the_state_is_lost(night: Night) -> None:
    night.arrive(NAMES[0])
    night.run()
    (mask,) = night.outbox.rglob("*.nii.gz")
    date = mask.stat().st_mtime_ns
    shutil.rmtree(night.outbox / STATE_FOLDER)
    assert night.run() == BatchSummary(done=0, failed=0, waiting=0)
    night.check_good(NAMES[0])
    assert mask.stat().st_mtime_ns == date


def test_a_file_that_changes_before_its_turn_is_not_taken_for_what_it_was(night: Night) -> None:
    night.arrive(NAMES[0])
    stop = StopRequest(times=0)
    night.run(until=datetime.now().astimezone() - timedelta(minutes=1), settle=0.0, stop=stop)
    assert night.cases == {}  # too late for tonight: not even looked at
    with BatchStore(state_path(night.outbox)) as store:
        store.add(night.inbox / f"{NAMES[0]}.nii.gz", "another signature", "case-of-before")
    night.run()
    assert night.cases["case-of-before"].state == CaseState.FAILED
    assert "changed or taken away" in night.cases["case-of-before"].reason
    night.check_good(NAMES[0])


def test_a_case_that_went_away_is_done_when_it_is_back(night: Night) -> None:
    night.arrive(NAMES[0])
    scan, away = night.inbox / f"{NAMES[0]}.nii.gz", night.root / "away.nii.gz"
    with BatchStore(state_path(night.outbox), create=True) as store:
        signature = signature_of(scan)
        assert signature is not None
        store.add(scan, signature, night.site.key(NAMES[0]))
    scan.rename(away)
    assert night.run() == BatchSummary(done=0, failed=1, waiting=0)
    away.rename(scan)
    assert night.run() == BatchSummary(done=1, failed=0, waiting=0)
    night.check_good(NAMES[0])


def test_what_cannot_be_read_is_listed_and_done_once_it_can_be(night: Night) -> None:
    link = night.inbox / "link.nii.gz"
    link.symlink_to(night.root / "later.nii.gz")
    assert night.run() == BatchSummary(done=0, failed=1, waiting=0)
    (unread,) = night.cases.values()
    assert unread.key.startswith(UNREADABLE)
    assert "link" not in unread.reason
    shutil.copy(night.site.scan(NAMES[0]), night.root / "later.nii.gz")
    assert night.run() == BatchSummary(done=1, failed=0, waiting=0)
    night.check_good(NAMES[0])
    assert len(night.cases) == 1


@pytest.mark.parametrize("times", [1, 2])
def test_the_first_request_finishes_what_is_in_hand_and_the_second_drops_it(night: Night, times: int) -> None:
    night.arrive(*NAMES)
    if times == 2:
        night.does(**dict.fromkeys(NAMES, "hang"))
    stop = StopRequest()

    def ask() -> None:
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            if night.running:
                break
            time.sleep(0.05)
        stop.times = times

    asking = threading.Thread(target=ask)
    asking.start()
    summary = night.run(stop, watch=True)
    asking.join()
    if times == 1:
        night.check_good(*(name for name in NAMES if night.cases[night.site.key(name)].state == CaseState.DONE))
        assert summary.done >= 1
    else:
        assert summary == BatchSummary(done=0, failed=0, waiting=3)
    assert not any(case.state == CaseState.RUNNING for case in night.cases.values())
    night.does()
    night.run()
    night.check_good(*NAMES)
    night.check_tidy()


def test_what_cannot_be_run_is_refused_before_anything_is_written(night: Night) -> None:
    night.arrive(NAMES[0])
    with pytest.raises(UsageError, match="within one another"):
        night.run(outbox=night.inbox / "results")
    with pytest.raises(UnreadableFileError, match="is no folder"):
        night.run(inbox=night.root / "nowhere")
    (night.root / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        night.run(outbox=night.root / "file")
    with pytest.raises(InputError):
        night.run(segmentation=SegmentationSettings((night.root / "missing.adapter",)))
    with pytest.raises(EnvironmentProblemError):
        night.run(segmentation=replace(night.settings.segmentation, device="cuda"))


def test_no_name_stops_the_night_or_gets_out_of_the_inbox(
    night: Night, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Names with dots, of other encodings, too long to follow; a pipe; a folder that may not be looked into."""
    caplog.set_level("DEBUG")
    shutil.copy(night.site.scan(NAMES[0]), night.inbox / "JANE.LEE.nii.gz")
    shutil.copy(night.site.scan(NAMES[1]), os.fsencode(night.inbox / "ROE") + b"\xfc\n.nii.gz")
    shutil.copy(night.site.scan(NAMES[2]), night.inbox / "SUE.POE.nii")  # gzip under a name that says otherwise
    (night.inbox / "LEE.nii.gz").symlink_to("x" * 300)
    os.mkfifo(night.inbox / "POE.nii.gz")
    summary = night.run(show_ids=True)
    assert summary.done >= 2
    assert summary.waiting == 0
    night.check_good(*NAMES[:2])
    unread = [case for case in night.cases.values() if case.key.startswith(UNREADABLE)]
    assert len(unread) == 2
    assert "\N{REPLACEMENT CHARACTER}" in (night.outbox / "report.html").read_text(encoding="utf-8")
    night.run()  # without names
    said = caplog.text + "".join(capfd.readouterr())
    said += "".join(f"{case.reason}{case.remedy}" for case in night.cases.values())
    said += "".join(str(path.relative_to(night.outbox)) for path in night.outbox.rglob("*"))
    for name in ("LEE", "ROE", "POE", ".lee", ".poe"):
        assert name not in said


def test_a_scan_that_took_the_place_of_another_of_its_size_and_date_is_found(night: Night) -> None:
    scan = night.inbox / "scan.nii"
    for number, name in enumerate(NAMES[:2], start=1):
        arrived = night.root / "arrived"
        arrived.write_bytes(gzip.decompress(night.site.scan(name).read_bytes()))
        os.utime(arrived, (0, 0))
        arrived.rename(scan)
        assert night.run() == BatchSummary(done=1, failed=0, waiting=0)
        assert len(night.cases) == number
    masks = {path.read_bytes() for path in night.outbox.rglob("case-*.nii.gz")}
    assert masks == {night.site.mask(name) for name in NAMES[:2]}


def test_temporary_files_that_cannot_be_made_cost_no_case(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    night.arrive(NAMES[0])
    night.does(**{NAMES[0]: "no temporary files"})
    trouble = OutOfSpaceError("The disk is full.", remedy="Free some space.")
    with monkeypatch.context() as patched:
        patched.setattr("fseft_edge.batch.coordinator.no_room", lambda folders: trouble)
        with pytest.raises(OutOfSpaceError):
            night.run()
    (case,) = night.cases.values()
    assert case.state == CaseState.WAITING
    night.does()
    night.run()
    night.check_good(NAMES[0])


def test_a_cleaner_of_temporary_files_costs_no_case(night: Night) -> None:
    night.arrive(*NAMES[:2])
    night.does(**{NAMES[0]: "cleaned once"})
    assert night.run() == BatchSummary(done=2, failed=0, waiting=0)
    night.check_good(*NAMES[:2])


def test_permissions_that_change_meanwhile_cost_no_mask(night: Night) -> None:
    night.arrive(NAMES[0])
    night.does(**{NAMES[0]: "chmod"})
    assert night.run() == BatchSummary(done=1, failed=0, waiting=0)
    night.check_good(NAMES[0])


def test_the_last_report_holds_all_also_where_reports_take_long(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_report(*arguments: Any, **more: Any) -> Path:
        time.sleep(1.0)
        return write_report(*arguments, **more)

    monkeypatch.setattr("fseft_edge.batch.coordinator.write_report", slow_report)
    night.arrive(*NAMES)
    night.run()
    report = json.loads((night.outbox / "report.json").read_text(encoding="utf-8"))
    assert [case["state"] for case in report["cases"]] == ["done"] * 3


def test_a_state_is_of_one_outbox(night: Night) -> None:
    state = night.root / "state.sqlite"
    night.run(state=state)
    with pytest.raises(BatchStateError, match="of another outbox"):
        night.run(state=state, outbox=night.root / "another")
    night.outbox.rename(night.root / "renamed")
    night.run(state=state, outbox=night.root / "renamed")
    held = FileLock(night.root / "state.sqlite.lock")
    with held, pytest.raises(UsageError, match="Another `batch run`"):
        night.run(state=state, outbox=night.root / "renamed")


def test_one_run_at_a_time(night: Night) -> None:
    (night.outbox / STATE_FOLDER).mkdir(parents=True)
    with FileLock(night.outbox / STATE_FOLDER / "lock"), pytest.raises(UsageError, match="Another `batch run`"):
        night.run()


def test_another_adapter_needs_another_outbox(night: Night) -> None:
    night.run()
    with pytest.raises(BatchStateError, match="other adapters"):
        night.run(segmentation=replace(night.settings.segmentation, adapters=night.site.adapters[:1]))


def test_a_network_drive_is_known_by_its_kind(tmp_path: Path, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/share {tmp_path}/a\\040share nfs4 rw 0 0\n")
    assert network_file_system(tmp_path / "a share" / "x" / "y", mounts) == "nfs4"
    assert network_file_system(tmp_path / "a shared" / "x", mounts) is None
    assert network_file_system(tmp_path, tmp_path / "no mounts") is None
    monkeypatch.setattr("fseft_edge.outbox.folders.network_file_system", lambda _: "cifs")
    with pytest.raises(UsageError, match=r"network drive \(cifs\)"):
        night.run()


def test_killed_at_any_moment_it_goes_on_where_it_was(night: Night) -> None:
    """The whole process tree is killed again and again; in the end every case is done exactly once."""
    night.arrive(*NAMES)
    broken = night.break_in()
    adapters = [option for path in night.site.adapters for option in ("--adapter", str(path))]
    command = [sys.executable, "-c", "from fseft_edge.cli.main import main; main()", "batch", "run", str(night.inbox)]
    command += ["--output", str(night.outbox), *adapters, "--settle", "0", "--device", "cpu", "--backend", "torch"]
    environment = {**os.environ, "TMPDIR": str(night.root / "tmp"), "OMP_NUM_THREADS": "1"}
    moments = random.Random(0)  # noqa: S311 - no secret
    for _ in range(5):
        process = subprocess.Popen(  # noqa: S603 - the arguments are this test's
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not night.running:
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 0.6))  # three such cases take about a second
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)  # noqa: S603 - likewise
    assert done.returncode in (0, 5), done.stderr
    night.check_good(*NAMES)
    assert {key for key, case in night.cases.items() if case.state == CaseState.FAILED} == set(broken)
    night.check_tidy()
    for name in NAMES:
        assert name not in done.stdout + done.stderr
