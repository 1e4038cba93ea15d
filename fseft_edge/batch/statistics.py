"""What a batch amounts to: how many cases ended how, in what time, made with what."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fseft_edge.outbox.records import CaseRecord, CaseState


@dataclass(frozen=True)
class ReportedCase:
    """A case with what lies in the outbox of it.

    Attributes:
        record: what the state says.
        picture: the preview, whether it is there or not.
        description: what ``<key>.json`` says; empty where there is none that can be read.
        complaints: of a case that is done, what is missing of its results or unreadable.
    """

    record: CaseRecord
    picture: Path
    description: dict[str, Any]
    complaints: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether there is no mask, and somebody has to see to it."""
        return self.record.state in (CaseState.FAILED, CaseState.SET_ASIDE)

    @property
    def done(self) -> bool:
        """Whether there should be a mask."""
        return self.record.state == CaseState.DONE

    @property
    def flagged(self) -> bool:
        """Whether somebody should look at its mask."""
        return self.done and bool(self.complaints or any(organ.flags for organ in self.record.organs))


@dataclass(frozen=True)
class BatchStatistics:
    """A batch in figures.

    Attributes:
        found: cases, whatever became of them.
        done: that have a mask.
        flagged: of these, those to look at.
        failed: for a reason that lies in the scan.
        set_aside: that crashed their worker or took too long, as often as a case may.
        waiting: that are still to be done, those begun included.
        cancelled: taken out by somebody.
        duplicates: files or folders that hold what another one held before.
        began: when the first case was begun, seconds since the epoch; None where none was.
        ended: when the last one ended; None where none has.
        busy_seconds: during which at least one case was at work; waiting for new scans does not count.
        organs: that the adapters segment, in their order.
        made_with: encoder, adapters and version, one line for each combination.
    """

    found: int
    done: int
    flagged: int
    failed: int
    set_aside: int
    waiting: int
    cancelled: int
    duplicates: int
    began: float | None
    ended: float | None
    busy_seconds: float
    organs: tuple[str, ...]
    made_with: tuple[str, ...]

    @property
    def cases_per_hour(self) -> float | None:
        """Cases that were done in an hour of work; None before the first."""
        return 3600 * self.done / self.busy_seconds if self.done and self.busy_seconds else None


def reported(outbox: Path, record: CaseRecord) -> ReportedCase:
    """Return a case with what lies in ``outbox/<key>/`` of it; what is missing or damaged there is said, not raised."""
    folder = outbox / record.key
    description: dict[str, Any] = {}
    complaints: list[str] = []
    if record.state == CaseState.DONE:
        if not (folder / f"{record.key}.nii.gz").is_file():
            complaints.append("The mask is missing in the outbox.")
        try:
            description = _read_object(folder / f"{record.key}.json")
        except FileNotFoundError:
            complaints.append("The description (.json) is missing in the outbox.")
        except (OSError, ValueError):
            complaints.append("The description (.json) is damaged.")
    return ReportedCase(record, folder / f"{record.key}.png", description, tuple(complaints))


def _read_object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object")
    return found


def statistics_of(cases: Sequence[ReportedCase], duplicates: int) -> BatchStatistics:
    """Return the figures of a batch."""
    states = Counter(case.record.state for case in cases)
    spans = [
        (case.record.started_at, case.record.finished_at)
        for case in cases
        if case.record.started_at is not None and case.record.finished_at is not None
    ]
    organs = dict.fromkeys(organ.name for case in cases for organ in case.record.organs)
    return BatchStatistics(
        found=len(cases),
        done=states[CaseState.DONE],
        flagged=sum(case.flagged for case in cases),
        failed=states[CaseState.FAILED],
        set_aside=states[CaseState.SET_ASIDE],
        waiting=states[CaseState.WAITING] + states[CaseState.RUNNING],
        cancelled=states[CaseState.CANCELLED],
        duplicates=duplicates,
        began=min((case.record.started_at for case in cases if case.record.started_at is not None), default=None),
        ended=max((end for _, end in spans), default=None),
        busy_seconds=_covered(spans),
        organs=tuple(organs),
        made_with=tuple(dict.fromkeys(line for case in cases if (line := _made_with(case.description)))),
    )


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of time spans."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _made_with(description: dict[str, Any]) -> str:
    """Return encoder, adapters and version as ``<key>.json`` names them; empty where it does not."""
    try:
        encoder = f"encoder {description['encoder']['name']} ({description['encoder']['id'][:12]})"
        adapters = "; ".join(
            f"adapter {(file['sha256'] or 'unsaved')[:12]} for {', '.join(file['organs'])}"
            for file in description["adapters"]
        )
        return f"{encoder}; {adapters}; fseft-edge {description['toolkit_version']}"
    except (KeyError, TypeError, AttributeError):
        return ""
