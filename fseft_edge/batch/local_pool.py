"""A worker pool on this machine: it starts worker processes, gives them cases, and replaces those that die."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Final

from fseft_edge.batch.case_work import CaseTask
from fseft_edge.batch.messages import (
    CaseEnded,
    CaseLost,
    PoolEvent,
    StageEnded,
    StageStarted,
    WorkerFailed,
    WorkerReady,
)
from fseft_edge.batch.worker import WorkerSettings, work
from fseft_edge.runtime.errors import EnvironmentProblemError

PIPELINE_DEPTH: Final = 3
"""Number of cases in a worker that overlaps stages: one case is read, one is encoded, one is finished."""

_MAX_FAILED_STARTS: Final = 3
_START_SECONDS: Final = 600.0  # longest time in which a worker opens its encoder, unless --limit is longer
_STOP_SECONDS: Final = 10.0  # longest time in which an idle worker ends after it was told to
_CONTEXT: Final = get_context("spawn")


@dataclass(eq=False)
class _CaseClock:
    """Measures the time in which a worker computes a case; waiting between stages does not count."""

    spent: float = 0.0
    since: float | None = None

    def seconds(self) -> float:
        return self.spent + (0.0 if self.since is None else time.monotonic() - self.since)


@dataclass(eq=False)
class _Worker:
    """One worker process, and its cases in progress."""

    process: SpawnProcess
    mailbox: Connection
    started: float = field(default_factory=time.monotonic)
    ready: bool = False
    exclusive: bool = False
    cases: dict[str, _CaseClock] = field(default_factory=dict)


class LocalWorkerPool:
    """Worker processes on this machine.

    Args:
        settings: settings of every worker.
        count: number of worker processes.
        limit: time limit of a case in seconds.
        log: function that writes a log line about workers.
    """

    def __init__(self, settings: WorkerSettings, count: int, limit: float, log: Callable[[str], None]) -> None:
        self._settings = settings
        self._limit = limit
        self._log = log
        self._failed_starts = 0
        self._workers = [self._start_worker() for _ in range(count)]

    @property
    def in_progress(self) -> int:
        """Number of cases that were given to workers and have not ended."""
        return sum(len(worker.cases) for worker in self._workers)

    def has_capacity(self, *, exclusive: bool) -> bool:
        """Whether another case can be submitted. An exclusive case needs a worker that has no case."""
        return self._free(exclusive=exclusive) is not None

    def submit(self, task: CaseTask, *, exclusive: bool) -> None:
        """Give a case to a worker that can take another one."""
        worker = self._free(exclusive=exclusive)
        assert worker is not None  # noqa: S101 - the caller asked has_capacity()
        worker.cases[task.key] = _CaseClock()
        worker.exclusive = exclusive
        try:
            worker.mailbox.send(task)
        except OSError:  # the worker has just died; events() will report it
            return

    def events(self, timeout: float) -> list[PoolEvent]:
        """Return the events since the last call; wait at most ``timeout`` seconds for the first event.

        Raises:
            EnvironmentProblemError: workers cannot start.
        """
        handles = [handle for worker in self._workers for handle in (worker.mailbox, worker.process.sentinel)]
        connection.wait(handles, timeout)
        events: list[PoolEvent] = []
        for number, worker in enumerate(self._workers):
            events += self._received(worker)
            late = [key for key, clock in worker.cases.items() if clock.seconds() > self._limit]
            if late:
                self._log(f"{late[0]} exceeded the time limit: its worker is stopped")
                worker.process.kill()
                worker.process.join()
                events += self._received(worker)
            if not worker.ready and time.monotonic() - worker.started > max(self._limit, _START_SECONDS):
                worker.process.kill()
                worker.process.join()
            if worker.process.is_alive():
                continue
            events += self._received(worker)
            events += self._lost(worker, [key for key in late if key in worker.cases])
            self._workers[number] = self._start_worker()
        return events

    def close(self, *, now: bool = False) -> list[str]:
        """Stop the workers, at once or after their present cases; return the keys of the cases that did not end."""
        for worker in self._workers:
            if not now:
                try:
                    worker.mailbox.send(None)
                except OSError:
                    continue
        for worker in self._workers:
            if not now:
                worker.process.join(_STOP_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()
            worker.mailbox.close()
        return [key for worker in self._workers for key in worker.cases]

    def _start_worker(self) -> _Worker:
        own_end, worker_end = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=work, args=(worker_end, self._settings), name="fseft-edge worker")
        # The worker inherits this setting while it imports its modules: only the coordinator reacts to Ctrl-C.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if _in_main_thread() else None
        try:
            process.start()
        finally:
            if previous is not None:
                signal.signal(signal.SIGINT, previous)
        worker_end.close()
        return _Worker(process, own_end)

    def _free(self, *, exclusive: bool) -> _Worker | None:
        capacity = 1 if exclusive or not self._settings.overlaps else PIPELINE_DEPTH
        free = [worker for worker in self._workers if not worker.exclusive and len(worker.cases) < capacity]
        return min(free, key=lambda worker: len(worker.cases), default=None)

    def _received(self, worker: _Worker) -> list[PoolEvent]:
        events: list[PoolEvent] = []
        while True:
            try:
                if not worker.mailbox.poll():
                    return events
                message = worker.mailbox.recv()
            except (EOFError, OSError):
                return events
            match message:
                case WorkerReady(backend):
                    worker.ready = True
                    self._failed_starts = 0
                    self._log(f"A worker is ready: {backend}")
                case WorkerFailed(problem, text, remedy):
                    raise EnvironmentProblemError(f"A worker cannot start ({problem}): {text}", remedy=remedy)
                case StageStarted(key):
                    worker.cases[key].since = time.monotonic()
                case StageEnded(key):
                    clock = worker.cases[key]
                    clock.spent, clock.since = clock.seconds(), None
                case CaseEnded(key):
                    del worker.cases[key]
                    worker.exclusive = worker.exclusive and bool(worker.cases)
                    events.append(message)

    def _lost(self, worker: _Worker, late: list[str]) -> list[PoolEvent]:
        """Return one event for each case of a worker that has ended."""
        code = worker.process.exitcode
        worker.mailbox.close()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise EnvironmentProblemError(
                    f"{self._failed_starts} worker processes ended before they were ready ({_exit_reason(code)}).",
                    remedy="Run `fseft-edge doctor`, and check that there is enough free memory.",
                )
        if late:
            cause = f"it took longer than {self._limit / 60:g} minutes"
            return [CaseLost(key, key in late, cause if key in late else "") for key in worker.cases]
        cause = f"its worker process ended unexpectedly ({_exit_reason(code)})"
        cases = ", ".join(worker.cases) or "none"
        self._log(f"A worker ended unexpectedly ({_exit_reason(code)}). Its cases in progress: {cases}")
        return [CaseLost(key, len(worker.cases) == 1 and worker.ready, cause) for key in worker.cases]


def _exit_reason(code: int | None) -> str:
    """Return a phrase that states how a process ended."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, perhaps because memory ran out" if name == "SIGKILL" else name
    return f"exit code {code}"


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
