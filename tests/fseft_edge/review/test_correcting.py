"""Corrections that a browser sends to the server, and those that are imported from files."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from doubles.command_line import Run, assert_error_with_remedy, runner
from doubles.errors import refused
from doubles.reviewed import PATIENT, Batch, add_failure, run_batch
from doubles.reviewer import Answer, Reviewer, decision_body, served
from numpy.typing import NDArray

from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import CaseState, Origin
from fseft_edge.outbox.store import Outcome
from fseft_edge.review.importing import import_corrections
from fseft_edge.runtime.encoder.bundle import sha256_of_file
from fseft_edge.runtime.errors import GeometryError, UsageError
from fseft_edge.runtime.scans.nifti import read_label_map, write_label_map
from fseft_edge.runtime.scans.volume import LabelMap

CORRECTED = ".corrected.nii.gz"


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return run_batch(tmp_path / "batch")


@pytest.fixture
def reviewer(batch: Batch) -> Iterator[Reviewer]:
    with served(batch.outbox, reviewer="Bo Li") as client:
        yield client


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


def drawn(batch: Batch, key: str) -> NDArray[np.uint8]:
    """Return the mask of a case with one more voxel. Label values are also the numbers of the organs."""
    array = np.array(read_label_map(batch.mask(key)).array)
    array[1, 2, 3] = 2
    return array


def correct(reviewer: Reviewer, key: str, body: bytes, **headers: str | None) -> Answer:
    usual = {
        "Origin": f"http://{reviewer.host}",
        "Content_Type": "application/gzip",
        "If_Match": f'"{reviewer.mask_sha256(key)}"',
    }
    return reviewer.ask(f"/cases/{key}/correction", "POST", body, **{**usual, **headers})


def packed(array: NDArray[np.uint8]) -> bytes:
    return gzip.compress(array.tobytes(order="F"))


def test_a_correction_is_stored_displayed_and_accepted(batch: Batch, reviewer: Reviewer) -> None:
    key = batch.keys[0]
    own = reviewer.mask_sha256(key)
    answer = correct(reviewer, key, packed(drawn(batch, key)))
    assert (answer.status, answer.json["problems"]) == (200, [])
    np.testing.assert_array_equal(read_label_map(batch.mask(key, CORRECTED)).array, drawn(batch, key))
    assert reviewer.mask_sha256(key) == answer.json["mask_sha256"] == sha256_of_file(batch.mask(key, CORRECTED))
    (case,) = (case for case in reviewer.ask("/cases").json["cases"] if case["key"] == key)
    assert (case["corrected"], case["no_drawing"]) == (True, "")
    (correction,) = case["corrections"]
    assert (correction["reviewer"], correction["origin"], correction["based_on"]) == ("Bo Li", "page", own)
    assert reviewer.ask(f"/cases/{key}/picture.png").status == 409  # it shows the mask of the batch
    assert reviewer.decide(key, decision_body(own)).status == 409
    assert reviewer.decide(key, decision_body(answer.json["mask_sha256"])).status == 200


def test_label_values_and_organ_numbers_may_differ(tmp_path: Path) -> None:
    batch = run_batch(tmp_path, (1,), flagged=0)
    (key,) = batch.keys
    mask = read_label_map(batch.mask(key))
    table = np.array([0, 40, 700], np.uint16)  # the label values of spleen and liver
    write_label_map(batch.mask(key), LabelMap(table[mask.array], mask.affine))
    with batch.store() as store:
        organs = (SegmentedOrgan("spleen", 40, 1.0, ()), SegmentedOrgan("liver", 700, 1.0, ()))
        store.end(key, Outcome(CaseState.DONE, organs))
    numbers = np.array(mask.array)
    numbers[1, 2, 3] = 2
    with served(batch.outbox) as reviewer:
        assert correct(reviewer, key, packed(numbers)).status == 200
    np.testing.assert_array_equal(read_label_map(batch.mask(key, CORRECTED)).array, table[numbers])


def test_a_correction_of_another_mask_than_the_displayed_one_is_refused(batch: Batch, reviewer: Reviewer) -> None:
    key = batch.keys[0]
    displayed = f'"{reviewer.mask_sha256(key)}"'
    assert correct(reviewer, key, packed(drawn(batch, key))).status == 200
    other = drawn(batch, key)
    other[0] = 1
    answer = correct(reviewer, key, packed(other), If_Match=displayed)
    assert (answer.status, answer.json["mask_changed"]) == (409, True)
    assert "Bo Li" in answer.json["error"]
    np.testing.assert_array_equal(read_label_map(batch.mask(key, CORRECTED)).array, drawn(batch, key))


def test_a_correction_that_is_not_a_mask_of_the_case_is_refused(batch: Batch, reviewer: Reviewer) -> None:
    key = batch.keys[0]
    array = drawn(batch, key)
    plain, whole = array.tobytes(), packed(array)
    for body in (
        b"",
        plain[:1000],
        whole[:-9],
        whole + b"x",
        gzip.compress(plain[:-1]),
        gzip.compress(plain + b"\0"),
        gzip.compress(bytes(100_000_000)),  # 97 kB
        whole[:-8] + bytes(8),  # another checksum
    ):
        answer = correct(reviewer, key, body)
        assert (answer.status, "64 x 48 x 56 bytes" in answer.json["error"]) == (400, True)
    array[0, 0, 0] = 3
    answer = correct(reviewer, key, packed(array))
    assert (answer.status, "organ number 3" in answer.json["error"]) == (409, True)
    assert not batch.mask(key, CORRECTED).exists()


def test_a_correction_is_refused_before_it_is_read(batch: Batch, reviewer: Reviewer) -> None:
    key, failed = batch.keys[0], add_failure(batch)
    body = packed(drawn(batch, key))
    assert correct(reviewer, key, body, Origin="http://evil.example").status == 403
    assert correct(reviewer, key, body, Cookie=None).status == 403
    assert correct(reviewer, key, body, Content_Type="application/json").status == 415
    assert correct(reviewer, key, b"x", Content_Length=str(64 * 48 * 56 * 2)).status == 413
    assert correct(reviewer, key, b"x", Content_Length="9" * 30).status == 413
    for wrong in (None, "", '"x"', "*"):
        assert correct(reviewer, key, body, If_Match=wrong).status == 400
    sha256 = f'"{"0" * 64}"'
    assert correct(reviewer, "case-000000000000", b"x", If_Match=sha256).status == 404
    assert correct(reviewer, failed, b"x", If_Match=sha256).status == 400
    assert reviewer.ask(f"/cases/{key}/correction").status == 404  # GET
    assert not batch.mask(key, CORRECTED).exists()


def test_a_mask_of_a_folder_of_corrected_masks_is_not_corrected_in_the_page(batch: Batch, tmp_path: Path) -> None:
    key = batch.keys[0]
    (tmp_path / "given").mkdir()
    shutil.copy(batch.mask(key), tmp_path / "given" / f"{key}.nii.gz")
    with served(batch.outbox, corrected=tmp_path / "given") as reviewer:
        answer = correct(reviewer, key, packed(drawn(batch, key)))
        listed = {case["key"]: case["no_drawing"] for case in reviewer.ask("/cases").json["cases"]}
    assert (answer.status, "--corrected" in answer.json["error"]) == (400, True)
    assert ["--corrected" in listed[one] for one in batch.keys] == [True, False]


def test_a_link_in_the_place_of_the_corrected_mask_is_not_followed(batch: Batch, reviewer: Reviewer) -> None:
    key = batch.keys[0]
    outside = batch.root / "outside.nii.gz"
    outside.write_bytes(b"secret")
    batch.mask(key, CORRECTED).symlink_to(outside)
    assert reviewer.ask(f"/cases/{key}/mask.nii.gz").status == 409
    sha256 = f'"{sha256_of_file(batch.mask(key))}"'
    assert correct(reviewer, key, packed(drawn(batch, key)), If_Match=sha256).status == 409
    assert outside.read_bytes() == b"secret"


def test_masks_of_another_program_become_corrections(batch: Batch, tmp_path: Path, run: Run) -> None:
    first, second = batch.keys
    mask = read_label_map(batch.mask(first))
    named = tmp_path / f"{first}.nii"
    turned = mask.affine @ np.array([[-1, 0, 0, mask.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    write_label_map(named, LabelMap(drawn(batch, first)[::-1], turned))
    done = run("review-import", batch.outbox, named, "--reviewer", "Bo Li")
    assert (done.code, done.out) == (0, f"{first}: corrected by Bo Li (liver)\n")
    np.testing.assert_array_equal(read_label_map(batch.mask(first, CORRECTED)).array, drawn(batch, first))
    back = run("review-import", batch.outbox, batch.mask(first), "--reviewer", "Bo Li")  # the mask of the batch again
    assert back.out == f"{first}: corrected by Bo Li (no organ differs)\n"
    other = tmp_path / "any name.nii.gz"
    shutil.copy(batch.mask(second), other)
    saved = import_corrections(batch.outbox, [other], case=second, reviewer="Bo Li")
    assert saved[second].correction.origin == Origin.FILE
    assert PATIENT not in done.out + done.err


def test_a_file_that_is_no_correction_is_refused_and_no_file_is_imported(
    batch: Batch, tmp_path: Path, run: Run
) -> None:
    first, second = batch.keys
    good, typo = tmp_path / f"{first}.nii.gz", tmp_path / "case-typo.nii.gz"
    shutil.copy(batch.mask(first), good)
    shutil.copy(batch.mask(first), typo)
    with refused(UsageError, "case-typo"):
        import_corrections(batch.outbox, [good, typo])
    again = tmp_path / "again" / good.name
    again.parent.mkdir()
    shutil.copy(good, again)
    with refused(UsageError, good, again):
        import_corrections(batch.outbox, [good, again])
    with refused(UsageError, "--case"):
        import_corrections(batch.outbox, [good, typo], case=first)
    with refused(UsageError, tmp_path):
        import_corrections(tmp_path, [good])
    mask = read_label_map(batch.mask(second))
    write_label_map(tmp_path / f"{second}.nii.gz", LabelMap(mask.array[1:], mask.affine))
    with refused(GeometryError, second):
        import_corrections(batch.outbox, [tmp_path / f"{second}.nii.gz"])
    assert_error_with_remedy(run("review-import", batch.outbox, typo))
    assert not batch.mask(first, CORRECTED).exists()
