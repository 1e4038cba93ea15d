"""A worker process in which cases of our choosing crash, hang, or find the disk full.

Spawned processes import it by name, so it can be handed over as the main function of a worker.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from fseft_edge.batch.case_work import CaseError, CaseTask, CaseUnderWay, CaseWork, outcome_of
from fseft_edge.batch.worker import WorkerSettings, work
from fseft_edge.runtime.errors import OutOfSpaceError

MISCHIEF = "mischief.json"
"""Beside the outbox: what happens to which case, by key."""


def mischievous_work(connection: Connection, settings: WorkerSettings) -> None:
    """Do what a worker does, but look into ``mischief.json`` before each case."""
    read = CaseWork.read

    def read_or_worse(self: CaseWork, task: CaseTask) -> CaseUnderWay:
        match mischief(settings.outbox).get(task.key):
            case "SIGSEGV" | "SIGKILL" as name:
                time.sleep(0.5)  # others are in hand by then
                os.kill(os.getpid(), signal.Signals[name])
            case "hang":
                time.sleep(3600)
            case "no temporary files":
                tempfile.tempdir = "/nowhere"
            case "cleaned once" if settings.scratch.exists() and not (marker := settings.outbox / ".cleaned").exists():
                marker.touch()
                shutil.rmtree(settings.scratch)
            case "chmod":
                task.source.chmod(0o640)
            case "full":
                error = OutOfSpaceError("There is no room left.", remedy="Free some.")
                raise CaseError(outcome_of(error, task.key, settings.scratch))
        return read(self, task)

    CaseWork.read = read_or_worse  # type: ignore[method-assign]  # in this process only
    work(connection, settings)


def mischief(outbox: Path) -> dict[str, str]:
    """Return what is to happen to which case."""
    file = outbox.parent / MISCHIEF
    return dict(json.loads(file.read_text())) if file.exists() else {}
