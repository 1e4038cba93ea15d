"""Replies of the review server to HTTP requests."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import pwd
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from doubles.dicom import Series, some_hu
from doubles.encoder import label_of, scan
from doubles.errors import refused
from doubles.reviewed import PATIENT, Batch, add_failure, run_batch
from doubles.reviewer import SECONDS, Reviewer, decision_body, served

from fseft_edge.outbox.content_key import content_key
from fseft_edge.outbox.records import CaseState, Decision
from fseft_edge.outbox.result_files import open_result
from fseft_edge.outbox.store import Outcome
from fseft_edge.review.cases import LONGEST_NOTE
from fseft_edge.review.server import open_review
from fseft_edge.runtime.errors import BatchStateError, InputError, UnreadableFileError, UsageError
from fseft_edge.runtime.scans.nifti import read_ct, stream_hu, write_ct
from fseft_edge.runtime.scans.volume import Volume


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return run_batch(tmp_path)


@pytest.fixture
def reviewer(batch: Batch) -> Iterator[Reviewer]:
    with served(batch.outbox) as client:
        yield client


def test_failures_are_first_then_flagged_cases_then_the_others(batch: Batch) -> None:
    failed = add_failure(batch)
    waiting = "case-ffffffffffff"
    with batch.store() as store:
        store.add(batch.root / "inbox" / "later.nii.gz", "", waiting)
    plain, flagged = batch.keys[:2]
    with served(batch.outbox) as reviewer:
        listed = reviewer.ask("/cases").json
    assert [case["key"] for case in listed["cases"]] == [failed, flagged, plain, waiting]
    assert [case["state"] for case in listed["cases"]] == ["failed", "done", "done", "waiting"]
    assert (listed["decided"], listed["masks"]) == (0, 2)
    organ = listed["cases"][1]["organs"][0]
    assert (organ["name"], organ["label"], organ["flags"]) == ("spleen", 1, ["small"])
    assert organ["volume_ml"] == pytest.approx(volume_ml(2, "spleen"))


def volume_ml(seed: int, organ: str) -> float:
    patient = scan(seed)
    return float((patient.labels.array == label_of(organ)).sum() * 6.0**3 / 1000)


def test_names_of_patients_are_shown_only_on_request(batch: Batch) -> None:
    failed = add_failure(batch)
    batch.source(batch.keys[0]).unlink()
    asked = ["/cases", f"/cases/{batch.keys[0]}/scan.nii", f"/cases/{failed}/scan.nii", f"/cases/{failed}/mask.nii.gz"]
    with served(batch.outbox) as reviewer:
        assert not any(PATIENT.encode() in reviewer.ask(path).body for path in asked)
    with served(batch.outbox, show_ids=True) as reviewer:
        assert reviewer.ask("/cases").json["cases"][0]["name"] == f"{PATIENT}_failed.nii.gz"


def test_the_scan_is_sent_in_hu_on_its_lattice(batch: Batch, reviewer: Reviewer, tmp_path: Path) -> None:
    answer = reviewer.ask(f"/cases/{batch.keys[0]}/scan.nii")
    (tmp_path / "scan.nii").write_bytes(answer.body)
    served_scan, source = nib.load(tmp_path / "scan.nii"), nib.load(batch.source(batch.keys[0]))
    assert served_scan.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(served_scan.dataobj), np.rint(source.get_fdata()))
    np.testing.assert_allclose(served_scan.affine, source.affine, atol=1e-5)


def test_a_dicom_series_is_sent_as_nifti(batch: Batch, reviewer: Reviewer, tmp_path: Path) -> None:
    series = Series(some_hu())
    source = series.write(batch.root / "inbox" / PATIENT)
    key = content_key(source)
    with batch.store() as store:
        store.add(source, "", key)
        store.start(key)
        store.end(key, Outcome(CaseState.DONE))
    (tmp_path / "scan.nii").write_bytes(reviewer.ask(f"/cases/{key}/scan.nii").body)
    shown = nib.load(tmp_path / "scan.nii")
    assert sorted(np.asarray(shown.dataobj).ravel()) == sorted(series.hu.ravel())
    for index in np.ndindex(shown.shape):
        distances = np.linalg.norm(series.world() - nib.affines.apply_affine(shown.affine, index), axis=-1)
        nearest = np.unravel_index(distances.argmin(), distances.shape)
        assert distances[nearest] < 1e-3
        assert series.hu[nearest] == shown.dataobj[index]


@pytest.mark.parametrize(
    ("stored", "slope", "intercept", "hu"),
    [
        (np.array([0, 1024, 5095], np.uint16), 1.0, -1024.0, [-1024, 0, 4071]),
        (np.array([-1000, 0, 3000], ">i2"), 1.0, 0.0, [-1000, 0, 3000]),
        (np.array([-1000.4, 0.6, 99999.0], np.float32), 1.0, 0.0, [-1000, 1, 32767]),
        (np.array([0, 100, 200], np.uint8), 10.0, -1000.0, [-1000, 0, 1000]),
        (np.array([-2000, 0, 40000], np.int32), 1.0, 0.0, [-2000, 0, 32767]),
        (np.array([0, 100, 65535], np.uint16), 1.0, 0.0, [0, 100, 32767]),
    ],
)
def test_hu_are_sent_for_every_stored_data_type(
    tmp_path: Path, stored: np.ndarray, slope: float, intercept: float, hu: list[int]
) -> None:
    array = np.zeros((3, 4, 5), stored.dtype)
    array[:, 1, 2] = stored
    affine = np.array([[0, -2.0, 0, 7], [1.5, 0, 0, -3], [0, 0, 3.0, 11], [0, 0, 0, 1]])
    length, pieces = stream_hu(Volume(array, affine, slope, intercept))
    (tmp_path / "scan.nii").write_bytes(b"".join(pieces))
    assert (tmp_path / "scan.nii").stat().st_size == length
    written = nib.load(tmp_path / "scan.nii")
    np.testing.assert_array_equal(np.asarray(written.dataobj)[:, 1, 2], hu)
    np.testing.assert_array_equal(written.affine, affine)


def test_mask_and_picture_are_the_files_in_the_outbox(batch: Batch, reviewer: Reviewer) -> None:
    key = batch.keys[0]
    assert reviewer.ask(f"/cases/{key}/mask.nii.gz").body == batch.mask(key).read_bytes()
    picture = reviewer.ask(f"/cases/{key}/picture.png")
    assert picture.headers["Content-Type"] == "image/png"
    assert picture.body == batch.mask(key, ".png").read_bytes()


def test_a_scan_that_has_changed_is_not_sent(batch: Batch, reviewer: Reviewer) -> None:
    source = batch.source(batch.keys[0])
    volume = read_ct(source)
    write_ct(source, Volume(np.asarray(volume.array) + 1, volume.affine))
    answer = reviewer.ask(f"/cases/{batch.keys[0]}/scan.nii")
    assert answer.status == 409
    assert batch.keys[0] in answer.json["error"]


def as_link_to_folder(batch: Batch, key: str, elsewhere: Path) -> None:
    (batch.outbox / key).rename(elsewhere / key)
    (batch.outbox / key).symlink_to(elsewhere / key)


def as_link_to_file(batch: Batch, key: str, elsewhere: Path) -> None:
    batch.mask(key).rename(elsewhere / "mask.nii.gz")
    batch.mask(key).symlink_to(elsewhere / "mask.nii.gz")


def as_folder(batch: Batch, key: str, elsewhere: Path) -> None:
    batch.mask(key).unlink()
    batch.mask(key).mkdir()


def as_pipe(batch: Batch, key: str, elsewhere: Path) -> None:
    batch.mask(key).unlink()
    os.mkfifo(batch.mask(key))


def as_nothing(batch: Batch, key: str, elsewhere: Path) -> None:
    batch.mask(key).unlink()


@pytest.mark.parametrize("disguise", [as_link_to_folder, as_link_to_file, as_folder, as_pipe, as_nothing])
def test_a_result_that_is_not_a_regular_file_is_refused(
    batch: Batch, reviewer: Reviewer, tmp_path_factory: pytest.TempPathFactory, disguise: Callable[..., None]
) -> None:
    disguise(batch, batch.keys[0], tmp_path_factory.mktemp("elsewhere"))
    answer = reviewer.ask(f"/cases/{batch.keys[0]}/mask.nii.gz")
    assert answer.status == 409
    assert f"{batch.keys[0]}.nii.gz" in answer.json["error"]
    assert reviewer.ask(f"/cases/{batch.keys[1]}/mask.nii.gz").status == 200


@pytest.mark.parametrize("key", ["../outside", "..", ".", "outside/..", "", "outside/outside", "a" * 65])
def test_a_key_that_is_a_path_is_refused(batch: Batch, key: str) -> None:
    (batch.root / "outside").mkdir()
    (batch.root / "outside" / "outside.nii.gz").write_bytes(b"secret")
    with refused(UnreadableFileError, f"{key}.nii.gz"):
        open_result(batch.outbox, key, ".nii.gz")


def test_a_decision_is_stored_with_its_unchanged_note(batch: Batch, reviewer: Reviewer) -> None:
    note = '<script>alert("1")</script> \u2264 3 mm\n"; DROP TABLE cases; --'
    sha256 = hashlib.sha256(batch.mask(batch.keys[1]).read_bytes()).hexdigest()
    assert reviewer.mask_sha256(batch.keys[1]) == sha256
    answer = reviewer.decide(batch.keys[1], decision_body(sha256, "rejected", note))
    assert answer.status == 200
    [decision] = answer.json["decisions"]
    assert (decision["note"], decision["mask_sha256"]) == (note, sha256)
    with batch.store() as store:
        review = store.case(batch.keys[1]).review
        assert (review.decision, review.note, review.mask_sha256) == (Decision.REJECTED, note, sha256)
    listed = reviewer.ask("/cases").json
    assert listed["decided"] == 1
    decisions = reviewer.decide(batch.keys[1], decision_body(sha256)).json["decisions"]
    assert [decision["decision"] for decision in decisions] == ["rejected", "accepted"]
    at = datetime.fromisoformat(decisions[0]["at"])
    assert at.utcoffset() == timedelta(0)
    assert str(reviewer.server.progress()) == "1 of 2 decided"


def test_a_decision_on_a_mask_that_was_not_displayed_is_refused(batch: Batch, reviewer: Reviewer) -> None:
    key = batch.keys[0]
    displayed = reviewer.mask_sha256(key)
    shutil.copy(batch.mask(batch.keys[1]), batch.mask(key))
    answer = reviewer.decide(key, decision_body(displayed))
    assert answer.status == 409
    assert key in answer.json["error"]
    with batch.store() as store:
        assert store.case(key).review is None
    assert reviewer.decide(key, decision_body(reviewer.mask_sha256(key))).status == 200


def test_a_mask_that_its_json_file_does_not_describe_is_not_sent(batch: Batch, reviewer: Reviewer) -> None:
    key = batch.keys[0]
    description = batch.mask(key, ".json")
    fields = json.loads(description.read_text()) | {"mask_sha256": reviewer.mask_sha256(key)}
    description.write_text(json.dumps(fields))
    assert reviewer.ask(f"/cases/{key}/mask.nii.gz").status == 200
    assert reviewer.ask(f"/cases/{key}/picture.png").status == 200
    shutil.copy(batch.mask(batch.keys[1]), batch.mask(key))
    for name in ("mask.nii.gz", "picture.png"):
        answer = reviewer.ask(f"/cases/{key}/{name}")
        assert answer.status == 409
        assert key in answer.json["error"]


def test_a_corrected_mask_is_displayed_and_accepted_in_place_of_the_mask_of_the_batch(
    batch: Batch, tmp_path: Path
) -> None:
    first, second = batch.keys
    folder = tmp_path / "corrected"
    folder.mkdir()
    shutil.copy(batch.mask(second), folder / f"{first}.nii.gz")
    with served(batch.outbox, corrected=folder) as reviewer:
        assert [case["corrected"] for case in reviewer.ask("/cases").json["cases"]] == [False, True]
        assert reviewer.ask(f"/cases/{first}/mask.nii.gz").body == batch.mask(second).read_bytes()
        assert reviewer.ask(f"/cases/{second}/mask.nii.gz").body == batch.mask(second).read_bytes()
        assert reviewer.ask(f"/cases/{first}/picture.png").status == 409  # it shows the mask of the batch
        own = hashlib.sha256(batch.mask(first).read_bytes()).hexdigest()
        assert reviewer.decide(first, decision_body(own)).status == 409
        assert reviewer.decide(first, decision_body(reviewer.mask_sha256(first))).status == 200
        os.mkfifo(folder / f"{second}.nii.gz")
        answer = reviewer.ask(f"/cases/{second}/mask.nii.gz")
        assert (answer.status, second in answer.json["error"]) == (409, True)
    with refused(UsageError, tmp_path / "nowhere"), open_review(batch.outbox, corrected=tmp_path / "nowhere"):
        pass
    shutil.copy(batch.mask(first), folder / "case-typo.nii.gz")
    (folder / f"{second}.nii.gz").unlink()
    with refused(InputError, folder, "case-typo"), open_review(batch.outbox, corrected=folder):
        pass


def test_decisions_have_the_name_of_the_reviewer(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    key = batch.keys[0]
    for given, stored in ((" Ada Lovelace ", "Ada Lovelace"), (None, pwd.getpwuid(os.getuid()).pw_name)):
        with served(batch.outbox, reviewer=given) as reviewer:
            assert reviewer.ask("/cases").json["reviewer"] == stored
            reviewer.decide(key, decision_body(reviewer.mask_sha256(key)))
        with batch.store() as store:
            assert store.case(key).review.reviewer == stored
    for wrong in ("", "  ", "x" * 101, "two\nlines"):
        with refused(UsageError, "--reviewer"), open_review(batch.outbox, reviewer=wrong):
            pass

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with refused(UsageError, "no user name"), open_review(batch.outbox):
        pass


def test_warnings_and_the_case_that_supersedes_another_are_listed(batch: Batch) -> None:
    first, second = batch.keys
    source = batch.source(first)
    with batch.store() as store:
        store.end(first, Outcome(CaseState.DONE, warnings=(f"{source} drifts.",)))
        store.add(source, "", second, ["1", "2"])
        store.add(source, "", first, ["1"])
        store.supersede_earlier(source, second)
    with served(batch.outbox) as reviewer:
        cases = {case["key"]: case for case in reviewer.ask("/cases").json["cases"]}
        answer = reviewer.decide(first, decision_body("00" * 32))
    assert cases[first]["warnings"] == [f"{first} drifts."]
    assert cases[first]["superseded_by"] == second
    assert (answer.status, second in answer.json["error"]) == (400, True)


def test_a_note_that_is_too_long_is_refused(batch: Batch, reviewer: Reviewer) -> None:
    sha256 = reviewer.mask_sha256(batch.keys[0])
    longest = decision_body(sha256, note="\u20ac" * LONGEST_NOTE)
    assert reviewer.decide(batch.keys[0], longest).status == 200
    too_long = reviewer.decide(batch.keys[0], decision_body(sha256, note="x" * (LONGEST_NOTE + 1)))
    assert too_long.status == 400
    assert str(LONGEST_NOTE) in too_long.json["error"]


def test_a_case_without_a_mask_cannot_be_decided(batch: Batch) -> None:
    failed = add_failure(batch)
    with served(batch.outbox) as reviewer:
        assert reviewer.decide(failed, decision_body("00" * 32)).status == 400
        assert reviewer.decide("case-000000000000", decision_body("00" * 32)).status == 404


def test_several_requests_at_the_same_time_are_answered(batch: Batch, reviewer: Reviewer) -> None:
    statuses: list[int] = []

    def decide_and_read(number: int) -> None:
        key = batch.keys[number % 2]
        statuses.append(reviewer.decide(key, decision_body(reviewer.mask_sha256(key), note=str(number))).status)
        statuses.append(reviewer.ask(f"/cases/{key}/scan.nii").status)

    threads = [threading.Thread(target=decide_and_read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert statuses == [200] * 16


def test_a_request_after_the_end_of_the_review_gets_no_reply(batch: Batch, capsys: pytest.CaptureFixture[str]) -> None:
    with served(batch.outbox) as reviewer, contextlib.ExitStack() as stack:
        late = stack.enter_context(contextlib.closing(http.client.HTTPConnection(reviewer.host, timeout=SECONDS)))
        late.connect()
        assert reviewer.ask("/cases").status == 200  # the server has accepted the connection before this one
        stack.pop_all()
    with contextlib.closing(late):
        late.request("GET", "/cases", headers={"Cookie": str(reviewer.cookie)})
        with pytest.raises(ConnectionError):
            late.getresponse()
    assert capsys.readouterr().err == ""


def test_a_folder_without_a_batch_is_refused(tmp_path: Path) -> None:
    with refused(UsageError, tmp_path / "nowhere"), open_review(tmp_path / "nowhere"):
        pass
    with refused(UsageError, tmp_path), open_review(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "text").write_text("not a state file" * 1000)
    with refused(BatchStateError, tmp_path / "text"), open_review(tmp_path, state=tmp_path / "text"):
        pass


def test_the_state_file_can_be_outside_the_outbox(batch: Batch, tmp_path: Path) -> None:
    (batch.outbox / ".fseft-edge").rename(tmp_path / "state")
    with served(batch.outbox, state=tmp_path / "state" / "state.sqlite") as reviewer:
        assert reviewer.ask("/cases").json["masks"] == 2
