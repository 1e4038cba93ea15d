"""Corrected masks: a mask that a person corrected becomes a file beside the mask of the batch, which stays as it is."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from filelock import FileLock, Timeout

from fseft_edge.dicom_output import DicomKind, SegmentationAlgorithm, write_dicom_results
from fseft_edge.outbox.correction_measures import corrected_organs
from fseft_edge.outbox.records import CaseRecord, Correction, Origin
from fseft_edge.outbox.result_files import CORRECTED_SUFFIX, MASK_SUFFIX, mask_suffix, open_result, read_mask
from fseft_edge.outbox.sources import check_source
from fseft_edge.outbox.store import BatchStore
from fseft_edge.runtime.encoder.bundle import sha256_of_file
from fseft_edge.runtime.errors import FseftEdgeError, InputError, LabelError, OutOfSpaceError
from fseft_edge.runtime.scans.nifti import write_label_map
from fseft_edge.runtime.scans.sources import find_scan
from fseft_edge.runtime.scans.volume import LabelMap, labels_on
from fseft_edge.runtime.system.atomic import atomic_files
from fseft_edge.runtime.system.json_text import parse_json

_KINDS: Final[tuple[DicomKind, ...]] = ("seg", "rtstruct")
_STEM: Final = CORRECTED_SUFFIX.removesuffix(MASK_SUFFIX)
_PATIENCE_SECONDS: Final = 60.0


class MaskChangedError(InputError):
    """The mask on which a correction is based is no longer the mask of the case: somebody else corrected it."""


@dataclass(frozen=True)
class SavedCorrection:
    """A correction that was saved, with sentences on the DICOM objects that could not be written from it."""

    correction: Correction
    problems: tuple[str, ...]


def import_correction(
    outbox: Path,
    store: BatchStore,
    key: str,
    labels: LabelMap,
    *,
    reviewer: str,
    origin: Origin,
    based_on: str | None = None,
) -> SavedCorrection:
    """Save a corrected mask beside the mask of the batch, and record it in the state.

    ``<key>.corrected.nii.gz`` has the lattice, the axis order and the names of the mask of the batch, bit for bit. If
    the batch wrote DICOM objects of this case, ``<key>.corrected.seg.dcm`` and ``<key>.corrected.rtstruct.dcm`` are
    written from it. The files appear together, after the last one is complete; those of an earlier correction are
    replaced. Only one process at a time corrects masks of a batch. A correction that was saved already, in a process
    that died before it could say so, is recorded again.

    Args:
        outbox: outbox of the batch.
        store: state of the batch.
        key: key of the case.
        labels: the corrected mask with the label values of the mask of the batch, on its lattice, in any axis order.
        reviewer: name of the person who corrected the mask.
        origin: where the mask was corrected.
        based_on: sha256 of the mask that was corrected; None if it is not known, so that any mask is replaced.

    Raises:
        UsageError: there is no case with this key, or the case is not done.
        MaskChangedError: the mask of the case is no longer the one that was corrected.
        GeometryError: the lattices of the masks differ.
        LabelError: a label value belongs to no organ of the case.
        InputError: the mask of the batch cannot be read, or was changed.
        OutOfSpaceError: the disk is full or not writable; the earlier files are unchanged.
    """
    with _one_at_a_time(store):
        case = store.reviewable(key)
        draft = read_mask(outbox, key)
        with open_result(outbox, key, mask_suffix(outbox, key)) as present:
            replaced = hashlib.file_digest(present, "sha256").hexdigest()
        labels = labels_on(draft, labels, words=("mask of the batch", "corrected mask"))
        _check_labels(labels, case)
        compared = corrected_organs(draft, labels, case.organs)
        mask = f"{key}{CORRECTED_SUFFIX}"
        earlier = [f"{key}{_STEM}.{kind}.dcm" for kind in _KINDS]
        with atomic_files(outbox / key, last=mask, outdated=earlier) as folder:
            write_label_map(folder / mask, labels, {organ.label: organ.name for organ in case.organs})
            sha256 = sha256_of_file(folder / mask)
            if based_on is not None and replaced not in (based_on, sha256):
                raise MaskChangedError(_changed_by(case, replaced), remedy="Look at the changed mask, and correct it.")
            problems = _write_dicom(folder, outbox / key / f"{key}.json", case, labels)
        correction = Correction(time.time(), reviewer, origin, sha256, based_on or replaced, compared)
        if not case.corrections or case.corrections[-1].mask_sha256 != sha256:  # else it was saved and recorded already
            store.correct(key, correction)
    return SavedCorrection(correction, problems)


@contextmanager
def _one_at_a_time(store: BatchStore) -> Iterator[None]:
    """Wait until no other process corrects a mask of this batch.

    Raises:
        InputError: another process still works after a minute.
        OutOfSpaceError: the lock file cannot be written.
    """
    lock = FileLock(store.path.with_name(f"{store.path.name}.corrections.lock"))
    try:
        held = lock.acquire(timeout=_PATIENCE_SECONDS)
    except Timeout as error:
        raise InputError(
            "Another program has been saving a corrected mask of this batch for more than a minute.",
            remedy="Try again, or end the other program.",
        ) from error
    except OSError as error:
        raise OutOfSpaceError(
            f"Files cannot be written to {store.path.parent}: {error.strerror}.", remedy="Free some space on that disk."
        ) from error
    with held:
        yield


def _check_labels(labels: LabelMap, case: CaseRecord) -> None:
    known = [0, *(organ.label for organ in case.organs)]
    unknown = np.setdiff1d(np.unique(labels.array), known)
    if unknown.size:
        raise LabelError(
            f"The corrected mask of {case.key} contains the label value {unknown[0]}, which is no organ of this case.",
            remedy="Use the label values of the mask of the batch: "
            + ", ".join(f"{organ.label} {organ.name}" for organ in case.organs)
            + ".",
        )


def _changed_by(case: CaseRecord, replaced: str) -> str:
    """Return the sentence that the mask of a case was changed, with person and time if they are known."""
    by = case.correction(replaced)
    who = f" {by.reviewer} saved another correction at {by.when}." if by else ""
    return f"The mask of {case.key} has changed since it was displayed.{who}"


def _write_dicom(folder: Path, description: Path, case: CaseRecord, labels: LabelMap) -> tuple[str, ...]:
    """Write the DICOM objects of a corrected mask that the batch wrote of its own mask, or would have if it had voxels.

    Args:
        folder: folder of the objects.
        description: JSON file of the mask of the batch.
        case: the case.
        labels: the corrected mask.

    Returns:
        A sentence for each object that could not be written. This is no error, so that the mask is not lost.
    """
    fields = _fields_of(description)
    outputs = fields.get("outputs", ())
    kinds = [kind for kind in _KINDS if kind in outputs or description.with_suffix(f".{kind}.dcm").is_file()]
    problems = [
        f"The DICOM object {kind} was not written from the corrected mask. {reason}"
        for kind in kinds
        if (reason := _reason_without_object(folder, kind, fields, case, labels))
    ]
    return tuple(problems)


def _reason_without_object(
    folder: Path, kind: DicomKind, fields: dict[str, Any], case: CaseRecord, labels: LabelMap
) -> str | None:
    """Write a DICOM object; return the reason if it cannot be written, else None."""
    try:
        check_source(case)
        series = find_scan(case.source).series
        if series is None:  # NIfTI in a batch with --dicom
            return None
        (written,) = write_dicom_results(
            folder,
            f"{case.key}{_STEM}",
            [kind],
            labels=labels,
            organs=case.organs,
            source=series.headers(),
            algorithm=_algorithm(fields),
        )
    except FseftEdgeError as error:
        return case.without_name(str(error))
    except Exception as error:  # its text may contain values of a header
        return f"The reason is a {type(error).__name__}."
    return None if written.path else "The mask is empty."


def _fields_of(description: Path) -> dict[str, Any]:
    """Return the content of the JSON file of a mask; empty if it is damaged."""
    try:
        fields = parse_json(description.read_bytes())
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _algorithm(fields: dict[str, Any]) -> SegmentationAlgorithm:
    """Return the algorithm that made a mask, from its JSON file, as the algorithm of a corrected mask."""
    adapters = {organ: str(adapter["sha256"] or "") for adapter in fields["adapters"] for organ in adapter["organs"]}
    return SegmentationAlgorithm(
        fields["encoder"]["id"],
        adapters,
        transductive=fields["options"]["transduction"] is not None,
        corrected=True,
    )
