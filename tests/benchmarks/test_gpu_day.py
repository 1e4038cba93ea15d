"""The script for a machine with a GPU survives parts that fail, and reports them."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from doubles.repository import ROOT


@pytest.fixture
def gpu_day(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_day")


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", code)


def test_parts_that_fail_do_not_stop_the_others_and_both_files_are_written(gpu_day: ModuleType, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    planned = [
        gpu_day.Part("fails", python("print('why | it failed'); raise SystemExit(3)"), 60),
        gpu_day.Part("hangs", python("import time; print('before', flush=True); time.sleep(600)"), 0.5),
        gpu_day.Part("is killed", python("import os; os.kill(os.getpid(), 9)"), 60),
        gpu_day.Part("does not start", (tmp_path / "no such program",), 60),
        gpu_day.Part("writes a damaged file", python(""), 60, result=damaged),
        gpu_day.Part("needs a GPU", python(""), 60, gpu=True),
        gpu_day.Part("needs a package", python(""), 60, needs=("monai",)),
        gpu_day.Part("needs a file", python(""), 60, files=(tmp_path / "edge_base.encoder",)),
        gpu_day.Part("works", python("print('{\"seconds\": 1.5}')"), 60),
    ]
    missing = {"monai": "ModuleNotFoundError"}
    outcomes = list(gpu_day.run_parts(planned, "cpu", missing, os.environ, time.monotonic() + 300))
    gpu_day.write_report(tmp_path, {"device": "cpu"}, outcomes)

    parts = json.loads((tmp_path / "gpu_day.json").read_text())["parts"]
    details = {part["part"]: part["detail"] for part in parts}
    assert [part["state"] for part in parts] == ["failed"] * 5 + ["skipped"] * 3 + ["done"]
    assert details["fails"] == "why | it failed\nexit code 3"
    assert details["hangs"].startswith("before\nended after its time limit")
    assert details["is killed"] == "exit code -9"
    assert "no such program" in details["does not start"]
    assert "NVIDIA GPU" in details["needs a GPU"]
    assert "monai" in details["needs a package"]
    assert "edge_base.encoder" in details["needs a file"]
    assert parts[-1]["result"] == [{"seconds": 1.5}]
    table = (tmp_path / "gpu_day.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {part.name}" for part in planned]
    assert "why \\| it failed<br>exit code 3" in table
    assert "seconds: 1.5" in rows[-1]


def test_no_part_starts_when_the_time_is_up(gpu_day: ModuleType, tmp_path: Path) -> None:
    part = gpu_day.Part("late", python(f"open({str(tmp_path / 'ran')!r}, 'w')"), 60)
    (late,) = gpu_day.run_parts([part], "cuda", {}, os.environ, time.monotonic())
    assert (late.state, late.detail) == ("skipped", "the time was up")
    assert not (tmp_path / "ran").exists()


def test_the_package_runs_from_the_checkout_without_being_installed(gpu_day: ModuleType, tmp_path: Path) -> None:
    links = gpu_day.linked_package(tmp_path / "links")
    code = "import fseft_edge.runtime.errors as runtime, fseft_edge.export as export; print(runtime, export)"
    done = gpu_day.run(
        (sys.executable, "-c", code), environment={**os.environ, "PYTHONPATH": str(links)}, folder=tmp_path
    )
    assert done.code == 0, done.output
    assert done.output.count(str(links)) == 2


def test_every_part_names_a_file_that_exists(gpu_day: ModuleType, tmp_path: Path) -> None:
    """A script or folder that is renamed must be renamed in the parts too."""
    for device in ("cpu", "cuda"):
        planned = list(gpu_day.parts(tmp_path, device, gpu_day.SCAN))
        assert len({part.name for part in planned}) == len(planned)
        for part in planned:
            named = [word for word in part.command if isinstance(word, Path) and word.is_relative_to(ROOT)]
            assert all(path.exists() for path in named), part.name
