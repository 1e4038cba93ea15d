"""Corrections in the outbox: their files, their record, DICOM objects, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
from dataclasses import replace
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from doubles.dicom import PATIENT, Series
from doubles.encoder import SPACING, scan
from doubles.errors import refused
from doubles.reviewed import Batch, run_batch
from numpy.typing import NDArray

from fseft_edge.dicom_output import SegmentationAlgorithm, write_dicom_results
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.accepted_masks import ReviewedBatch, accepted_annotations
from fseft_edge.outbox.content_key import content_key
from fseft_edge.outbox.corrections import MaskChangedError, SavedCorrection, import_correction
from fseft_edge.outbox.records import CaseState, Decision, Origin
from fseft_edge.outbox.store import BatchStore, Outcome, state_path
from fseft_edge.runtime.encoder.bundle import sha256_of_file
from fseft_edge.runtime.errors import GeometryError, InputError, LabelError, OutOfSpaceError, UsageError
from fseft_edge.runtime.scans.nifti import read_header, read_label_map, read_label_names, write_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.sources import find_scan, read_scan
from fseft_edge.runtime.scans.volume import LabelMap
from fseft_edge.runtime.system import atomic

CORRECTED = ".corrected.nii.gz"
LIVER = OrganLabel("liver", 6)


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return run_batch(tmp_path / "batch")


def one_voxel(batch: Batch, key: str, label: int = 2) -> LabelMap:
    """Return the mask of a case with one more voxel."""
    mask = read_label_map(batch.mask(key))
    array = mask.array.copy()
    array[1, 2, 3] = label
    return LabelMap(array, mask.affine, forms=mask.forms)


def save(
    batch: Batch, key: str, labels: LabelMap, reviewer: str = "Bo Li", based_on: str | None = None
) -> SavedCorrection:
    with batch.store() as store:
        return import_correction(
            batch.outbox, store, key, labels, reviewer=reviewer, origin=Origin.PAGE, based_on=based_on
        )


def test_a_correction_lies_beside_the_mask_of_the_batch_on_the_same_lattice(batch: Batch) -> None:
    key, other = batch.keys
    original = batch.mask(key).read_bytes()
    saved = save(batch, key, one_voxel(batch, key))
    corrected = read_label_map(batch.mask(key, CORRECTED))
    assert np.argwhere(corrected.array != read_label_map(batch.mask(key)).array).tolist() == [[1, 2, 3]]
    assert batch.mask(key).read_bytes() == original
    before, after = (read_header(batch.mask(key, suffix)).binaryblock for suffix in (".nii.gz", CORRECTED))
    geometry = nib.Nifti1Header(before), nib.Nifti1Header(after)
    for name in ("srow_x", "srow_y", "srow_z", "sform_code", "qform_code", "quatern_b", "pixdim", "xyzt_units", "dim"):
        np.testing.assert_array_equal(*(header[name] for header in geometry), err_msg=name)
    assert read_label_names(batch.mask(key, CORRECTED)) == {1: "spleen", 2: "liver"}
    with batch.store() as store:
        (recorded,) = store.case(key).corrections
        assert store.case(other).corrections == ()
    assert recorded.at == pytest.approx(saved.correction.at, abs=1e-3)
    assert replace(recorded, at=saved.correction.at) == saved.correction
    assert (recorded.reviewer, recorded.origin) == ("Bo Li", Origin.PAGE)
    assert recorded.mask_sha256 == sha256_of_file(batch.mask(key, CORRECTED))
    assert recorded.based_on == sha256_of_file(batch.mask(key))
    spleen, liver = recorded.organs
    assert (spleen.mean_distance_mm, spleen.added_path_mm) == (0.0, 0.0)
    assert (liver.added_path_mm, liver.volume_ml > 0) == (6.0, True)


def test_a_correction_in_another_order_of_axes_is_put_into_the_order_of_the_mask(batch: Batch) -> None:
    key = batch.keys[0]
    plain = one_voxel(batch, key)
    turned = plain.affine @ np.array([[0, 0, -1, plain.shape[0] - 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    save(batch, key, LabelMap(np.ascontiguousarray(plain.array[::-1].transpose(2, 1, 0)), turned))
    np.testing.assert_array_equal(read_label_map(batch.mask(key, CORRECTED)).array, plain.array)


def test_adapt_learns_from_the_correction_only_once_it_is_accepted(batch: Batch) -> None:
    key = batch.keys[0]
    batch.decide(key, Decision.ACCEPTED)
    save(batch, key, one_voxel(batch, key))
    with refused(InputError, key) as caught:
        accepted_annotations(ReviewedBatch(batch.outbox), [LIVER])
    assert f"fseft-edge review {batch.outbox}" in caught.value.remedy
    batch.decide(key, Decision.ACCEPTED, mask=batch.mask(key, CORRECTED))
    [(image, mask)] = accepted_annotations(ReviewedBatch(batch.outbox), [LIVER])
    assert image == batch.source(key)
    np.testing.assert_array_equal(mask.array == 6, one_voxel(batch, key).array == 2)


def test_a_file_of_corrected_masks_counts_before_the_correction_in_the_outbox(batch: Batch, tmp_path: Path) -> None:
    key = batch.keys[0]
    save(batch, key, one_voxel(batch, key))
    given = tmp_path / "given" / f"{key}.nii.gz"
    write_label_map(given, one_voxel(batch, key, label=1))
    batch.decide(key, Decision.ACCEPTED, mask=given)
    [(_, mask)] = accepted_annotations(ReviewedBatch(batch.outbox, corrected=given.parent), [LIVER])
    assert mask.array[1, 2, 3] == 0


def test_a_correction_of_a_mask_that_has_changed_is_refused_with_the_name_of_the_person(batch: Batch) -> None:
    key = batch.keys[0]
    displayed = sha256_of_file(batch.mask(key))
    first = save(batch, key, one_voxel(batch, key), based_on=displayed).correction
    written = batch.mask(key, CORRECTED).read_bytes()
    with refused(MaskChangedError, key, f"Bo Li saved another correction at {first.when}"):
        save(batch, key, one_voxel(batch, key, label=1), "Ada Lovelace", based_on=displayed)
    assert batch.mask(key, CORRECTED).read_bytes() == written
    save(batch, key, one_voxel(batch, key, label=1), "Ada Lovelace", based_on=first.mask_sha256)
    with batch.store() as store:
        assert [one.reviewer for one in store.case(key).corrections] == ["Bo Li", "Ada Lovelace"]


def test_a_correction_that_was_saved_but_not_answered_can_be_saved_again(batch: Batch) -> None:
    key = batch.keys[0]
    displayed = sha256_of_file(batch.mask(key))
    save(batch, key, one_voxel(batch, key), based_on=displayed)
    assert save(batch, key, one_voxel(batch, key), based_on=displayed).problems == ()
    with batch.store() as store:
        assert len(store.case(key).corrections) == 1
    with sqlite3.connect(state_path(batch.outbox)) as connection:  # as if the process had died before it recorded it
        connection.execute("DELETE FROM corrections")
    connection.close()
    save(batch, key, one_voxel(batch, key), based_on=displayed)
    with batch.store() as store:
        assert len(store.case(key).corrections) == 1


def test_what_is_no_correction_of_the_case_is_refused_and_nothing_is_written(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = batch.keys[0]
    mask = one_voxel(batch, key)
    before = sorted(batch.mask(key).parent.iterdir())
    shifted = mask.affine.copy()
    shifted[0, 3] += 3
    with refused(GeometryError):
        save(batch, key, LabelMap(mask.array, shifted))
    with refused(GeometryError):
        save(batch, key, LabelMap(mask.array[1:], mask.affine))
    with refused(LabelError, key, 9):
        save(batch, key, one_voxel(batch, key, label=9))
    with refused(UsageError, "case-000000000000"):
        save(batch, "case-000000000000", mask)
    with batch.store() as store:
        store.end(batch.keys[1], Outcome(CaseState.FAILED))
    with refused(UsageError, batch.keys[1]):
        save(batch, batch.keys[1], mask)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as disk:
        disk.setattr(atomic, "_flush", full)
        with refused(OutOfSpaceError, key):
            save(batch, key, mask)
    assert sorted(batch.mask(key).parent.iterdir()) == before
    with batch.store() as store:
        assert store.case(key).corrections == ()


def test_a_mask_of_the_batch_that_was_changed_cannot_be_corrected(batch: Batch) -> None:
    key = batch.keys[0]
    description = json.loads(batch.mask(key, ".json").read_text())
    batch.mask(key, ".json").write_text(json.dumps(description | {"mask_sha256": "00" * 32}))
    with refused(LabelError, key):
        save(batch, key, one_voxel(batch, key))


def test_one_process_at_a_time_corrects_masks(batch: Batch) -> None:
    """Four processes correct the same mask at the same time: one succeeds, the others are refused."""
    key = batch.keys[0]
    displayed = sha256_of_file(batch.mask(key))
    results = multiprocessing.get_context("fork").SimpleQueue()

    def correct(number: int) -> None:
        labels = one_voxel(batch, key)
        labels.array[number, 0, 0] = 1
        try:
            results.put(save(batch, key, labels, f"{number}", based_on=displayed).correction.reviewer)
        except MaskChangedError:
            results.put("refused")

    processes = [multiprocessing.get_context("fork").Process(target=correct, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = sorted(results.get() for _ in processes)
    assert found[1:] == ["refused"] * 3
    array = read_label_map(batch.mask(key, CORRECTED)).array
    assert array[int(found[0]), 0, 0] == 1
    assert np.count_nonzero(array[:4, 0, 0]) == 1


def dicom_case(tmp_path: Path) -> tuple[Batch, str, NDArray[np.uint8]]:
    """Write a batch of one DICOM series whose mask the batch also wrote as DICOM objects."""
    batch = Batch(tmp_path / "batch", [])
    patient = scan(1)
    part = (slice(16, 48), slice(8, 40), slice(16, 40))
    series = Series(np.asarray(patient.volume.array[part], np.int16), spacing=SPACING)
    source = series.write(batch.root / "inbox" / f"{PATIENT} exam")
    volume = read_scan(source)
    labels = np.zeros(volume.shape, np.uint8)
    labels[5:9, 6:12, 3:8] = 1
    key = content_key(source)
    organs = (SegmentedOrgan("liver", 1, 1.0, ()), SegmentedOrgan("my_organ", 2, 0.0, ()))
    with BatchStore(state_path(batch.outbox), create=True) as store:
        store.add(source, "", key)
        store.start(key)
        store.end(key, Outcome(CaseState.DONE, organs))
    mask = volume.label_map(labels)
    write_label_map(batch.mask(key), mask)
    write_dicom_results(
        batch.mask(key).parent,
        key,
        ["seg", "rtstruct"],
        labels=mask,
        organs=organs,
        source=find_scan(source).series.headers(),
        algorithm=SegmentationAlgorithm("ab" * 32, {"liver": "cd" * 32, "my_organ": "cd" * 32}),
    )
    description = {
        "organs": [{"name": organ.name, "label": organ.label} for organ in organs],
        "encoder": {"name": "edge_base", "id": "ab" * 32},
        "adapters": [{"sha256": "cd" * 32, "organs": ["liver", "my_organ"]}],
        "options": {"transduction": None},
        "outputs": ["seg", "rtstruct"],
    }
    batch.mask(key, ".json").write_text(json.dumps(description))
    batch.keys.append(key)
    return batch, key, labels


def test_dicom_objects_are_written_anew_and_say_that_a_person_corrected_them(tmp_path: Path) -> None:
    batch, key, labels = dicom_case(tmp_path)
    originals = {kind: batch.mask(key, f".{kind}.dcm").read_bytes() for kind in ("seg", "rtstruct")}
    corrected = labels.copy()
    corrected[5, 6, 3:8] = 0
    corrected[20:24, 6:12, 10:12] = 2
    mask = read_label_map(batch.mask(key))
    saved = save(batch, key, LabelMap(corrected, mask.affine, forms=mask.forms))
    assert saved.problems == ()
    for kind, content in originals.items():
        assert batch.mask(key, f".{kind}.dcm").read_bytes() == content
    segmentation = highdicom.seg.segread(batch.mask(key, ".corrected.seg.dcm"))
    assert [one.SegmentLabel for one in segmentation.SegmentSequence] == ["liver", "my_organ"]
    assert {one.SegmentAlgorithmType for one in segmentation.SegmentSequence} == {"SEMIAUTOMATIC"}
    assert "corrected by a person" in segmentation.ContentDescription
    voxels = segmentation.get_volume(combine_segments=True)
    found = nib.Nifti1Image(voxels.array.astype(np.uint8), np.diag([-1, -1, 1, 1]) @ voxels.affine)
    wanted = nib.Nifti1Image(corrected, mask.affine)
    found, wanted = (nib.as_closest_canonical(image) for image in (found, wanted))
    for label in (1, 2):
        here, there = (
            nib.affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) == label))
            for image in (found, wanted)
        )
        np.testing.assert_allclose(np.unique(here.round(2), axis=0), np.unique(there.round(2), axis=0), atol=0.02)
    structures = pydicom.dcmread(batch.mask(key, ".corrected.rtstruct.dcm"))
    assert {one.ROIGenerationAlgorithm for one in structures.StructureSetROISequence} == {"SEMIAUTOMATIC"}
    assert [one.ROIName for one in structures.StructureSetROISequence] == ["liver", "my_organ"]
    assert "corrected by a person" in structures.StructureSetDescription


def test_a_dicom_object_that_cannot_be_written_does_not_lose_the_correction(tmp_path: Path) -> None:
    batch, key, labels = dicom_case(tmp_path)
    mask = read_label_map(batch.mask(key))
    save(batch, key, LabelMap(labels, mask.affine, forms=mask.forms))
    assert batch.mask(key, ".corrected.seg.dcm").exists()
    next(batch.source(key).iterdir()).unlink()
    corrected = np.where(labels == 1, 2, 0).astype(np.uint8)
    saved = save(batch, key, LabelMap(corrected, mask.affine, forms=mask.forms))
    assert len(saved.problems) == 2
    assert all("has changed" in problem and PATIENT not in problem for problem in saved.problems)
    np.testing.assert_array_equal(read_label_map(batch.mask(key, CORRECTED)).array, corrected)
    assert not batch.mask(key, ".corrected.seg.dcm").exists()  # it would show the earlier correction
    assert batch.mask(key, ".seg.dcm").exists()


def test_a_nifti_case_gets_no_dicom_objects(batch: Batch) -> None:
    key = batch.keys[0]
    fields = json.loads(batch.mask(key, ".json").read_text()) | {"outputs": ["seg"]}
    batch.mask(key, ".json").write_text(json.dumps(fields))
    assert save(batch, key, one_voxel(batch, key)).problems == ()
    assert not batch.mask(key, ".corrected.seg.dcm").exists()


def test_a_state_of_the_version_before_gets_the_table_of_corrections(batch: Batch) -> None:
    with sqlite3.connect(state_path(batch.outbox)) as connection:
        connection.executescript(
            "DROP VIEW records; DROP TABLE corrections; CREATE VIEW records AS SELECT cases.*, '[]' AS decisions"
            " FROM cases; PRAGMA user_version = 3;"
        )
    connection.close()
    key = batch.keys[0]
    batch.decide(key, Decision.REJECTED)
    save(batch, key, one_voxel(batch, key))
    with batch.store() as store:
        assert [review.decision for review in store.case(key).decisions] == [Decision.REJECTED]
        assert len(store.case(key).corrections) == 1
