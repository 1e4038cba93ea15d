"""The scans of a folder that an adapter was trained on are recognised by their annotations."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from doubles.encoder import label_of, scan, write_case
from doubles.errors import refused
from doubles.reviewed import PATIENT, run_batch

from fseft_edge.adaptation.support_set import annotated_volumes_ml, annotation_hash, of_support_set, patients_of
from fseft_edge.outbox.accepted_masks import ReviewedBatch, accepted_annotations
from fseft_edge.outbox.records import Decision
from fseft_edge.runtime.errors import LabelError, UsageError
from fseft_edge.runtime.scans.nifti import read_label_map, write_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.volume import LabelMap

ORGANS = [OrganLabel(name, label_of(name)) for name in ("liver", "spleen")]


def case(name: str, labels: LabelMap) -> tuple[Path, LabelMap]:
    return Path(f"images/{name}.nii.gz"), labels


def moved(labels: LabelMap) -> LabelMap:
    """Return other contours with the same volumes: those of a patient who lies a voxel further to the side."""
    return LabelMap(np.roll(labels.array, 1, axis=0), labels.affine)


def known(*annotations: LabelMap) -> tuple[list[tuple[float, ...]], list[str]]:
    """Return what an adapter stores about its support set: volumes of each organ, and hashes."""
    volumes = zip(*(annotated_volumes_ml(labels, ORGANS) for labels in annotations), strict=True)
    return list(volumes), [annotation_hash(labels, ORGANS) for labels in annotations]


def test_a_scan_with_the_volumes_of_a_support_scan_is_not_taken_for_it(caplog: pytest.LogCaptureFixture) -> None:
    first, other = case("first", scan(1).labels), case("other", moved(scan(1).labels))
    assert annotated_volumes_ml(first[1], ORGANS) == annotated_volumes_ml(other[1], ORGANS)
    assert of_support_set([other, first], ORGANS, *known(first[1])) == [first]
    assert [record.getMessage() for record in caplog.records] == [
        "the case other is skipped: it is not in the support set of the adapter"
    ]
    with refused(LabelError, "--support-images"):
        of_support_set([other], ORGANS, *known(first[1]))


def test_an_annotation_that_another_program_saved_again_is_recognised(tmp_path: Path) -> None:
    write_label_map(tmp_path / "a.nii.gz", scan(1).labels)
    image = SimpleITK.PermuteAxes(SimpleITK.ReadImage(tmp_path / "a.nii.gz"), [1, 2, 0])
    SimpleITK.WriteImage(
        SimpleITK.Cast(SimpleITK.Flip(image, [True, True, False]), SimpleITK.sitkFloat32), tmp_path / "b.nii"
    )
    again = case("b", read_label_map(tmp_path / "b.nii"))
    assert of_support_set([again], ORGANS, *known(scan(1).labels)) == [again]


def test_a_second_copy_of_a_support_scan_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    first, copy = case("first", scan(1).labels), case("copy", scan(1).labels)
    assert of_support_set([first, copy], ORGANS, *known(scan(1).labels)) == [first]
    assert "copy" in caplog.text
    assert of_support_set([first, copy], ORGANS, *known(scan(1).labels, scan(1).labels)) == [first, copy]


def test_missing_support_scans_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    first = case("first", scan(1).labels)
    assert of_support_set([first], ORGANS, *known(scan(1).labels, scan(2).labels)) == [first]
    assert "only 1 of the 2 scans" in caplog.text


def test_the_case_of_a_reviewed_batch_has_its_pseudonym_in_the_groups(tmp_path: Path) -> None:
    """The groups may also name cases of the batch that were not accepted, and CTs of the folder that are not used."""
    batch = run_batch(tmp_path / "batch")
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    reviewed = ReviewedBatch(batch.outbox)
    image, _ = write_case(tmp_path, "own", 3)
    write_case(tmp_path, "unused", 4)
    annotated = [*accepted_annotations(reviewed, ORGANS), (image, scan(3).labels)]
    where = {"images": tmp_path / "images", "reviewed": reviewed}
    groups = {batch.keys[0]: "anna", batch.keys[1]: "bo", "own": "anna", "unused": "cleo"}
    assert patients_of(annotated, groups, **where) == {batch.keys[0]: "anna", "own": "anna"}
    assert patients_of(annotated, None, **where) is None
    with refused(UsageError, batch.keys[0]) as caught:
        patients_of(annotated, {"own": "anna"}, **where)
    assert PATIENT not in caught.value.message


def test_the_order_of_the_organs_has_no_effect() -> None:
    assert annotation_hash(scan(1).labels, ORGANS) == annotation_hash(scan(1).labels, ORGANS[::-1])


def test_an_adapter_of_an_older_version_recognises_scans_by_volumes_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = case("first", scan(1).labels), case("second", scan(2).labels)
    volumes, _ = known(scan(1).labels)
    assert of_support_set([first, second], ORGANS, volumes) == [first]
    warning = next(record for record in caplog.records if record.levelno == logging.WARNING)
    assert "older version" in warning.getMessage()
    assert "volumes" in warning.getMessage()
