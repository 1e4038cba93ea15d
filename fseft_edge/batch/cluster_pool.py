"""Workers on several machines: the cases over a Dask scheduler, which moves those of a dead worker to another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from fseft_edge.batch.case_work import CaseTask
from fseft_edge.batch.cluster_worker import do_case
from fseft_edge.batch.messages import Ended, Lost, PoolEvent
from fseft_edge.batch.worker import WorkerSettings
from fseft_edge.outbox.records import Outcome
from fseft_edge.runtime.errors import EnvironmentProblemError, FseftEdgeError, MissingBackendError

if TYPE_CHECKING:
    from distributed import Future

_PATIENCE: Final = 15.0  # seconds for the scheduler to answer
_ABSENCE: Final = 120.0  # seconds for a first worker, or another one, to come
_PAUSE: Final = 0.1  # seconds between two looks at the cases


class ClusterWorkerPool:
    """The workers of a Dask scheduler, each of which does one case at a time.

    Adapters, encoder, inbox and outbox have to be at the same paths on all machines.

    Args:
        settings: of every worker.
        address: of the scheduler, e.g. ``tcp://10.0.0.5:8786``.
        limit: seconds that a case may be worked on.
        say: what is told about workers.

    Raises:
        MissingBackendError: Dask is not installed.
        EnvironmentProblemError: there is no scheduler there, or its workers do several things at a time.
    """

    def __init__(self, settings: WorkerSettings, address: str, limit: float, say: Callable[[str], None]) -> None:
        try:
            from distributed import Client  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise MissingBackendError(
                "Dask, which several machines are reached by, is not installed.",
                remedy="Install it with `pip install 'fseft-edge[cluster]'`, or leave --scheduler out.",
            ) from error
        self._settings = settings
        self._limit = limit
        self._say = say
        self._cases: dict[str, tuple[Future[Outcome], float]] = {}
        self._seen = time.monotonic()
        try:
            self._client = Client(address, timeout=_PATIENCE, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise EnvironmentProblemError(
                f"There is no Dask scheduler at {address}.",
                remedy="Start one with `dask scheduler`, or check --scheduler.",
            ) from error
        say(f"{self._count()} workers at {address}")

    def _count(self) -> int:
        """Return how many workers there are now; they come and go."""
        threads = self._client.nthreads()
        many = [worker for worker, number in threads.items() if number != 1]
        if many:
            raise EnvironmentProblemError(
                f"The Dask worker {many[0]} would do several cases at a time.",
                remedy="Start workers with `dask worker --nthreads 1`.",
            )
        return len(threads)

    @property
    def in_hand(self) -> int:
        """How many cases the workers have."""
        return len(self._cases)

    def room(self, *, exclusive: bool) -> bool:  # noqa: ARG002 - here every case is alone in its worker
        """Whether a worker is free."""
        count = self._count()
        now = time.monotonic()
        if count:
            self._seen = now
        elif now - self._seen > _ABSENCE:
            raise EnvironmentProblemError(
                f"The Dask scheduler has had no worker for {_ABSENCE:.0f} seconds.",
                remedy="Start some with `dask worker --nthreads 1`, then run the batch again.",
            )
        return len(self._cases) < count

    def hand_over(self, task: CaseTask, *, exclusive: bool) -> None:  # noqa: ARG002 - likewise
        """Give the workers a case."""
        future = self._client.submit(do_case, self._settings, task, pure=False)
        self._cases[task.key] = (future, time.monotonic())

    def events(self, timeout: float) -> list[PoolEvent]:
        """Return what happened, waiting at most so many seconds for the first of it.

        Raises:
            EnvironmentProblemError: a worker cannot segment at all.
        """
        give_up = time.monotonic() + timeout
        while not (ended := [key for key, (future, _) in self._cases.items() if future.done()]):
            if time.monotonic() >= give_up:
                break
            time.sleep(_PAUSE)
        events = [self._ended(key, self._cases[key][0]) for key in ended]
        for key in ended:
            del self._cases[key]
        late = [key for key, (_, begun) in self._cases.items() if time.monotonic() - begun > self._limit]
        return events + [self._late(key) for key in late]

    def close(self, *, now: bool = False) -> list[str]:  # noqa: ARG002 - a case at a worker cannot be waited for here
        """Let the workers go; return the cases that were lost by it."""
        lost = list(self._cases)
        for future, _ in self._cases.values():
            future.cancel()
        self._cases.clear()
        self._client.close()
        return lost

    def _ended(self, key: str, future: Future[Outcome]) -> PoolEvent:
        from distributed import KilledWorker  # noqa: PLC0415 - an extra

        if future.status == "finished":
            return Ended(key, future.result())
        if future.status != "error":  # the scheduler has forgotten it
            return Lost(key, blamed=False, cause="the scheduler lost it")
        error: Any = future.exception()
        if isinstance(error, KilledWorker):
            self._say(f"{key}: every worker that had it died")
            return Lost(key, blamed=True, cause="every worker that had it ended unexpectedly")
        if isinstance(error, FseftEdgeError):
            raise EnvironmentProblemError(f"A Dask worker cannot segment: {error.message}", remedy=error.remedy)
        raise EnvironmentProblemError(
            f"A Dask worker cannot segment: {type(error).__name__}.",
            remedy="Install the same version of fseft-edge on every machine; the worker's own output says more.",
        )

    def _late(self, key: str) -> PoolEvent:
        """End the worker that works on a case for too long; its nanny starts another."""
        future, _ = self._cases.pop(key)
        busy = [worker for worker, keys in self._client.processing().items() if future.key in keys]
        future.cancel(force=True)
        self._client.restart_workers(busy, raise_for_error=False)
        self._say(f"{key} takes too long: its worker is ended")
        return Lost(key, blamed=True, cause=f"it took longer than {self._limit / 60:g} minutes")
