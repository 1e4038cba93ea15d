"""Settings, summary and stop request of a batch run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from fseft_edge.runtime.errors import UsageError
from fseft_edge.segmentation.settings import SegmentationSettings


@dataclass(frozen=True)
class BatchSettings:
    """Settings of a batch run.

    Attributes:
        inbox: folder in which scans arrive (see :class:`fseft_edge.batch.inbox.Inbox`).
        outbox: folder of the results; created if it does not exist.
        segmentation: settings of the segmentation.
        state: state file; None means the state file in the outbox.
        watch: when all cases have ended, wait for new scans.
        until: start no case after this moment; None means no limit.
        workers: number of worker processes, which share the memory and the cores in equal parts; None means the number
            that is useful on this machine.
        limit_minutes: time limit of a case in minutes.
        attempts: number of attempts in which a case may crash its worker or exceed the time limit. After the last one,
            the case is set aside.
        settle: a scan is complete when its files have not changed for this many seconds. A series that goes on to
            arrive later becomes another case, which supersedes the first.
        pipeline: overlap stages: while one case is encoded, the next case is read and the previous case is finished.
            With a memory budget, stages never overlap.
        scheduler: address of a Dask scheduler whose workers run the cases; None means worker processes on this machine.
        show_ids: show the file names of the inbox in the report. They may contain patients' names.
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
    settle: float = 60.0
    pipeline: bool = True
    scheduler: str | None = None
    show_ids: bool = False

    def __post_init__(self) -> None:
        """Accept paths that a Python caller gives as text."""
        for name in ("inbox", "outbox"):
            object.__setattr__(self, name, Path(getattr(self, name)))

    def absolute(self, encoder: Path) -> BatchSettings:
        """Return these settings with absolute paths, which are valid in workers and in runs from another folder."""
        return replace(
            self,
            inbox=self.inbox.absolute(),
            outbox=self.outbox.absolute(),
            state=self.state and self.state.absolute(),
            segmentation=self.segmentation.absolute(encoder),
        )


@dataclass(frozen=True)
class BatchSummary:
    """Numbers of cases that this run finished, of cases that failed in it, and of cases that still wait.

    Cases that are superseded by another case do not count.

    ``warned`` is the number of cases that this run finished with warnings about their scan.
    """

    done: int
    failed: int
    waiting: int
    warned: int = 0


@dataclass
class StopRequest:
    """Request to stop the run, after the cases in progress or at once. A signal handler counts up ``times``."""

    times: int = 0

    @property
    def soon(self) -> bool:
        """Whether no further case may be started."""
        return self.times > 0

    @property
    def now(self) -> bool:
        """Whether the cases in progress are stopped and returned to the queue."""
        return self.times > 1


def parse_until(text: str, now: datetime) -> datetime:
    """Return the next moment after ``now`` with this time of day.

    Args:
        text: time of day, ``HH:MM``.
        now: present moment.

    Raises:
        UsageError: the text is not a time of day.
    """
    try:
        at = datetime.strptime(text, "%H:%M").time()
    except ValueError:
        raise UsageError(
            f"{text!r} is not a time of day.", remedy="Give a time of day as HH:MM, for example 06:30."
        ) from None
    # Computed without UTC offset: the local time of day is then right if daylight saving time begins or ends.
    day = now.replace(tzinfo=None)
    moment = datetime.combine(day, at)
    return (moment if moment > day else moment + timedelta(days=1)).astimezone()


def parse_workers(text: str) -> int | None:
    """Return the number of worker processes, or None for ``auto``.

    Raises:
        UsageError: the text is not ``auto`` and not a number from 1.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise UsageError(
            f"{text!r} is not a number of worker processes.", remedy="Give --workers auto, or a number from 1."
        )
    return int(text)
