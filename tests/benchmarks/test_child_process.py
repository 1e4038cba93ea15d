"""Commands that benchmarks run as child processes."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from doubles.repository import ROOT


@pytest.fixture
def child_process(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("child_process")


def test_a_command_is_measured_with_its_own_child_processes(child_process: ModuleType) -> None:
    """The grandchild takes memory and processor time; the child only waits."""
    work = "x = bytearray(200 << 20); sum(range(3_000_000)); print('{\"a\": 1}'); print('{damaged')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}]); print('last'); sys.exit(2)"
    done = child_process.run([sys.executable, "-c", code])
    assert (done.code, done.timed_out) == (2, False)
    assert done.peak_mib > 200
    assert done.processor_s > 0
    assert done.json_lines() == [{"a": 1}]
    assert done.last_lines(1) == ["last"]


def test_sigterm_ends_the_command_too(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    command = [
        sys.executable,
        "-c",
        f"import os, time; open({str(note)!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(600)",
    ]
    code = f"import child_process as c; c.end_with_children(); c.run({command!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "benchmarks")  # noqa: S603 - runs this Python
    while not (note.exists() and note.read_text().endswith("\n")):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
