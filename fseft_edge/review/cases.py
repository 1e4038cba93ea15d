"""The cases of a batch as a reviewer meets them: what needs eyes first, and what was decided."""

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
"""Characters."""

_FAILURES = (CaseState.FAILED, CaseState.SET_ASIDE)


@dataclass(frozen=True)
class ReviewCount:
    """How many of the masks were decided on."""

    decided: int
    masks: int

    def __str__(self) -> str:
        return f"{self.decided} of {self.masks} decided"


class ReviewCases:
    """The cases of one outbox, for several threads.

    Args:
        outbox: the batch's results.
        store: its state.
        show_ids: also give the names of the sources, which may be patients' names.
    """

    def __init__(self, outbox: Path, store: BatchStore, *, show_ids: bool = False) -> None:
        self._outbox = outbox
        self._store = store
        self._show_ids = show_ids
        self._one_at_a_time = threading.Lock()

    def listed(self) -> list[CaseRecord]:
        """Return the cases in the order of :func:`in_review_order`."""
        with self._one_at_a_time:
            return in_review_order(self._store.cases())

    def case(self, key: str) -> CaseRecord:
        """Return one case.

        Raises:
            UsageError: there is none of that key.
        """
        with self._one_at_a_time:
            return self._store.case(key)

    def decide(self, key: str, decision: Decision, note: str) -> None:
        """Note what the reviewer made of a mask.

        Raises:
            UsageError: the note is too long, there is no such case, or it has no mask.
        """
        if len(note) > LONGEST_NOTE:
            raise UsageError(
                f"A note of {len(note)} characters is longer than {LONGEST_NOTE}.", remedy="Write a shorter one."
            )
        with self._one_at_a_time:
            self._store.review(key, decision, note)

    def scan(self, case: CaseRecord) -> Volume:
        """Read the CT that a mask was made of, see :func:`fseft_edge.outbox.sources.read_source`."""
        return read_source(case)

    def result(self, case: CaseRecord, suffix: str) -> BinaryIO:
        """Open a result of a case, see :func:`fseft_edge.outbox.result_files.open_result`."""
        return open_result(self._outbox, case.key, suffix)

    def described(self, case: CaseRecord) -> dict[str, Any]:
        """Return what the page shows of a case, as JSON holds it."""
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
        """Return a text with the source's name replaced by the key, unless names are shown."""
        if self._show_ids:
            return text
        return text.replace(str(case.source), case.key).replace(case.source.name, case.key)


def in_review_order(cases: Sequence[CaseRecord]) -> list[CaseRecord]:
    """Return failures first, then masks with flags, then other masks, then what has not ended; each as found."""

    def rank(case: CaseRecord) -> int:
        if case.state in _FAILURES:
            return 0
        if case.state != CaseState.DONE:
            return 3
        return 1 if any(organ.flags for organ in case.organs) else 2

    return sorted(cases, key=rank)


def review_count(cases: Sequence[CaseRecord]) -> ReviewCount:
    """Return how many of the masks were decided on."""
    masks = [case for case in cases if case.state == CaseState.DONE]
    return ReviewCount(sum(case.review is not None for case in masks), len(masks))
