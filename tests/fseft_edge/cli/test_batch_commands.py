"""The commands of the batch: what they print, what they refuse, and the units that they write."""

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

from fseft_edge.batch.service import write_units
from fseft_edge.batch.settings import parse_until, parse_workers
from fseft_edge.cli.batch_commands import batch
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import CaseState, Outcome, StageSeconds
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.runtime.errors import UsageError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(batch, [str(argument) for argument in arguments])


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    """The outbox of a night in which one case was done and one failed."""
    with BatchStore(state_path(tmp_path), create=True) as store:
        for key in ("case-1", "case-2", "case-3"):
            store.add(Path(f"/inbox/DOE^{key}.nii.gz"), key, key)
        organs = (SegmentedOrgan("liver", 1, 1500.0, ("large",)),)
        store.end("case-1", Outcome(CaseState.DONE, organs, StageSeconds(1, 2, 3)))
        store.end(
            "case-2", Outcome(CaseState.FAILED, problem="NotACtError", reason="It is an MRI.", remedy="Give a CT.")
        )
    return tmp_path


def test_status_names_cases_by_their_keys_unless_asked_for_more(outbox: Path) -> None:
    said = run("status", outbox)
    assert said.exit_code == 0
    assert "case-2  failed  It is an MRI. Give a CT." in said.stdout
    assert "3 cases: 1 waiting, 0 running, 1 done, 1 failed" in said.stdout
    assert "DOE" not in said.stdout + run("status", outbox, "--json").stdout
    assert "DOE^case-2.nii.gz" in run("status", outbox, "--show-ids").stdout


def test_status_as_json_holds_all_there_is_to_know(outbox: Path) -> None:
    status = json.loads(run("status", outbox, "--json", "--show-ids").stdout)
    assert [case["state"] for case in status["cases"]] == ["done", "failed", "waiting"]
    assert status["cases"][0]["organs"][0]["flags"] == ["large"]
    assert status["cases"][0]["seconds"] == {"read": 1, "encode": 2, "finish": 3}
    assert status["cases"][1]["source"] == "/inbox/DOE^case-2.nii.gz"


def test_retry_and_cancel_say_how_many(outbox: Path) -> None:
    assert "1 cases cancelled" in run("cancel", outbox).stdout
    assert "2 cases wait again" in run("retry", outbox).stdout
    assert "0 cases wait again" in run("retry", outbox, "case-1").stdout


@pytest.mark.parametrize("command", ["status", "retry", "cancel"])
def test_a_folder_without_a_batch_is_refused(command: str, tmp_path: Path) -> None:
    refused = run(command, tmp_path).exception
    assert isinstance(refused, UsageError)
    assert "no batch at" in str(refused)
    assert list(tmp_path.iterdir()) == []


def test_until_is_the_next_time_a_clock_shows_it() -> None:
    evening = datetime(2026, 11, 20, 18, 0, 30).astimezone()
    assert parse_until("06:30", evening) == datetime(2026, 11, 21, 6, 30).astimezone()
    assert parse_until("18:01", evening) == datetime(2026, 11, 20, 18, 1).astimezone()
    assert parse_until("18:00", evening) == datetime(2026, 11, 21, 18, 0).astimezone()
    for wrong in ("25:00", "soon", "6", "", "06:30:00"):
        with pytest.raises(UsageError, match="no time of day"):
            parse_until(wrong, evening)


def test_until_is_what_the_clock_shows_also_when_clocks_change(monkeypatch: pytest.MonkeyPatch) -> None:
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
        with pytest.raises(UsageError, match="no number of workers"):
            parse_workers(wrong)


def test_the_units_run_the_batch_that_was_asked_for(tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "liver.adapter", write_tiny_encoder(tmp_path / "tiny.encoder"))
    made = run(
        *("install-service", tmp_path / "in box", "-o", tmp_path / "out", "--adapter", tmp_path / "liver.adapter"),
        *("--at", "19:15", "--until", "06:00", "--limit", "30", "--units", tmp_path / "units"),
        *("--dicom", "seg", "--state", tmp_path / "state"),
    )
    assert made.exit_code == 0, made.output
    service, timer = (configparser.ConfigParser(interpolation=None) for _ in range(2))
    service.optionxform = timer.optionxform = str  # type: ignore[assignment,method-assign]  # as its docs say
    service.read(tmp_path / "units" / "fseft-edge-batch.service")
    timer.read(tmp_path / "units" / "fseft-edge-batch.timer")
    command = service["Service"]["ExecStart"]
    assert f'batch run "{tmp_path}/in box" --output {tmp_path}/out --encoder {tmp_path}/tiny.encoder' in command
    assert command.endswith(f"--watch --until 06:00 --limit 30 --dicom seg --state {tmp_path}/state")
    assert service["Service"]["TimeoutStopSec"] == "1800"
    assert timer["Timer"]["OnCalendar"] == "*-*-* 19:15:00"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", ["plain", "two words", 'quo"te', "100%", "$HOME", "back\\slash"])
def test_systemd_understands_the_units(tmp_path: Path, name: str) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    written = write_units(tmp_path, [str(program), "batch", str(tmp_path / name)], at="18:00", limit_minutes=60)
    for unit in (written.service, written.timer):
        checked = subprocess.run(  # noqa: S603 - the arguments are this test's
            ["systemd-analyze", "verify", "--man=no", str(unit)],  # noqa: S607 - wherever it is
            capture_output=True,
            text=True,
            check=False,
        )
        about_ours = [line for line in checked.stderr.splitlines() if "fseft-edge" in line]
        assert about_ours == []


def test_a_line_break_cannot_stand_in_a_unit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line break"):
        write_units(tmp_path, ["/bin/true", "a\nExecStartPre=b"], at="18:00", limit_minutes=1)
    assert list(tmp_path.iterdir()) == []
