"""A worker pool on several machines: a Dask scheduler gives the cases of a dead worker to another worker."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from fseft_edge.batch.case_work import CaseTask
from fseft_edge.batch.cluster_worker import do_case
from fseft_edge.batch.messages import CaseEnded, CaseLost, PoolEvent
from fseft_edge.batch.worker import WorkerSettings
from fseft_edge.outbox.records import Outcome
from fseft_edge.runtime.errors import EnvironmentProblemError, FseftEdgeError, MissingBackendError

if TYPE_CHECKING:
    from distributed import Future

_CONNECT_SECONDS: Final = 15.0  # longest wait for an answer of the scheduler
_NO_WORKER_SECONDS: Final = 120.0  # longest time without any worker
_POLL_SECONDS: Final = 0.1  # time between two checks of the cases


class ClusterWorkerPool:
    """The workers of a Dask scheduler. Each worker runs one case at a time, so every case is exclusive.

    Adapters, encoder, inbox and outbox have to be at the same paths on all machines.

    Args:
        settings: settings of every worker.
        address: address of the scheduler, e.g. ``tcp://10.0.0.5:8786``.
        limit: time limit of a case in seconds.
        log: function that writes a log line about workers.

    Raises:
        MissingBackendError: Dask is not installed.
        EnvironmentProblemError: there is no scheduler at the address, or a worker has more than one thread.
    """

    def __init__(self, settings: WorkerSettings, address: str, limit: float, log: Callable[[str], None]) -> None:
        try:
            from distributed import Client  # noqa: PLC0415 - Dask is optional
        except ImportError as error:
            raise MissingBackendError(
                "--scheduler needs Dask, which is not installed.",
                remedy="Install it with `pip install 'fseft-edge[cluster]'`, or remove --scheduler.",
            ) from error
        self._settings = settings
        self._limit = limit
        self._log = log
        self._cases: dict[str, tuple[Future[Outcome], float]] = {}
        self._last_seen = time.monotonic()
        try:
            self._client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise EnvironmentProblemError(
                f"No Dask scheduler answers at {address}.",
                remedy="Start a scheduler with `dask scheduler`, or correct the address given with --scheduler.",
            ) from error
        log(f"{self._worker_count()} workers are connected to the scheduler at {address}")

    def _worker_count(self) -> int:
        """Return the present number of workers, which can change at any time."""
        threads = self._client.nthreads()
        unsuitable = [worker for worker, number in threads.items() if number != 1]
        if unsuitable:
            raise EnvironmentProblemError(
                f"The Dask worker {unsuitable[0]} has {threads[unsuitable[0]]} threads; a worker must have 1.",
                remedy="Stop this worker, and start it with `dask worker --nthreads 1`.",
            )
        return len(threads)

    def _neighbours(self) -> dict[str, int]:
        """Return the number of workers on the machine of each worker, by the address of the worker."""
        machines = {worker: urlsplit(worker).hostname for worker in self._client.nthreads()}
        counts = Counter(machines.values())
        return {worker: counts[machine] for worker, machine in machines.items()}

    @property
    def in_progress(self) -> int:
        """Number of cases that were given to the workers and have not ended."""
        return len(self._cases)

    def has_capacity(self, *, exclusive: bool) -> bool:  # noqa: ARG002 - every case is exclusive here
        """Whether a worker is free."""
        count = self._worker_count()
        now = time.monotonic()
        if count:
            self._last_seen = now
        elif now - self._last_seen > _NO_WORKER_SECONDS:
            raise EnvironmentProblemError(
                f"The Dask scheduler has had no worker for {_NO_WORKER_SECONDS:.0f} seconds.",
                remedy="Start workers with `dask worker --nthreads 1`, then run the batch again.",
            )
        return len(self._cases) < count

    def submit(self, task: CaseTask, *, exclusive: bool) -> None:  # noqa: ARG002 - every case is exclusive here
        """Give a case to a worker."""
        future = self._client.submit(do_case, self._settings, task, self._neighbours(), pure=False)
        self._cases[task.key] = (future, time.monotonic())

    def events(self, timeout: float) -> list[PoolEvent]:
        """Return the events since the last call; wait at most ``timeout`` seconds for the first event.

        Raises:
            EnvironmentProblemError: a worker cannot segment any case.
        """
        deadline = time.monotonic() + timeout
        while not (ended := [key for key, (future, _) in self._cases.items() if future.done()]):
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_SECONDS)
        events = [self._ended(key, self._cases[key][0]) for key in ended]
        for key in ended:
            del self._cases[key]
        late = [key for key, (_, started) in self._cases.items() if time.monotonic() - started > self._limit]
        return events + [self._late(key) for key in late]

    def close(self, *, now: bool = False) -> list[str]:  # noqa: ARG002 - never waits for running cases
        """Disconnect from the workers; return the keys of the cases that did not end."""
        lost = list(self._cases)
        for future, _ in self._cases.values():
            future.cancel()
        self._cases.clear()
        self._client.close()
        return lost

    def _ended(self, key: str, future: Future[Outcome]) -> PoolEvent:
        from distributed import KilledWorker  # noqa: PLC0415 - Dask is optional

        if future.status == "finished":
            return CaseEnded(key, future.result())
        if future.status != "error":  # "lost" or "cancelled": the scheduler no longer knows the case
            return CaseLost(key, counts=False, cause="the Dask scheduler lost the case")
        error: Any = future.exception()
        if isinstance(error, KilledWorker):
            self._log(f"{key}: every worker that ran this case ended unexpectedly")
            return CaseLost(key, counts=True, cause="every worker that ran the case ended unexpectedly")
        if isinstance(error, FseftEdgeError):
            raise EnvironmentProblemError(f"A Dask worker cannot segment: {error.message}", remedy=error.remedy)
        raise EnvironmentProblemError(
            f"A Dask worker cannot segment: {type(error).__name__}.",
            remedy="Install the same version of fseft-edge on every machine, and read the output of the worker.",
        )

    def _late(self, key: str) -> PoolEvent:
        """Restart the worker whose case exceeded the time limit."""
        future, _ = self._cases.pop(key)
        busy = [worker for worker, keys in self._client.processing().items() if future.key in keys]
        future.cancel(force=True)
        self._client.restart_workers(busy, raise_for_error=False)
        self._log(f"{key} exceeded the time limit: its worker is stopped")
        return CaseLost(key, counts=True, cause=f"it took longer than {self._limit / 60:g} minutes")
