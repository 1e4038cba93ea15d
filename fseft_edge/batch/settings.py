"""How a batch is run, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from fseft_edge.runtime.errors import UsageError
from fseft_edge.segmentation.segmenter import SegmentationSettings


@dataclass(frozen=True)
class BatchSettings:
    """How a batch is run.

    Attributes:
        inbox: folder that scans arrive in (see :class:`fseft_edge.batch.inbox.Inbox`).
        outbox: folder of the results; made if need be.
        segmentation: with what scans are segmented.
        state: the state file, where it shall not lie in the outbox.
        watch: go on looking for scans when all are done.
        until: begin no case after this moment.
        workers: worker processes; None: as many as are useful on this machine.
        limit_minutes: how long a case may be worked on.
        attempts: how often a case may crash its worker, or take too long, before it is set aside.
        settle: seconds for which a scan's files must not have changed.
        pipeline: read the next case and finish the last while one is encoded.
        show_ids: name the files of the inbox in the report, which may be patients' names.
        scheduler: address of a Dask scheduler whose workers do the cases, instead of processes on this machine.
    """

    inbox: Path
    outbox: Path
    segmentation: SegmentationSettings
    state: Path | None = None
    watch: bool = False
    until: datetime | None = None
    workers: int | None = None
    limit_minutes: float = 60.0
    attempts: int = 2
    settle: float = 10.0
    pipeline: bool = True
    scheduler: str | None = None
    show_ids: bool = False

    def absolute(self, encoder: Path) -> BatchSettings:
        """Return the same with absolute paths, which mean the same to workers, and to a run from another folder."""
        return replace(
            self,
            inbox=self.inbox.absolute(),
            outbox=self.outbox.absolute(),
            state=self.state and self.state.absolute(),
            segmentation=self.segmentation.absolute(encoder),
        )


@dataclass(frozen=True)
class BatchSummary:
    """What a run did: cases that it ended, by how, and what still waits."""

    done: int
    failed: int
    waiting: int


@dataclass
class StopRequest:
    """Whether somebody wants the run to end: after the cases in hand, or now. Set from a signal handler."""

    times: int = 0

    @property
    def soon(self) -> bool:
        """No case is begun any more."""
        return self.times > 0

    @property
    def now(self) -> bool:
        """Cases in hand are dropped; they wait again."""
        return self.times > 1


def parse_until(text: str, now: datetime) -> datetime:
    """Return the next moment at which a clock shows ``HH:MM``.

    Raises:
        UsageError: it is no time of day.
    """
    try:
        at = datetime.strptime(text, "%H:%M").time()
    except ValueError:
        raise UsageError(f"{text} is no time of day.", remedy="Write it as HH:MM, e.g. 06:30.") from None
    # Without an offset, so that a night in which the clocks change ends when they show it.
    day = now.replace(tzinfo=None)
    moment = datetime.combine(day, at)
    return (moment if moment > day else moment + timedelta(days=1)).astimezone()


def parse_workers(text: str) -> int | None:
    """Return a number of worker processes, or None for ``auto``.

    Raises:
        UsageError: it is neither.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise UsageError(f"{text} is no number of workers.", remedy="Give auto, or a number from 1.")
    return int(text)
