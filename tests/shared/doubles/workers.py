"""Workers in which chosen cases fail: they crash the process, hang, or find the disk full.

Spawned processes import this module by name, so :func:`faulty_work` can be the main function of a worker process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection

from fseft_edge.batch.case_work import CaseError, CaseInProgress, CaseTask, CaseWork, failed_outcome
from fseft_edge.batch.messages import CaseEnded, PoolEvent
from fseft_edge.batch.worker import WorkerSettings, work
from fseft_edge.runtime.errors import OutOfSpaceError
from fseft_edge.segmentation.segmenter import open_segmenter

FAULTS_FILE = "faults.json"
"""Name of a JSON file beside the outbox: the fault of each case, by key."""


def faulty_work(connection: Connection, settings: WorkerSettings) -> None:
    """Run a worker process that applies the faults in ``faults.json`` before it reads a case."""
    read = CaseWork.read

    def read_with_fault(self: CaseWork, task: CaseTask) -> CaseInProgress:
        _apply_fault(task, settings)
        return read(self, task)

    CaseWork.read = read_with_fault  # type: ignore[method-assign]  # in this process only
    work(connection, settings)


class InProcessPool:
    """A worker pool that runs every case in this process, one after another, with the faults in ``faults.json``.

    It takes the place of worker processes in tests that are not about processes.
    """

    def __init__(self, settings: WorkerSettings, count: int, limit: float, log: Callable[[str], None]) -> None:
        self._settings = settings
        self._tasks: list[CaseTask] = []
        self._resources = ExitStack()
        segmenter = self._resources.enter_context(open_segmenter(settings.segmentation))
        self._work = CaseWork(segmenter, settings.outbox, settings.fingerprint)

    @property
    def in_progress(self) -> int:
        return len(self._tasks)

    def has_capacity(self, *, exclusive: bool) -> bool:
        return not self._tasks

    def submit(self, task: CaseTask, *, exclusive: bool) -> None:
        self._tasks.append(task)

    def events(self, timeout: float) -> list[PoolEvent]:
        if not self._tasks:
            time.sleep(timeout)
            return []
        task = self._tasks.pop()
        earlier = tempfile.tempdir
        tempfile.tempdir = str(self._settings.scratch)
        try:
            _apply_fault(task, self._settings)
            outcome = self._work.finish(self._work.encode(self._work.read(task)))
        except CaseError as error:
            outcome = error.outcome
        finally:
            tempfile.tempdir = earlier
        return [CaseEnded(task.key, outcome)]

    def close(self, *, now: bool = False) -> list[str]:
        self._resources.close()
        return [task.key for task in self._tasks]


def _apply_fault(task: CaseTask, settings: WorkerSettings) -> None:
    file = settings.outbox.parent / FAULTS_FILE
    faults = json.loads(file.read_text()) if file.exists() else {}
    match faults.get(task.key):
        case "SIGSEGV" | "SIGKILL" as name:
            time.sleep(0.5)  # the worker has received other cases by then
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
            error = OutOfSpaceError("The disk is full.", remedy="Free some space.")
            raise CaseError(failed_outcome(error, task.key, settings.scratch))
