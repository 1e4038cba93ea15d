"""What is known of a case of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fseft_edge.masks.result import SegmentedOrgan


class CaseState(StrEnum):
    """Where a case stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"  # refused for a reason that lies in the scan; the same again would fail again
    SET_ASIDE = "set_aside"  # crashed its worker, or took too long, as often as a case may
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more will be done unless somebody asks for it."""
        return self not in (CaseState.WAITING, CaseState.RUNNING)


class Decision(StrEnum):
    """What a person made of a mask."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"


@dataclass(frozen=True)
class StageSeconds:
    """Wall time of a case's stages, seconds: reading, encoding, and the rest (adapters, way back, writing)."""

    read: float
    encode: float
    finish: float

    @property
    def total(self) -> float:
        """Of all stages."""
        return self.read + self.encode + self.finish


@dataclass(frozen=True)
class Outcome:
    """How a case ended: done with its organs, or with a problem."""

    state: CaseState
    organs: tuple[SegmentedOrgan, ...] = ()
    seconds: StageSeconds | None = None
    problem: str = ""
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Review:
    """A person's decision on a mask, with a note in their own words; ``at`` is in seconds since the epoch."""

    decision: Decision
    note: str
    at: float


@dataclass(frozen=True)
class CaseRecord:
    """One case.

    Attributes:
        key: its pseudonym, ``case-`` and 12 digits of the sha256 of the files' content; also the name of its results.
        source: the file or folder in the inbox. Its name may be a patient's.
        state: where it stands.
        attempts: how often it crashed its worker or took too long, alone in it.
        found_at, started_at, finished_at: seconds since the epoch.
        problem: of a case that failed or was set aside: the kind of error, by the name of its class.
        reason: the sentence that says what is wrong; names the case by its key alone.
        remedy: what can be done about it.
        organs: of a case that is done, as ``segment`` returns them.
        seconds: of a case that is done.
        review: where somebody looked at it.
    """

    key: str
    source: Path
    state: CaseState
    attempts: int
    found_at: float
    started_at: float | None
    finished_at: float | None
    problem: str
    reason: str
    remedy: str
    organs: tuple[SegmentedOrgan, ...]
    seconds: StageSeconds | None
    review: Review | None

    @property
    def source_name(self) -> str:
        """The source's name as it can be shown: what is no text, or would break a line, is replaced."""
        return printable(self.source.name)


@dataclass(frozen=True)
class Duplicate:
    """A file or folder of the inbox that holds what another one held before it; it is not done twice."""

    source: Path
    key: str


def printable(name: str) -> str:
    """Return the name of a file as it can be shown and written: what is no text, or would break a line, is replaced."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
