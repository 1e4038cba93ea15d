"""What workers tell the coordinator."""

from __future__ import annotations

from dataclasses import dataclass

from fseft_edge.outbox.records import Outcome


@dataclass(frozen=True)
class Ready:
    """A worker has its encoder open; ``how`` says with what it computes."""

    how: str


@dataclass(frozen=True)
class Broken:
    """A worker cannot work at all; the error, as its parts."""

    problem: str
    message: str
    remedy: str


@dataclass(frozen=True)
class StageBegun:
    """A case entered a stage."""

    key: str


@dataclass(frozen=True)
class StageEnded:
    """A case left a stage."""

    key: str


@dataclass(frozen=True)
class Ended:
    """A case came to an end by itself."""

    key: str
    outcome: Outcome


@dataclass(frozen=True)
class Lost:
    """A case's worker is gone.

    Attributes:
        key: the case.
        blamed: it was alone in the worker, or took too long; else another may have been the cause.
        cause: what happened to the worker, a clause.
    """

    key: str
    blamed: bool
    cause: str


WorkerMessage = Ready | Broken | StageBegun | StageEnded | Ended
PoolEvent = Ended | Lost
