"""Messages of workers, and the events that a worker pool reports to the coordinator."""

from __future__ import annotations

from dataclasses import dataclass

from fseft_edge.outbox.records import Outcome


@dataclass(frozen=True)
class WorkerReady:
    """A worker has opened its encoder. ``backend`` states backend, precision and device."""

    backend: str


@dataclass(frozen=True)
class WorkerFailed:
    """A worker cannot segment any case. The fields are class name, message and remedy of the error."""

    problem: str
    message: str
    remedy: str


@dataclass(frozen=True)
class StageStarted:
    """A stage of a case started."""

    key: str


@dataclass(frozen=True)
class StageEnded:
    """A stage of a case ended without an error."""

    key: str


@dataclass(frozen=True)
class CaseEnded:
    """A case is done or has failed."""

    key: str
    outcome: Outcome


@dataclass(frozen=True)
class CaseLost:
    """The worker of a case ended before the case did.

    Attributes:
        key: key of the case.
        counts: whether this counts as an attempt of the case: it was the only case in the worker, or it exceeded the
            time limit. Otherwise another case may have been the cause.
        cause: what happened to the worker, as a clause for the middle of a sentence.
    """

    key: str
    counts: bool
    cause: str


WorkerMessage = WorkerReady | WorkerFailed | StageStarted | StageEnded | CaseEnded
PoolEvent = CaseEnded | CaseLost
