"""A finished batch: scans in an inbox, masks in an outbox, and the state file."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray
from PIL import Image

from doubles.encoder import label_of, scan
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.content_key import content_key
from fseft_edge.outbox.records import CaseState, Decision
from fseft_edge.outbox.store import BatchStore, Outcome, StageSeconds, state_path
from fseft_edge.runtime.encoder.bundle import sha256_of_file
from fseft_edge.runtime.scans.nifti import write_ct, write_label_map
from fseft_edge.runtime.scans.volume import LabelMap, Volume

PATIENT = "Mustermann_Erika"
"""Part of the file name of every scan."""


@dataclass(frozen=True)
class Batch:
    """A finished batch, with the keys of its cases in the order in which they were found."""

    root: Path
    keys: list[str]

    @property
    def outbox(self) -> Path:
        return self.root / "outbox"

    def mask(self, key: str, suffix: str = ".nii.gz") -> Path:
        return self.outbox / key / f"{key}{suffix}"

    def store(self) -> BatchStore:
        return BatchStore(state_path(self.outbox))

    def source(self, key: str) -> Path:
        with self.store() as store:
            return store.case(key).source

    def decide(self, key: str, decision: Decision, note: str = "", *, mask: Path | None = None) -> None:
        """Record a decision on the mask of the batch, or on a corrected mask."""
        sha256 = sha256_of_file(mask or self.mask(key))
        with self.store() as store:
            store.review(key, decision, note, reviewer="Ada Lovelace", mask_sha256=sha256)


def run_batch(
    root: Path,
    seeds: tuple[int, ...] = (1, 2),
    *,
    organs: tuple[str, ...] = ("spleen", "liver"),
    flagged: int = 1,
    axes: str = "RAS",
) -> Batch:
    """Write the files of a batch of phantoms whose masks are exact; label values are 1..K in the order of ``organs``.

    Args:
        root: folder of inbox and outbox.
        seeds: seeds of the phantoms.
        organs: names of the segmented organs.
        flagged: number of cases, counted from the last, in which every organ has a flag.
        axes: orientation of the stored scans.
    """
    batch = Batch(root, [])
    with BatchStore(state_path(batch.outbox), create=True) as store:
        for number, seed in enumerate(seeds):
            source = root / "inbox" / f"{PATIENT}_{seed}.nii.gz"
            patient = scan(seed)
            hu, affine = stored(np.asarray(patient.volume.array), patient.volume.affine, axes)
            write_ct(source, Volume(hu, affine, patient.volume.slope, patient.volume.intercept))
            key = content_key(source)
            store.add(source, "", key)
            store.start(key)
            labels = np.zeros(patient.labels.shape, np.uint8)
            found = []
            for label, organ in enumerate(organs, start=1):
                here = patient.labels.array == label_of(organ)
                labels[here] = label
                volume = round(float(here.sum()) * patient.labels.voxel_volume_mm3 / 1000, 3)
                found.append(SegmentedOrgan(organ, label, volume, ("small",) if number >= len(seeds) - flagged else ()))
            write_label_map(batch.mask(key), LabelMap(*stored(labels, patient.labels.affine, axes)))
            entries = [{"name": organ.name, "label": organ.label} for organ in found]
            batch.mask(key, ".json").write_text(json.dumps({"schema_version": 1, "case": key, "organs": entries}))
            Image.new("RGB", (60, 20), (255, 150, 0)).save(batch.mask(key, ".png"))
            store.end(key, Outcome(CaseState.DONE, tuple(found), StageSeconds(1.0, 2.0, 3.0)))
            batch.keys.append(key)
    return batch


def stored(array: NDArray[Any], affine: NDArray[np.float64], axes: str) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return an array and its affine as a file stores them whose axes point into these directions."""
    change = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    return apply_orientation(array, change), affine @ inv_ornt_aff(change, array.shape)


def add_failure(batch: Batch, name: str = f"{PATIENT}_failed.nii.gz") -> str:
    """Add a failed case; return its key."""
    source = batch.root / "inbox" / name
    shutil.copy(Path(__file__), source)
    key = content_key(source)
    with batch.store() as store:
        store.add(source, "", key)
        store.start(key)
        store.end(
            key,
            Outcome(
                CaseState.FAILED,
                problem="UnreadableFileError",
                reason=f"{source} is not a NIfTI file.",
                remedy="Convert it.",
            ),
        )
    batch.keys.append(key)
    return key
