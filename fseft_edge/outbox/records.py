"""Records of a case of a batch: its state, its outcome, its review, its corrections."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from fseft_edge.masks.result import SegmentedOrgan


class CaseState(StrEnum):
    """State of a case."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"  # the scan itself is the reason, so another attempt would fail again
    SET_ASIDE = "set_aside"  # crashed its worker or exceeded the time limit in all allowed attempts
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"  # the inbox now holds a more complete or changed version of the scan, another case

    @property
    def ended(self) -> bool:
        """Whether the batch does nothing more with the case unless a person requests it."""
        return self not in (CaseState.WAITING, CaseState.RUNNING)


class Decision(StrEnum):
    """Decision of a reviewer on a mask."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"


@dataclass(frozen=True)
class StageSeconds:
    """Wall time of the stages of a case, in seconds: reading; encoding; adapters, resampling and writing."""

    read: float
    encode: float
    finish: float

    @property
    def total(self) -> float:
        """Wall time of all stages together, in seconds."""
        return self.read + self.encode + self.finish


@dataclass(frozen=True)
class Outcome:
    """Outcome of a case: organs, times and warnings if it is done; kind of error, reason and remedy if it is not.

    :class:`CaseRecord` lists the values of ``problem`` and explains ``series``.
    """

    state: CaseState
    organs: tuple[SegmentedOrgan, ...] = ()
    seconds: StageSeconds | None = None
    problem: str = ""
    reason: str = ""
    remedy: str = ""
    warnings: tuple[str, ...] = ()
    series: str = ""


@dataclass(frozen=True)
class Review:
    """Decision of a reviewer on a mask.

    Attributes:
        decision: the decision.
        note: free text of the reviewer.
        at: time of the decision in seconds since the epoch.
        reviewer: name of the person who decided; empty in decisions of versions that did not record it.
        mask_sha256: sha256 of the mask file that was displayed, as hexadecimal digits; empty in decisions of versions
            that did not record it.
    """

    decision: Decision
    note: str
    at: float
    reviewer: str
    mask_sha256: str

    @property
    def when(self) -> str:
        """Time of the decision in ISO 8601, in UTC and with its offset."""
        return _when(self.at)


class Origin(StrEnum):
    """Where a correction was made."""

    PAGE = "page"  # drawn in the review page
    FILE = "file"  # made by another program


@dataclass(frozen=True)
class CorrectedOrgan:
    """One organ of a corrected mask, compared with the mask that the batch made.

    :mod:`fseft_edge.outbox.correction_measures` defines the three measures.

    Attributes:
        name: name of the organ.
        label: label value of the organ.
        volume_ml: volume of the organ in the corrected mask in ml.
        mean_distance_mm: mean surface distance in mm; None if one of the two masks lacks the organ.
        hd95_mm: 95th percentile of the surface distance in mm; None if one of the two masks lacks the organ.
        added_path_mm: added path length in mm.
    """

    name: str
    label: int
    volume_ml: float
    mean_distance_mm: float | None
    hd95_mm: float | None
    added_path_mm: float


@dataclass(frozen=True)
class Correction:
    """A mask that a person corrected.

    Attributes:
        at: time of the correction in seconds since the epoch.
        reviewer: name of the person who corrected the mask.
        origin: where the mask was corrected.
        mask_sha256: sha256 of the corrected mask file, as hexadecimal digits.
        based_on: sha256 of the mask file that was corrected, as hexadecimal digits.
        organs: every organ of the mask, compared with the mask that the batch made.
    """

    at: float
    reviewer: str
    origin: Origin
    mask_sha256: str
    based_on: str
    organs: tuple[CorrectedOrgan, ...]

    @property
    def when(self) -> str:
        """Time of the correction in ISO 8601, in UTC and with its offset."""
        return _when(self.at)


@dataclass(frozen=True)
class CaseRecord:
    """Record of one case in the state file.

    Attributes:
        key: pseudonym of the case, ``case-`` and the first 12 hexadecimal digits of the sha256 of the content of its
            files; also the name of its result folder and result files.
        source: file or folder in the inbox. Its name may contain a patient's name.
        state: state of the case.
        attempts: number of attempts in which the case crashed its worker or exceeded the time limit, without other
            cases in that worker.
        found_at, started_at, finished_at: times in seconds since the epoch.
        problem: class name of the error, if the case failed or was set aside; else empty. Two values are not class
            names: ``Crash``, if the case ended its worker process or exceeded the time limit, and ``Gone``, if its scan
            was changed or removed (:data:`fseft_edge.outbox.store.SOURCE_MISSING`).
        reason: error message, if the case failed or was set aside; else empty. It names the case only by its key.
        remedy: remedy of the error, if the case failed or was set aside; else empty.
        organs: organs as returned by ``segment``, if the case is done; else empty.
        seconds: wall time of each stage, if the case is done; else None.
        decisions: decisions of reviewers, the earliest first.
        corrections: corrections of the mask, the earliest first. The corrected mask in the outbox is the latest one.
        warnings: sentences on what the reader of the scan left out, corrected or assumed, and on what happened to the
            scan in the inbox. A person has to read them before the mask is used.
        superseded_by: key of the case that takes the place of this case; empty if there is none. The mask of a
            superseded case stays in the outbox, but nothing uses it.
        series: sha256 of the SeriesInstanceUID, if the scan is a DICOM series and was read; else empty.
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
    decisions: tuple[Review, ...] = ()
    corrections: tuple[Correction, ...] = ()
    warnings: tuple[str, ...] = ()
    superseded_by: str = ""
    series: str = ""

    @property
    def review(self) -> Review | None:
        """The decision that counts, the latest one; None if there is none."""
        return self.decisions[-1] if self.decisions else None

    def correction(self, mask_sha256: str) -> Correction | None:
        """Return the latest correction that gave this mask file; None if no correction did."""
        return next((one for one in reversed(self.corrections) if one.mask_sha256 == mask_sha256), None)

    def without_name(self, text: str) -> str:
        """Return a text in which the key takes the place of the path and the name of the source."""
        return text.replace(str(self.source), self.key).replace(self.source.name, self.key)

    @property
    def source_name(self) -> str:
        """Name of the source for display, see :func:`printable`."""
        return printable(self.source.name)


@dataclass(frozen=True)
class Duplicate:
    """A file or folder of the inbox with the same content as one found earlier; it is not segmented again."""

    source: Path
    key: str


def printable(name: str) -> str:
    """Return a file name for display. Undecodable bytes, line breaks and control characters are replaced."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
