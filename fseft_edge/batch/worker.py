"""The worker process of a batch: the encoder, opened once, and cases through its stages, side by side."""

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

import torch

from fseft_edge.batch.case_work import CaseError, CaseTask, CaseUnderWay, CaseWork
from fseft_edge.batch.messages import Broken, Ended, Ready, StageBegun, StageEnded, WorkerMessage
from fseft_edge.runtime.errors import FseftEdgeError
from fseft_edge.runtime.system.overlap import overlapped
from fseft_edge.segmentation.segmenter import SegmentationSettings, open_segmenter

_PR_SET_PDEATHSIG: Final = 1
Before = TypeVar("Before")
After = TypeVar("After")


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is told at its start.

    Attributes:
        segmentation: with what cases are segmented.
        outbox: folder of the results.
        fingerprint: see :class:`fseft_edge.batch.case_work.CaseWork`.
        scratch: folder for temporary files, which the coordinator clears.
        threads: CPU threads.
        pipeline: whether stages of several cases overlap.
    """

    segmentation: SegmentationSettings
    outbox: Path
    fingerprint: str
    scratch: Path
    threads: int
    pipeline: bool


class _Mailbox:
    """Messages to the coordinator, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: WorkerMessage) -> None:
        with self._lock:
            try:
                self._connection.send(message)
            except OSError:  # the coordinator is gone
                os._exit(1)


def work(connection: Connection, settings: WorkerSettings) -> None:
    """Do the cases that come through the connection until None comes: the main function of the process."""
    _live_and_die_with_parent()
    _keep_quiet()
    tempfile.tempdir = str(settings.scratch)
    torch.set_num_threads(settings.threads)
    mailbox = _Mailbox(connection)
    try:
        with open_segmenter(settings.segmentation) as segmenter:
            session = segmenter.session
            mailbox.send(Ready(f"{session.backend} ({session.precision}) on {session.device}"))
            stages = _Stages(CaseWork(segmenter, settings.outbox, settings.fingerprint), mailbox)
            if settings.pipeline:
                for outcome in overlapped(_tasks(connection), stages.read, stages.encode, stages.finish):
                    outcome.result()
            else:
                for task in _tasks(connection):
                    stages.finish(stages.encode(stages.read(task)))
    except FseftEdgeError as error:
        mailbox.send(Broken(type(error).__name__, error.message, error.remedy))


def _tasks(connection: Connection) -> Iterator[CaseTask]:
    while True:
        try:
            task: CaseTask | None = connection.recv()
        except EOFError:  # the coordinator is gone, and what it wanted with it
            os._exit(1)
        if task is None:
            return
        yield task


@dataclass(frozen=True, eq=False)
class _Stages:
    """The stages of :class:`CaseWork`, which tell the coordinator; a case that failed passes the rest as None."""

    work: CaseWork
    mailbox: _Mailbox

    def read(self, task: CaseTask) -> CaseUnderWay | None:
        return self._told(task.key, self.work.read, task)

    def encode(self, case: CaseUnderWay | None) -> CaseUnderWay | None:
        return None if case is None else self._told(case.task.key, self.work.encode, case)

    def finish(self, case: CaseUnderWay | None) -> None:
        if case is None:
            return
        outcome = self._told(case.task.key, self.work.finish, case)
        if outcome is not None:
            self.mailbox.send(Ended(case.task.key, outcome))

    def _told(self, key: str, stage: Callable[[Before], After], given: Before) -> After | None:
        self.mailbox.send(StageBegun(key))
        try:
            result = stage(given)
        except CaseError as error:
            self.mailbox.send(Ended(key, error.outcome))
            return None
        except BaseException:  # of what nobody foresaw: the coordinator isolates the case, and no traceback names it
            os._exit(1)
        self.mailbox.send(StageEnded(key))
        return result


def _live_and_die_with_parent() -> None:
    """Leave Ctrl-C to the coordinator, and do not outlive it: an orphan's result would come in beside a new run's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _keep_quiet() -> None:
    """Let no library write what it read in a file: what there is to say of a case is in its outcome."""
    logging.captureWarnings(capture=True)
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger().setLevel(logging.CRITICAL + 1)
