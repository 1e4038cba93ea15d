"""The main function of a worker process: it opens the encoder once and runs the stages of its cases, overlapped."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, TypeVar

from fseft_edge.batch.case_work import CaseError, CaseInProgress, CaseTask, CaseWork
from fseft_edge.batch.messages import (
    CaseEnded,
    StageEnded,
    StageStarted,
    WorkerFailed,
    WorkerMessage,
    WorkerReady,
)
from fseft_edge.runtime.errors import FseftEdgeError
from fseft_edge.runtime.system.overlap import overlapped
from fseft_edge.runtime.system.threads import limit_threads
from fseft_edge.segmentation.segmenter import open_segmenter
from fseft_edge.segmentation.settings import SegmentationSettings

_PR_SET_PDEATHSIG: Final = 1
Before = TypeVar("Before")
After = TypeVar("After")


@dataclass(frozen=True)
class WorkerSettings:
    """Settings that a worker gets when it starts.

    Attributes:
        segmentation: settings of the segmentation.
        outbox: folder of the results.
        fingerprint: options fingerprint of the outbox (see :class:`fseft_edge.batch.case_work.CaseWork`).
        scratch: folder for temporary files; the coordinator deletes it.
        pipeline: whether the stages of several cases overlap. A memory budget is for one case at a time: with a budget,
            stages never overlap.
    """

    segmentation: SegmentationSettings
    outbox: Path
    fingerprint: str
    scratch: Path
    pipeline: bool

    @property
    def overlaps(self) -> bool:
        """Whether the stages of several cases overlap in a worker."""
        return self.pipeline and not self.segmentation.budget.limited


class _Mailbox:
    """Sends messages to the coordinator, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: WorkerMessage) -> None:
        with self._lock:
            try:
                self._connection.send(message)
            except OSError:  # the coordinator has ended
                os._exit(1)


def work(connection: Connection, settings: WorkerSettings) -> None:
    """Run the cases received through the connection until None is received: the main function of the process."""
    _end_with_coordinator()
    _silence_logging()
    tempfile.tempdir = str(settings.scratch)
    limit_threads(settings.segmentation.processes)
    mailbox = _Mailbox(connection)
    try:
        with open_segmenter(settings.segmentation) as segmenter:
            session = segmenter.session
            mailbox.send(WorkerReady(f"{session.backend} ({session.precision}) on {session.device}"))
            stages = _Stages(CaseWork(segmenter, settings.outbox, settings.fingerprint), mailbox)
            if settings.overlaps:
                for outcome in overlapped(_tasks(connection), stages.read, stages.encode, stages.finish):
                    outcome.result()
            else:
                for task in _tasks(connection):
                    stages.finish(stages.encode(stages.read(task)))
    except FseftEdgeError as error:
        mailbox.send(WorkerFailed(type(error).__name__, error.message, error.remedy))


def _tasks(connection: Connection) -> Iterator[CaseTask]:
    while True:
        try:
            task: CaseTask | None = connection.recv()
        except EOFError:  # the coordinator has ended
            os._exit(1)
        if task is None:
            return
        yield task


@dataclass(frozen=True, eq=False)
class _Stages:
    """The stages of :class:`CaseWork` with messages to the coordinator; a failed case passes later stages as None."""

    work: CaseWork
    mailbox: _Mailbox

    def read(self, task: CaseTask) -> CaseInProgress | None:
        return self._reported(task.key, self.work.read, task)

    def encode(self, case: CaseInProgress | None) -> CaseInProgress | None:
        return None if case is None else self._reported(case.task.key, self.work.encode, case)

    def finish(self, case: CaseInProgress | None) -> None:
        if case is None:
            return
        outcome = self._reported(case.task.key, self.work.finish, case)
        if outcome is not None:
            self.mailbox.send(CaseEnded(case.task.key, outcome))

    def _reported(self, key: str, stage: Callable[[Before], After], argument: Before) -> After | None:
        self.mailbox.send(StageStarted(key))
        try:
            result = stage(argument)
        except CaseError as error:
            self.mailbox.send(CaseEnded(key, error.outcome))
            return None
        except BaseException:  # a bug: end without a traceback, which could contain names; the case is tried again
            os._exit(1)
        self.mailbox.send(StageEnded(key))
        return result


def _end_with_coordinator() -> None:
    """Ignore Ctrl-C, and let the kernel end this process with the coordinator, so that it cannot disturb a new run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _silence_logging() -> None:
    """Turn off all log output: libraries quote data of the files. Everything about a case is in its outcome."""
    logging.captureWarnings(capture=True)
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger().setLevel(logging.CRITICAL + 1)
