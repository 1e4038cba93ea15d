"""Accepted masks as annotations: what a batch's review adds to a support set."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fseft_edge.masks.result import organ_labels
from fseft_edge.outbox.content_key import content_key
from fseft_edge.outbox.records import CaseRecord, Decision
from fseft_edge.outbox.sources import check_source
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.runtime.errors import InputError, UsageError
from fseft_edge.runtime.scans.nifti import cases_by_name, read_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.volume import LabelMap

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReviewedBatch:
    """A batch whose accepted masks are to be learned from.

    Attributes:
        outbox: its results.
        state: its state where that does not lie in the outbox.
        corrected: folder of masks ``<key>.nii.gz`` that take the place of the batch's own, with the same label values.
    """

    outbox: Path
    state: Path | None = None
    corrected: Path | None = None


def accepted_annotations(
    batch: ReviewedBatch, organs: Sequence[OrganLabel], by_hand: Iterable[Path] = ()
) -> list[tuple[Path, LabelMap]]:
    """Return the CT and the mask of every accepted case, the mask's organs under the label values of ``organs``.

    A batch numbers its organs anew, so they are matched by name: ``<key>.json`` says which label of the mask is which
    organ. Organs that are not asked for become background; one that a mask does not hold counts as not annotated there.

    Args:
        batch: the batch.
        organs: what to take, and the label value that it gets.
        by_hand: CTs that somebody annotated; they are not taken a second time with the batch's mask.

    Raises:
        UsageError: there is no batch, or no mask in it was accepted.
        InputError: a corrected mask is of no case of the batch, or a scan has changed since its mask was made.
        LabelError: a JSON does not say which label is which organ.
    """
    with BatchStore(state_path(batch.outbox, batch.state)) as store:
        cases = store.cases()
    accepted = [case for case in cases if case.review is not None and case.review.decision == Decision.ACCEPTED]
    if not accepted:
        raise UsageError(
            f"No mask in {batch.outbox} was accepted.", remedy=f"Look through them: fseft-edge review {batch.outbox}"
        )
    corrected = _corrected(batch, cases, accepted)
    known = {content_key(image) for image in by_hand}
    taken = []
    for case in accepted:
        if case.key in known:
            _LOG.warning("%s has an annotation in --labels too: its reviewed mask is left out", case.key)
            continue
        check_source(case)
        own = batch.outbox / case.key / f"{case.key}.nii.gz"
        values = organ_labels(own.with_name(f"{case.key}.json"))
        mask = read_label_map(corrected.get(case.key, own))
        taken.append((case.source, _renumbered(mask, values, organs)))
    return taken


def _corrected(batch: ReviewedBatch, cases: Sequence[CaseRecord], accepted: Sequence[CaseRecord]) -> Mapping[str, Path]:
    if batch.corrected is None:
        return {}
    corrected = cases_by_name(batch.corrected)
    unknown = sorted(corrected.keys() - {case.key for case in cases})
    if unknown:
        raise InputError(
            f"{batch.corrected} holds {', '.join(unknown)}, which are no cases of {batch.outbox}.",
            remedy="Name a corrected mask by its case's key: <key>.nii.gz.",
        )
    unused = sorted(corrected.keys() - {case.key for case in accepted})
    if unused:
        _LOG.warning("%s: corrected but not accepted, left out", ", ".join(unused))
    return corrected


def _renumbered(mask: LabelMap, values: Mapping[str, int], organs: Sequence[OrganLabel]) -> LabelMap:
    """Return the mask with each organ under the label value that it is asked for by."""
    highest = max((organ.label for organ in organs), default=0)
    table = np.zeros(int(mask.array.max()) + 1, dtype=np.min_scalar_type(highest))
    for organ in organs:
        value = values.get(organ.name, 0)
        if 0 < value < table.size:
            table[value] = organ.label
    return LabelMap(table[mask.array], mask.affine, source=mask.source)
