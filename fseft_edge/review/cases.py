"""The cases of a batch for a reviewer: their order, their description, their files and the decisions."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fseft_edge.outbox.records import CaseRecord, CaseState, Decision
from fseft_edge.outbox.result_files import open_result
from fseft_edge.outbox.sources import read_source
from fseft_edge.outbox.store import BatchStore
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.volume import Volume

LONGEST_NOTE = 2000
"""Largest number of characters in a note."""

_FAILURES = (CaseState.FAILED, CaseState.SET_ASIDE)


@dataclass(frozen=True)
class ReviewCount:
    """Number of reviewed masks, and number of all masks."""

    decided: int
    masks: int

    def __str__(self) -> str:
        return f"{self.decided} of {self.masks} decided"


class ReviewCases:
    """The cases of one outbox. Several threads may use it at the same time.

    Args:
        outbox: outbox of the batch.
        store: state of the batch.
        show_ids: also show the file names of the scans, which may contain patients' names.
    """

    def __init__(self, outbox: Path, store: BatchStore, *, show_ids: bool = False) -> None:
        self._outbox = outbox
        self._store = store
        self._show_ids = show_ids
        self._lock = threading.Lock()

    def listed(self) -> list[CaseRecord]:
        """Return the cases in the order of :func:`in_review_order`."""
        with self._lock:
            return in_review_order(self._store.cases())

    def case(self, key: str) -> CaseRecord:
        """Return the case with this key.

        Raises:
            UsageError: there is no case with this key.
        """
        with self._lock:
            return self._store.case(key)

    def decide(self, key: str, decision: Decision, note: str) -> None:
        """Record the decision of the reviewer on a mask.

        Raises:
            UsageError: the note is too long, there is no case with this key, or the case has no mask.
        """
        if len(note) > LONGEST_NOTE:
            raise UsageError(
                f"The note has {len(note)} characters, but at most {LONGEST_NOTE} are allowed.",
                remedy="Write a shorter note.",
            )
        with self._lock:
            self._store.review(key, decision, note)

    def scan(self, case: CaseRecord) -> Volume:
        """Read the CT from which a mask was made (see :func:`fseft_edge.outbox.sources.read_source`)."""
        return read_source(case)

    def result(self, case: CaseRecord, suffix: str) -> BinaryIO:
        """Open a result file of a case (see :func:`fseft_edge.outbox.result_files.open_result`)."""
        return open_result(self._outbox, case.key, suffix)

    def description(self, case: CaseRecord) -> dict[str, Any]:
        """Return the data of a case that the page shows, ready for JSON."""
        return {
            "key": case.key,
            "name": case.source_name if self._show_ids else None,
            "state": case.state,
            "problem": case.problem,
            "reason": self.without_name(case.reason, case),
            "remedy": self.without_name(case.remedy, case),
            "organs": [asdict(organ) for organ in case.organs],
            "review": asdict(case.review) if case.review else None,
        }

    def without_name(self, text: str, case: CaseRecord) -> str:
        """Return a text in which the name of the source is replaced by the key, unless names are shown."""
        if self._show_ids:
            return text
        return text.replace(str(case.source), case.key).replace(case.source.name, case.key)


def in_review_order(cases: Sequence[CaseRecord]) -> list[CaseRecord]:
    """Return the cases in this order: failures, masks with flags, other masks, cases that have not ended."""

    def rank(case: CaseRecord) -> int:
        if case.state in _FAILURES:
            return 0
        if case.state != CaseState.DONE:
            return 3
        return 1 if any(organ.flags for organ in case.organs) else 2

    return sorted(cases, key=rank)


def review_count(cases: Sequence[CaseRecord]) -> ReviewCount:
    """Return the number of reviewed masks and of all masks."""
    masks = [case for case in cases if case.state == CaseState.DONE]
    return ReviewCount(sum(case.review is not None for case in masks), len(masks))
