"""Statistics of a batch: numbers of cases by outcome, times, and the encoder and adapters that were used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fseft_edge.outbox.records import CaseRecord, CaseState
from fseft_edge.runtime.system.json_text import parse_json


@dataclass(frozen=True)
class ReportedCase:
    """A case with its result files, for the report.

    Attributes:
        record: record of the case in the state file.
        picture: path of the preview picture, which may not exist.
        description: content of ``<key>.json``; empty if the file is missing or damaged.
        complaints: sentences about missing or damaged result files of a case that is done.
    """

    record: CaseRecord
    picture: Path
    description: dict[str, Any]
    complaints: tuple[str, ...]

    @property
    def encoded(self) -> str:
        """What was encoded of the scan, for an encoder with windows: ``12 of 80 windows (located)``; else empty."""
        entry = self.description.get("encoded")
        if not isinstance(entry, dict):
            return ""
        return f"{entry.get('windows')} of {entry.get('of')} windows ({entry.get('why')})"

    @property
    def failed(self) -> bool:
        """Whether the case failed or was set aside, so that a person has to look at the reason."""
        return self.record.state in (CaseState.FAILED, CaseState.SET_ASIDE)

    @property
    def done(self) -> bool:
        """Whether the case is done, so that there should be a mask."""
        return self.record.state == CaseState.DONE

    @property
    def warned(self) -> bool:
        """Whether the case is done with warnings about its scan."""
        return self.done and bool(self.record.warnings)

    @property
    def superseded(self) -> bool:
        """Whether another case takes the place of this case."""
        return self.record.state == CaseState.SUPERSEDED

    @property
    def flagged(self) -> bool:
        """Whether a person should check the mask: it has warnings or flags, or result files are missing or damaged."""
        return self.warned or (self.done and bool(self.complaints or any(organ.flags for organ in self.record.organs)))


@dataclass(frozen=True)
class BatchStatistics:
    """Statistics of a batch.

    Attributes:
        found: number of all cases.
        done: number of cases that have a mask.
        flagged: number of cases whose mask a person should check.
        warned: number of cases that are done with warnings about their scan; all of them are flagged.
        superseded: number of cases whose place another case has taken.
        failed: number of cases that failed because of the scan itself.
        set_aside: number of cases that crashed their worker or exceeded the time limit in all allowed attempts.
        waiting: number of cases that have not ended, including the running ones.
        cancelled: number of cases that a person cancelled.
        duplicates: number of files or folders with the same content as one found earlier.
        began: start of the first case, in seconds since the epoch; None if no case was started.
        ended: end of the last case, in seconds since the epoch; None if no case has ended.
        busy_seconds: time in which at least one case was running; waiting for new scans does not count.
        organs: names of the segmented organs, in the order of the adapters.
        made_with: lines that state encoder, adapters and version, one line for each combination in use.
    """

    found: int
    done: int
    flagged: int
    warned: int
    superseded: int
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
        """Number of cases done per hour of ``busy_seconds``; None if no case is done."""
        return 3600 * self.done / self.busy_seconds if self.done and self.busy_seconds else None


def reported(outbox: Path, record: CaseRecord) -> ReportedCase:
    """Return a case with its result files. Missing or damaged files become complaints and raise no error."""
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
    found = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return found


def statistics_of(cases: Sequence[ReportedCase], duplicates: int) -> BatchStatistics:
    """Return the statistics of a batch."""
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
        warned=sum(case.warned for case in cases),
        superseded=states[CaseState.SUPERSEDED],
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
    """Return encoder, adapters and version from ``<key>.json`` as one line; empty if an entry is missing."""
    try:
        encoder = f"encoder {description['encoder']['name']} ({description['encoder']['id'][:12]})"
        adapters = "; ".join(
            f"adapter {(file['sha256'] or 'unsaved')[:12]} for {', '.join(file['organs'])}"
            for file in description["adapters"]
        )
        return f"{encoder}; {adapters}; fseft-edge {description['toolkit_version']}"
    except (KeyError, TypeError, AttributeError):
        return ""
