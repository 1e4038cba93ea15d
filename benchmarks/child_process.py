"""Run a command as a child process with a time limit, and measure its time and memory.

The module imports only the standard library: Linux counts the memory of the parent process into the peak of a child,
so a script that measures with this module must stay small itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Finished:
    """Result of a command.

    Attributes:
        code: exit code, negative for a signal.
        timed_out: whether the command was ended because its time was up.
        wall_s: time from start to end in seconds.
        processor_s: processor time of the command and of its own child processes, in seconds.
        peak_mib: peak memory of the largest single process, in MiB; never less than the memory of the parent.
        output: standard output and standard error.
    """

    code: int
    timed_out: bool
    wall_s: float
    processor_s: float
    peak_mib: float
    output: str

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines of the output that are not empty."""
        return [line.rstrip() for line in self.output.splitlines() if line.strip()][-count:]

    def json_lines(self) -> list[dict[str, Any]]:
        """Return the lines of the output that are JSON objects."""
        found: list[dict[str, Any]] = []
        for line in self.output.splitlines():
            if line.startswith("{"):
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found


def end_with_children() -> None:
    """Let SIGTERM end this process by SystemExit, so that :func:`run` also ends the command."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def run(
    command: Sequence[str | Path],
    *,
    limit_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Finished:
    """Run a command in a process group of its own, and wait until it ends.

    Args:
        command: program and arguments.
        limit_s: time limit in seconds, after which the whole process group is killed; None means no limit.
        environment: environment variables; None means those of this process.
        folder: working folder; None means that of this process.

    Raises:
        OSError: the program cannot be started.
    """
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        process = subprocess.Popen(  # noqa: S603 - the command comes from a benchmark
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if environment is None else dict(environment),
            cwd=folder,
            start_new_session=True,
        )
        timed_out = False
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                if limit_s is not None and not timed_out and time.monotonic() - started > limit_s:
                    timed_out = True
                    os.killpg(process.pid, signal.SIGKILL)
                time.sleep(_POLL_SECONDS)
        except BaseException:  # Ctrl-C and SIGTERM reach only this process: the child has a session of its own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen did not wait itself
        wall_s = time.monotonic() - started
        output.seek(0)
        return Finished(
            code=process.returncode,
            timed_out=timed_out,
            wall_s=wall_s,
            processor_s=usage.ru_utime + usage.ru_stime,
            peak_mib=usage.ru_maxrss / 1024,
            output=output.read().decode(errors="replace"),
        )
