"""Accepted masks of a reviewed batch as annotations for a support set."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fseft_edge.masks.result import organ_labels
from fseft_edge.outbox.content_key import content_key
from fseft_edge.outbox.records import CaseRecord, Decision
from fseft_edge.outbox.result_files import MASK_SUFFIX, mask_suffix
from fseft_edge.outbox.sources import check_source
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.runtime.encoder.bundle import sha256_of_file
from fseft_edge.runtime.errors import InputError, UsageError
from fseft_edge.runtime.scans.nifti import cases_by_name, read_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.volume import LabelMap

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReviewedBatch:
    """A batch whose accepted masks are used as annotations.

    Attributes:
        outbox: outbox of the batch.
        state: state file of the batch; None means the state file in the outbox.
        corrected: folder of corrected mask files ``<key>.nii.gz``, which replace the masks in the outbox. They have the
            same label values as the masks of the batch, and were accepted in a review that displayed them. None means
            that there is no such folder.
    """

    outbox: Path
    state: Path | None = None
    corrected: Path | None = None


def accepted_annotations(
    batch: ReviewedBatch, organs: Sequence[OrganLabel], annotated: Iterable[Path] = ()
) -> list[tuple[Path, LabelMap]]:
    """Return the CT file and the mask of every accepted case. Organs in the mask have the label values of ``organs``.

    The mask of a case is the file in the folder of corrected masks if there is one, else the correction in the outbox
    if there is one, else the mask of the batch.

    A batch gives its organs new label values, so organs are matched by name: ``<key>.json`` states the label value of
    each organ in the mask. Voxels of organs that are not in ``organs`` become background. An organ that a mask does not
    contain counts as not annotated in that scan.

    Args:
        batch: the reviewed batch.
        organs: the wanted organs, with the label value that each organ gets.
        annotated: CTs that a person annotated. If such a CT is also a case of the batch, its mask is not used.

    Raises:
        UsageError: there is no batch, or no mask in the batch was accepted.
        InputError: a corrected mask does not belong to any case of the batch, a mask is not the one that was accepted,
            or a scan has changed since its mask was made.
        LabelError: a JSON file does not state the label value of each organ.
    """
    with BatchStore(state_path(batch.outbox, batch.state)) as store:
        cases = store.cases()
    accepted = [case for case in cases if case.review is not None and case.review.decision == Decision.ACCEPTED]
    for case in accepted:
        if case.superseded_by:
            _LOG.warning("%s was accepted, but is superseded by %s: its mask is not used", case.key, case.superseded_by)
    superseded, accepted = accepted, [case for case in accepted if not case.superseded_by]
    if not accepted:
        raise UsageError(
            f"Every accepted mask in {batch.outbox} belongs to a superseded case."
            if superseded
            else f"No mask in {batch.outbox} was accepted.",
            remedy=f"Review the masks with: fseft-edge review {batch.outbox}",
        )
    corrected = corrected_masks(batch.corrected, [case.key for case in cases], batch.outbox)
    unused = sorted(corrected.keys() - {case.key for case in accepted})
    if unused:
        _LOG.warning("%s: the mask was corrected but not accepted, so it is not used", ", ".join(unused))
    annotated_keys = {content_key(image) for image in annotated}
    pairs = []
    for case in accepted:
        if case.key in annotated_keys:
            _LOG.warning("%s also has an annotation in --labels: its mask from the batch is not used", case.key)
            continue
        check_source(case)
        own = batch.outbox / case.key / f"{case.key}{MASK_SUFFIX}"
        present = corrected.get(case.key, own.with_name(f"{case.key}{mask_suffix(batch.outbox, case.key)}"))
        values = organ_labels(own.with_name(f"{case.key}.json"), own if present == own else None)
        mask = read_label_map(present)
        _check_accepted(case, batch, corrected.get(case.key), present)
        pairs.append((case.source, _renumbered(mask, values, organs)))
    return pairs


def corrected_masks(folder: Path | None, keys: Iterable[str], outbox: Path) -> Mapping[str, Path]:
    """Return the corrected mask file of each case that has one.

    Args:
        folder: folder of corrected mask files ``<key>.nii.gz``; None means that there are none.
        keys: keys of the cases of the batch.
        outbox: outbox of the batch, for messages.

    Raises:
        InputError: a mask file does not belong to any case, or is not compressed.
    """
    if folder is None:
        return {}
    masks = cases_by_name(folder)
    unknown = sorted(masks.keys() - set(keys))
    if unknown:
        raise InputError(
            f"{folder} contains masks for {', '.join(unknown)}, which are not cases of {outbox}.",
            remedy="Name each corrected mask file after the key of its case: <key>.nii.gz.",
        )
    other = [path for path in masks.values() if not path.name.endswith(".nii.gz")]
    if other:
        raise InputError(
            f"{', '.join(map(str, other))}: a corrected mask must have a name that ends in .nii.gz.",
            remedy="Save each corrected mask as a compressed NIfTI file: <key>.nii.gz.",
        )
    return masks


def _check_accepted(case: CaseRecord, batch: ReviewedBatch, corrected: Path | None, present: Path) -> None:
    """Raise InputError if a mask is not the one that the reviewer accepted."""
    accepted = case.review
    assert accepted is not None  # noqa: S101 - narrows the type; the caller gives an accepted case
    if not accepted.mask_sha256:
        _LOG.warning(
            "%s was accepted in a version that did not record which mask was accepted; the present mask is used",
            case.key,
        )
    elif sha256_of_file(present) != accepted.mask_sha256:
        if corrected:
            raise InputError(
                f"The corrected mask of {case.key} is not the mask that was accepted at {accepted.when}.",
                remedy=f"Review the corrected mask with: fseft-edge review {batch.outbox} --corrected "
                f"{corrected.parent}",
            )
        raise InputError(
            f"The mask of {case.key} in {batch.outbox} is not the mask that was accepted at {accepted.when}.",
            remedy="If a corrected mask was accepted, give its folder with --corrected. If not, review the mask again "
            f"with: fseft-edge review {batch.outbox}",
        )


def _renumbered(mask: LabelMap, values: Mapping[str, int], organs: Sequence[OrganLabel]) -> LabelMap:
    """Return the mask with the label value of each organ replaced by its label value in ``organs``."""
    highest = max((organ.label for organ in organs), default=0)
    table = np.zeros(int(mask.array.max()) + 1, dtype=np.min_scalar_type(highest))
    for organ in organs:
        value = values.get(organ.name, 0)
        if 0 < value < table.size:
            table[value] = organ.label
    return LabelMap(table[mask.array], mask.affine, source=mask.source)
