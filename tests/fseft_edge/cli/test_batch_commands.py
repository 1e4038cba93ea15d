"""The commands of the batch: output, refusals and systemd units."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from doubles.encoder import write_random_adapter, write_tiny_encoder
from doubles.errors import refused

from fseft_edge.batch.service import write_units
from fseft_edge.batch.settings import parse_until, parse_workers
from fseft_edge.cli.batch_commands import batch
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import CaseState, Outcome, StageSeconds
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.runtime.errors import UsageError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(batch, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    """Return an outbox in which one case is done, one has failed and one is waiting."""
    with BatchStore(state_path(tmp_path), create=True) as store:
        for key in ("case-1", "case-2", "case-3"):
            store.add(Path(f"/inbox/DOE^{key}.nii.gz"), key, key)
        organs = (SegmentedOrgan("liver", 1, 1500.0, ("large",)),)
        outcome = Outcome(CaseState.DONE, organs, StageSeconds(1, 2, 3), warnings=("The table drifts.",))
        store.end("case-1", outcome)
        store.end(
            "case-2", Outcome(CaseState.FAILED, problem="NotACtError", reason="It is an MRI.", remedy="Give a CT.")
        )
    return tmp_path


def test_status_shows_file_names_only_with_show_ids(outbox: Path) -> None:
    shown = run("status", outbox)
    assert shown.exit_code == 0
    assert "case-2  failed  It is an MRI. Give a CT." in shown.stdout
    assert "3 cases: 1 waiting, 0 running, 1 done, 1 failed" in shown.stdout
    assert "case-1  done\n    warning: The table drifts.\n" in shown.stdout
    assert "; 1 with warnings; 0 duplicates skipped" in shown.stdout
    assert "DOE" not in shown.stdout + run("status", outbox, "--json").stdout
    assert "DOE^case-2.nii.gz" in run("status", outbox, "--show-ids").stdout


def test_status_names_the_case_that_supersedes_another(outbox: Path) -> None:
    with BatchStore(state_path(outbox)) as store:
        store.add(Path("/inbox/DOE^case-2.nii.gz"), "complete", "case-4", ["4"])
        assert store.supersede_earlier(Path("/inbox/DOE^case-2.nii.gz"), "case-4").keys == ("case-2",)
    assert "case-2  superseded by case-4\n" in run("status", outbox).stdout


def test_status_as_json_contains_the_records_of_all_cases(outbox: Path) -> None:
    status = json.loads(run("status", outbox, "--json", "--show-ids").stdout)
    assert [case["state"] for case in status["cases"]] == ["done", "failed", "waiting"]
    assert status["cases"][0]["organs"][0]["flags"] == ["large"]
    assert status["cases"][0]["seconds"] == {"read": 1, "encode": 2, "finish": 3}
    assert status["cases"][0]["warnings"] == ["The table drifts."]
    assert (status["cases"][0]["review"], status["cases"][0]["decisions"]) == (None, [])
    assert status["cases"][1]["source"] == "/inbox/DOE^case-2.nii.gz"


def test_retry_and_cancel_print_the_number_of_cases(outbox: Path) -> None:
    assert run("cancel", outbox).stdout == "1 case cancelled\n"
    assert run("retry", outbox).stdout.startswith("2 ")
    assert run("retry", outbox, "case-1").stdout.startswith("0 ")


@pytest.mark.parametrize("command", ["status", "retry", "cancel"])
def test_a_folder_without_a_batch_is_refused(command: str, tmp_path: Path) -> None:
    with refused(UsageError, tmp_path):
        run(command, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_until_is_the_next_moment_with_this_time_of_day() -> None:
    evening = datetime(2026, 11, 20, 18, 0, 30).astimezone()
    assert parse_until("06:30", evening) == datetime(2026, 11, 21, 6, 30).astimezone()
    assert parse_until("18:01", evening) == datetime(2026, 11, 20, 18, 1).astimezone()
    assert parse_until("18:00", evening) == datetime(2026, 11, 21, 18, 0).astimezone()
    for wrong in ("25:00", "soon", "6", "", "06:30:00"):
        with refused(UsageError, wrong):
            parse_until(wrong, evening)


def test_until_is_a_local_time_also_when_the_clocks_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        until = parse_until("06:30", datetime(2027, 3, 27, 18, 0).astimezone())
        assert (until.hour, until.minute, until.utcoffset()) == (6, 30, timedelta(hours=2))
    finally:
        monkeypatch.undo()
        time.tzset()


def test_workers_are_a_number_or_auto() -> None:
    assert parse_workers("auto") is None
    assert parse_workers("3") == 3
    for wrong in ("0", "-1", "many", "1.5"):
        with refused(UsageError, wrong):
            parse_workers(wrong)


def test_the_units_contain_the_options_of_the_batch(tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "liver.adapter", write_tiny_encoder(tmp_path / "tiny.encoder"))
    made = run(
        *("install-service", tmp_path / "in box", tmp_path / "out", "--adapter", tmp_path / "liver.adapter"),
        *("--at", "19:15", "--until", "06:00", "--limit", "30", "--units", tmp_path / "units"),
        *("--dicom", "seg", "--state", tmp_path / "state"),
    )
    assert made.exit_code == 0, made.output
    service, timer = (configparser.ConfigParser(interpolation=None) for _ in range(2))
    service.optionxform = timer.optionxform = str  # type: ignore[assignment,method-assign]  # as in the docs of configparser
    service.read(tmp_path / "units" / "fseft-edge-batch.service")
    timer.read(tmp_path / "units" / "fseft-edge-batch.timer")
    command = service["Service"]["ExecStart"]
    assert f'batch run "{tmp_path}/in box" {tmp_path}/out --encoder {tmp_path}/tiny.encoder' in command
    assert command.endswith(f"--watch --until 06:00 --limit 30 --dicom seg --state {tmp_path}/state")
    assert service["Service"]["TimeoutStopSec"] == "1800"
    assert timer["Timer"]["OnCalendar"] == "*-*-* 19:15:00"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", ["plain", "two words", 'quo"te', "100%", "$HOME", "back\\slash"])
def test_systemd_accepts_the_units(tmp_path: Path, name: str) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    written = write_units(tmp_path, [str(program), "batch", str(tmp_path / name)], at="18:00", limit_minutes=60)
    for unit in (written.service, written.timer):
        checked = subprocess.run(  # noqa: S603 - fixed arguments
            ["systemd-analyze", "verify", "--man=no", str(unit)],  # noqa: S607 - found in PATH
            capture_output=True,
            text=True,
            check=False,
        )
        about_ours = [line for line in checked.stderr.splitlines() if "fseft-edge" in line]
        assert about_ours == []


def test_a_line_break_in_a_unit_is_refused(tmp_path: Path) -> None:
    with refused(UsageError):
        write_units(tmp_path, ["/bin/true", "a\nExecStartPre=b"], at="18:00", limit_minutes=1)
    assert list(tmp_path.iterdir()) == []
