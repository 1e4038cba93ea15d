"""Masks of a batch that were corrected in another program, as corrections in the outbox."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fseft_edge.outbox.corrections import SavedCorrection, import_correction
from fseft_edge.outbox.records import CaseRecord, Origin
from fseft_edge.outbox.result_files import read_mask
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.review.reviewer import reviewer_name
from fseft_edge.runtime.errors import FseftEdgeError, InputError, LabelError, UsageError
from fseft_edge.runtime.scans.annotation_files import names_structures, organs_of_structures, structures_of
from fseft_edge.runtime.scans.dicom.annotation_objects import AnnotationObject
from fseft_edge.runtime.scans.image_files import read_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.sources import find_scan
from fseft_edge.runtime.scans.structure_names import names_in
from fseft_edge.runtime.scans.structures import Lattice, StructureFile
from fseft_edge.runtime.scans.volume import LabelMap

_LOG = logging.getLogger(__name__)


def import_corrections(
    outbox: Path,
    files: Sequence[Path],
    *,
    case: str | None = None,
    state: Path | None = None,
    reviewer: str | None = None,
) -> dict[str, SavedCorrection]:
    """Make masks that another program wrote the corrections of their cases.

    All files are read and matched before the first is saved.

    Args:
        outbox: outbox of the batch.
        files: label maps with the label values of the masks of the batch, on their lattices; or segmentations of 3D
            Slicer, RT Structure Sets or DICOM Segmentations that name the organs of the masks.
        case: key of the case, for a single file; None means that the name of each file begins with the key of its case,
            up to the first dot.
        state: state file of the batch; None means the state file in the outbox.
        reviewer: name of the person who corrected the masks; None means the user name of this account.

    Returns:
        The correction of each case.

    Raises:
        UsageError: there is no batch, a file belongs to no case or two files to the same, or the case is not done.
        InputError: a file cannot be read, belongs to another CT, has another lattice, or a label value that is no organ
            of its case.
        OutOfSpaceError: the disk is full or not writable.
    """
    name = reviewer_name(reviewer)
    if case is not None and len(files) != 1:
        raise UsageError("--case can only be used with one file.", remedy="Name each file after the key of its case.")
    with BatchStore(state_path(outbox, state)) as store:
        by_key: dict[str, Path] = {}
        for file in files:
            key = case or file.name.partition(".")[0]  # no key contains a dot
            store.reviewable(key)
            if key in by_key:
                raise UsageError(
                    f"{by_key[key]} and {file} are both corrections of {key}.", remedy="Give one file for each case."
                )
            by_key[key] = file
        masks = {key: _read(outbox, store.case(key), file) for key, file in by_key.items()}
        saved = {}
        for key, labels in masks.items():
            saved[key] = import_correction(outbox, store, key, labels, reviewer=name, origin=Origin.FILE)
            for problem in saved[key].problems:
                _LOG.warning("%s: %s", key, problem)
    return saved


def _read(outbox: Path, case: CaseRecord, file: Path) -> LabelMap:
    """Return a corrected mask with the label values of the mask of the batch."""
    if not names_structures(file):
        return read_label_map(file)
    draft = read_mask(outbox, case.key)
    organs = [OrganLabel(organ.name, organ.label, (organ.name,)) for organ in case.organs]
    structures = structures_of(file, interpolate=False)
    frame = _check_belongs(structures, case, file)
    lattice = Lattice(draft.shape, draft.affine)
    found = organs_of_structures(structures, organs, lattice, case.key, frame_of_reference=frame)
    unused = [
        name
        for name, one in zip(names_in(structures), structures.structures, strict=True)
        if not one.is_empty and not any(organ.is_named(one.name) for organ in organs)
    ]
    if unused:
        _LOG.warning("%s: structures that are no organ of the mask are left out: %s", case.key, ", ".join(unused))
    # A structure set of this toolkit leaves out organs with an empty mask.
    if absent := [organ.name for organ in organs if organ.label not in found.of_label and draft.contains(organ.label)]:
        raise LabelError(
            f"{file} contains no structure of {', '.join(absent)}, which the mask of {case.key} contains.",
            remedy="Give the structures the names of the organs. To remove an organ, give a label map without it.",
        )
    values = [organ.label for organ in organs]
    overlapping = sum(found.mask(value).astype(np.uint16) for value in values) > 1
    if overlap := int(np.count_nonzero(overlapping)):
        _LOG.warning(
            "%s: voxels that belong to several structures: %d; each of them gets the last of these organs",
            case.key,
            overlap,
        )
    return found.label_map(values)


def _check_belongs(structures: StructureFile, case: CaseRecord, file: Path) -> str:
    """Raise InputError if an annotation in DICOM refers to another CT; return the frame of reference of the CT."""
    if not isinstance(structures, AnnotationObject):
        return ""
    if structures.approval == "REJECTED":
        _LOG.warning("%s: the annotation in %s is rejected (ApprovalStatus)", case.key, file)
    try:
        series = find_scan(case.source).series
    except FseftEdgeError:  # the scan was moved or deleted
        series = None
    if series is None:
        _LOG.warning("%s: it cannot be checked whether %s was drawn on the CT of this case", case.key, file)
        return ""
    images = {slice_.sop_instance_uid for slice_ in series.slices}
    if structures.images and not structures.images & images:
        raise InputError(
            f"{file} refers to images of another CT than that of {case.key}.",
            remedy="Give the corrected annotation of this case.",
        )
    return series.frame_of_reference_uid
