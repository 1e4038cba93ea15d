"""Worker processes on this machine: started, fed, watched, and replaced when they die."""

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
from fseft_edge.batch.messages import Broken, Ended, Lost, PoolEvent, Ready, StageBegun, StageEnded
from fseft_edge.batch.worker import WorkerSettings, work
from fseft_edge.runtime.errors import EnvironmentProblemError

IN_HAND: Final = 3
"""Cases that a pipelined worker has: one being read, one encoded, one finished."""

_LEAST_STARTS: Final = 3
_LONGEST_START: Final = 600.0  # seconds for a worker to open its encoder, or --limit where that is longer
_PATIENCE: Final = 10.0  # seconds for a worker to end by itself once it has nothing left to do
_CONTEXT: Final = get_context("spawn")


@dataclass(eq=False)
class _Clock:
    """Seconds that a case was worked on; waiting between stages does not count."""

    spent: float = 0.0
    since: float | None = None

    def seconds(self) -> float:
        return self.spent + (0.0 if self.since is None else time.monotonic() - self.since)


@dataclass(eq=False)
class _Worker:
    """One process, and what it has in hand."""

    process: SpawnProcess
    mailbox: Connection
    started: float = field(default_factory=time.monotonic)
    ready: bool = False
    exclusive: bool = False
    cases: dict[str, _Clock] = field(default_factory=dict)


class LocalWorkerPool:
    """Worker processes on this machine.

    Args:
        settings: of every worker.
        count: how many.
        limit: seconds that a case may be worked on.
        say: what is told about workers.
    """

    def __init__(self, settings: WorkerSettings, count: int, limit: float, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._limit = limit
        self._say = say
        self._failed_starts = 0
        self._workers = [self._started() for _ in range(count)]

    @property
    def in_hand(self) -> int:
        """How many cases the workers have."""
        return sum(len(worker.cases) for worker in self._workers)

    def room(self, *, exclusive: bool) -> bool:
        """Whether another case can be handed over; one that has to be alone needs a worker without any."""
        return self._free(exclusive=exclusive) is not None

    def hand_over(self, task: CaseTask, *, exclusive: bool) -> None:
        """Give a case to a worker that has room."""
        worker = self._free(exclusive=exclusive)
        assert worker is not None  # noqa: S101 - room() was asked
        worker.cases[task.key] = _Clock()
        worker.exclusive = exclusive
        try:
            worker.mailbox.send(task)
        except OSError:  # it has just died, which the next look at it shows
            return

    def events(self, timeout: float) -> list[PoolEvent]:
        """Return what happened, waiting at most so many seconds for the first of it.

        Raises:
            EnvironmentProblemError: workers cannot start.
        """
        waited = [thing for worker in self._workers for thing in (worker.mailbox, worker.process.sentinel)]
        connection.wait(waited, timeout)
        events: list[PoolEvent] = []
        for number, worker in enumerate(self._workers):
            events += self._received(worker)
            late = [key for key, clock in worker.cases.items() if clock.seconds() > self._limit]
            if late:
                self._say(f"{late[0]} takes too long: its worker is ended")
                worker.process.kill()
                worker.process.join()
                events += self._received(worker)
            if not worker.ready and time.monotonic() - worker.started > max(self._limit, _LONGEST_START):
                worker.process.kill()
                worker.process.join()
            if worker.process.is_alive():
                continue
            events += self._received(worker)
            events += self._lost(worker, [key for key in late if key in worker.cases])
            self._workers[number] = self._started()
        return events

    def close(self, *, now: bool = False) -> list[str]:
        """End the workers, at once or when they have finished; return the cases that were lost by it."""
        for worker in self._workers:
            if not now:
                try:
                    worker.mailbox.send(None)
                except OSError:
                    continue
        for worker in self._workers:
            if not now:
                worker.process.join(_PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()
            worker.mailbox.close()
        return [key for worker in self._workers for key in worker.cases]

    def _started(self) -> _Worker:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=work, args=(theirs, self._settings), name="fseft-edge worker")
        # A worker inherits this while it imports what it needs; it leaves Ctrl-C to the coordinator.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if _in_main_thread() else None
        try:
            process.start()
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
        theirs.close()
        return _Worker(process, ours)

    def _free(self, *, exclusive: bool) -> _Worker | None:
        room = 1 if exclusive or not self._settings.pipeline else IN_HAND
        free = [worker for worker in self._workers if not worker.exclusive and len(worker.cases) < room]
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
                case Ready(how):
                    worker.ready = True
                    self._failed_starts = 0
                    self._say(f"a worker is ready: {how}")
                case Broken(problem, text, remedy):
                    raise EnvironmentProblemError(f"A worker cannot start ({problem}): {text}", remedy=remedy)
                case StageBegun(key):
                    worker.cases[key].since = time.monotonic()
                case StageEnded(key):
                    clock = worker.cases[key]
                    clock.spent, clock.since = clock.seconds(), None
                case Ended(key):
                    del worker.cases[key]
                    worker.exclusive = worker.exclusive and bool(worker.cases)
                    events.append(message)

    def _lost(self, worker: _Worker, late: list[str]) -> list[PoolEvent]:
        """Return what a worker that is gone had in hand."""
        code = worker.process.exitcode
        worker.mailbox.close()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _LEAST_STARTS:
                raise EnvironmentProblemError(
                    f"Worker processes end before they are ready ({_ending(code)}).",
                    remedy="See what `fseft-edge doctor` says, and whether there is enough memory.",
                )
        if late:
            cause = f"it took longer than {self._limit / 60:g} minutes"
            return [Lost(key, key in late, cause if key in late else "") for key in worker.cases]
        cause = f"its worker process ended unexpectedly ({_ending(code)})"
        self._say(f"a worker ended unexpectedly ({_ending(code)}) with {', '.join(worker.cases) or 'nothing'} in hand")
        return [Lost(key, len(worker.cases) == 1 and worker.ready, cause) for key in worker.cases]


def _ending(code: int | None) -> str:
    """Say how a process ended."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, perhaps for want of memory" if name == "SIGKILL" else name
    return f"exit code {code}"


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
