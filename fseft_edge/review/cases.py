"""The cases of a batch for a reviewer: their order, their description, their files and the decisions."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from fseft_edge.outbox.content_key import open_regular_file
from fseft_edge.outbox.records import CaseRecord, CaseState, Decision
from fseft_edge.outbox.result_files import MASK_SUFFIX, open_result
from fseft_edge.outbox.sources import read_source
from fseft_edge.outbox.store import BatchStore
from fseft_edge.runtime.errors import InputError, UnreadableFileError, UsageError
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
        reviewer: name of the person who decides.
        corrected: folder of corrected masks ``<key>.nii.gz``; None means that there are none.
        show_ids: also show the file names of the scans, which may contain patients' names.
    """

    def __init__(
        self, outbox: Path, store: BatchStore, *, reviewer: str, corrected: Path | None = None, show_ids: bool = False
    ) -> None:
        self.reviewer = reviewer
        self._outbox = outbox
        self._store = store
        self._corrected = corrected
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

    def decide(self, case: CaseRecord, decision: Decision, note: str, mask_sha256: str) -> None:
        """Record the decision of the reviewer on a mask.

        Args:
            case: the case.
            decision: the decision.
            note: free text of the reviewer.
            mask_sha256: sha256 of the mask that was displayed, as hexadecimal digits.

        Raises:
            UsageError: the note is too long, or the case has no mask.
            InputError: the mask is not the one that was displayed.
        """
        if len(note) > LONGEST_NOTE:
            raise UsageError(
                f"The note has {len(note)} characters, but at most {LONGEST_NOTE} are allowed.",
                remedy="Write a shorter note.",
            )
        if case.state == CaseState.DONE:
            mask, present = self.mask(case)
            mask.close()
            if present != mask_sha256:
                raise InputError(
                    f"The mask of {case.key} has changed since it was displayed.",
                    remedy="Select the case again, and look at the changed mask.",
                )
        with self._lock:
            self._store.review(case.key, decision, note, reviewer=self.reviewer, mask_sha256=mask_sha256)

    def scan(self, case: CaseRecord) -> Volume:
        """Read the CT from which a mask was made (see :func:`fseft_edge.outbox.sources.read_source`)."""
        return read_source(case)

    def mask(self, case: CaseRecord) -> tuple[BufferedReader, str]:
        """Open the mask of a case, the corrected one if there is one; return also its sha256 as hexadecimal digits.

        Raises:
            UnreadableFileError: the mask cannot be read.
            InputError: the mask of the batch was changed after the batch wrote it.
        """
        corrected = self._corrected_mask(case)
        if corrected is None:
            mask = open_result(self._outbox, case.key, MASK_SUFFIX)
        else:
            try:
                mask = open_regular_file(corrected)
            except OSError as error:
                raise UnreadableFileError(
                    f"The corrected mask of {case.key} cannot be read: {error.strerror}.",
                    remedy="Check its permissions, or save it again.",
                ) from error
        sha256 = hashlib.file_digest(mask, "sha256").hexdigest()
        mask.seek(0)
        return mask, sha256

    def picture(self, case: CaseRecord) -> BufferedReader:
        """Open the picture that the batch made of its mask.

        Raises:
            UnreadableFileError: the picture cannot be read.
            InputError: the mask was corrected or changed after the picture was made.
        """
        if self._corrected_mask(case):
            raise InputError(
                f"The picture of {case.key} does not show the corrected mask.",
                remedy="Use a browser with WebGL2, which displays the corrected mask.",
            )
        open_result(self._outbox, case.key, MASK_SUFFIX).close()
        return open_result(self._outbox, case.key, ".png")

    def _corrected_mask(self, case: CaseRecord) -> Path | None:
        """Return the path of the corrected mask of a case; None if there is none."""
        path = self._corrected / f"{case.key}.nii.gz" if self._corrected else None
        return path if path and path.exists() else None

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
            "warnings": [self.without_name(warning, case) for warning in case.warnings],
            "superseded_by": case.superseded_by,
            "corrected": self._corrected_mask(case) is not None,
            "decisions": [asdict(review) | {"at": review.when} for review in case.decisions],
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
