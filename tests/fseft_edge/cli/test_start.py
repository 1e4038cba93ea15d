"""Start and end of the process of a command."""

from __future__ import annotations

import subprocess
import sys

import pytest


def child(script: str, **streams: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"from fseft_edge.cli.start import leave, loading\n{script}"]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run(command, text=True, timeout=60, check=False, **settings)  # type: ignore[call-overload, no-any-return]  # noqa: S603 - a fixed script


@pytest.mark.parametrize("code", [0, 5])
def test_a_process_ends_with_its_code_its_output_and_its_exit_functions(code: int) -> None:
    done = child(f"import atexit; atexit.register(print, 'at the end'); print('result', end=' '); leave({code})")
    assert (done.returncode, done.stdout, done.stderr) == (code, "result at the end\n", "")


def test_a_process_waits_for_its_threads() -> None:
    script = "import threading, time\nthreading.Timer(0.2, print, ['from the thread']).start()\nleave(3)"
    done = child(script)
    assert (done.returncode, done.stdout) == (3, "from the thread\n")


def test_output_that_cannot_be_written_is_an_error() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123 - a device
        done = child("print('result'); leave(0)", stdout=full)
    assert done.returncode
    assert "No space left" in done.stderr


def test_garbage_is_collected_again_after_loading() -> None:
    script = """
import gc
with loading():
    inside = gc.isenabled()
print(inside, gc.isenabled(), gc.get_freeze_count() > 0)
try:
    with loading():
        raise ImportError
except ImportError:
    print(gc.isenabled())
"""
    assert child(script).stdout.split() == ["False", "True", "True", "True"]
