"""The cases of a batch for a reviewer: their order, their description, their files, corrections and decisions."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fseft_edge.outbox.content_key import open_regular_file
from fseft_edge.outbox.corrections import SavedCorrection, import_correction
from fseft_edge.outbox.records import CaseRecord, CaseState, Decision, Origin
from fseft_edge.outbox.result_files import MASK_SUFFIX, mask_suffix, open_result, read_mask
from fseft_edge.outbox.sources import read_source
from fseft_edge.outbox.store import BatchStore
from fseft_edge.runtime.errors import InputError, LabelError, UnreadableFileError, UsageError
from fseft_edge.runtime.scans.nifti import read_header
from fseft_edge.runtime.scans.volume import Volume

LONGEST_NOTE = 2000
"""Largest number of characters in a note."""

MOST_DRAWN_ORGANS = 255
"""Largest number of organs of a mask that the page can correct: its drawing has 8 bits for each voxel."""

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
        corrected: folder of corrected masks ``<key>.nii.gz``, which are displayed instead of the masks in the outbox;
            None means that there is no such folder.
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

    def lattice(self, key: str) -> tuple[int, int, int]:
        """Return the voxels of the mask that the batch made along x, y and z; only the header is read.

        Raises:
            UsageError: there is no case with this key, or the case is not done.
            InputError: the mask cannot be read.
        """
        with self._lock:
            self._store.reviewable(key)
        with open_result(self._outbox, key, MASK_SUFFIX) as mask:
            x, y, z = read_header(Path(f"/proc/self/fd/{mask.fileno()}")).get_data_shape()[:3]
        return x, y, z

    def correct(self, case: CaseRecord, drawn: NDArray[np.uint8], based_on: str) -> SavedCorrection:
        """Save a mask that the reviewer drew (see :func:`fseft_edge.outbox.corrections.import_correction`).

        Args:
            case: the case.
            drawn: for each voxel of the mask ``[X, Y, Z]`` the number of its organ, from 1 in the order of
                ``case.organs``, or 0.
            based_on: sha256 of the mask on which the reviewer drew, as hexadecimal digits.

        Raises:
            UsageError: the mask of the case cannot be corrected here, see :meth:`no_drawing`.
            LabelError: a number is too large.
            InputError: the mask has changed since it was displayed, or cannot be read.
            OutOfSpaceError: the disk is full or not writable.
        """
        if reason := self.no_drawing(case):
            raise UsageError(reason, remedy="Correct the mask in another program.")
        if int(drawn.max()) > len(case.organs):
            raise LabelError(
                f"The drawing contains the organ number {drawn.max()}, but {case.key} has {len(case.organs)} organs.",
                remedy="Select the case again.",
            )
        labels = np.array([0, *(organ.label for organ in case.organs)], dtype=np.uint32)
        values = labels.astype(np.min_scalar_type(int(labels.max())))[drawn]
        draft = read_mask(self._outbox, case.key)
        with self._lock:
            return import_correction(
                self._outbox,
                self._store,
                case.key,
                replace(draft, array=values),
                reviewer=self.reviewer,
                origin=Origin.PAGE,
                based_on=based_on,
            )

    def no_drawing(self, case: CaseRecord) -> str:
        """Return the reason why the mask of a case cannot be corrected in the page; empty if it can be."""
        if len(case.organs) > MOST_DRAWN_ORGANS:
            return (
                f"{case.key} has {len(case.organs)} organs. The page can correct masks of at most {MOST_DRAWN_ORGANS}."
            )
        if self._given_mask(case):
            return f"The mask of {case.key} comes from --corrected, so the page cannot correct it."
        return ""

    def scan(self, case: CaseRecord) -> Volume:
        """Read the CT from which a mask was made (see :func:`fseft_edge.outbox.sources.read_source`)."""
        return read_source(case)

    def mask(self, case: CaseRecord) -> tuple[BufferedReader, str]:
        """Open the mask of a case; return also its sha256 as hexadecimal digits.

        This is the file in the folder of corrected masks if there is one, else the correction in the outbox if there is
        one, else the mask of the batch.

        Raises:
            UnreadableFileError: the mask cannot be read.
            InputError: the mask of the batch was changed after the batch wrote it.
        """
        corrected = self._given_mask(case)
        if corrected is None:
            mask = open_result(self._outbox, case.key, mask_suffix(self._outbox, case.key))
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
        if self._is_corrected(case):
            raise InputError(
                f"The picture of {case.key} does not show the corrected mask.",
                remedy="Use a browser with WebGL2, which displays the corrected mask.",
            )
        open_result(self._outbox, case.key, MASK_SUFFIX).close()
        return open_result(self._outbox, case.key, ".png")

    def _is_corrected(self, case: CaseRecord) -> bool:
        """Return whether the mask of a case is not that of the batch."""
        return self._given_mask(case) is not None or mask_suffix(self._outbox, case.key) != MASK_SUFFIX

    def _given_mask(self, case: CaseRecord) -> Path | None:
        """Return the path of the mask of a case in the folder of corrected masks; None if there is none."""
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
            "corrected": self._is_corrected(case),
            "no_drawing": self.no_drawing(case),
            "corrections": [asdict(correction) | {"at": correction.when} for correction in case.corrections],
            "decisions": [asdict(review) | {"at": review.when} for review in case.decisions],
        }

    def without_name(self, text: str, case: CaseRecord) -> str:
        """Return a text in which the name of the source is replaced by the key, unless names are shown."""
        if self._show_ids:
            return text
        return case.without_name(text)


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
