"""The state of a batch: what is written is there, whatever happened, and what is no state is refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import CaseState, Decision, Outcome, StageSeconds
from fseft_edge.outbox.store import GONE, SCHEMA_VERSION, UNREADABLE, BatchStore, state_path
from fseft_edge.runtime.errors import BatchStateError, OutOfSpaceError, UsageError

DONE = Outcome(CaseState.DONE, (SegmentedOrgan("liver", 1, 1500.25, ("large",)),), StageSeconds(1.0, 2.0, 0.5))
FAILED = Outcome(CaseState.FAILED, problem="NotACtError", reason="It is no CT.", remedy="Give a CT.")


def store_of(folder: Path, *keys: str) -> BatchStore:
    store = BatchStore(state_path(folder), create=True)
    for key in keys:
        assert store.add(folder / f"{key}.nii.gz", "signature", key)
    return store


def test_a_case_waits_runs_and_is_done_with_all_that_was_said_of_it(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1") as store:
        waiting = store.next_waiting(exclusive=False)
        assert waiting is not None
        assert store.start(waiting.key)
        assert store.next_waiting(exclusive=False) is None
        assert store.case("case-1").state == CaseState.RUNNING
        store.end("case-1", DONE)
    with BatchStore(state_path(tmp_path)) as store:
        (case,) = store.cases()
    assert case.state == CaseState.DONE
    assert case.organs == DONE.organs
    assert case.seconds == DONE.seconds
    assert case.seconds is not None
    assert case.seconds.total == 3.5
    assert case.started_at is not None
    assert case.finished_at is not None
    assert case.found_at <= case.started_at <= case.finished_at


def test_the_same_content_elsewhere_is_a_duplicate_and_no_case(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1") as store:
        assert not store.add(tmp_path / "copy.nii.gz", "other", "case-1")
        assert len(store.cases()) == 1
        assert [(duplicate.source.name, duplicate.key) for duplicate in store.duplicates()] == [
            ("copy.nii.gz", "case-1")
        ]
        assert store.sources_of("case-1") == {
            tmp_path / "case-1.nii.gz": "signature",
            tmp_path / "copy.nii.gz": "other",
        }


def test_what_lies_at_a_place_is_known_by_its_signature(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1") as store:
        place = tmp_path / "case-1.nii.gz"
        assert store.key_of(place, "signature") == "case-1"
        assert store.key_of(place, "it grew") is None
        assert store.add(place, "it grew", "case-2")
        assert store.key_of(place, "signature") is None
        assert store.sources_of("case-1") == {}
        assert store.duplicates() == []


def test_cases_that_were_begun_wait_again_after_a_restart_and_nothing_counts_against_them(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1", "case-2", "case-3") as store:
        store.start("case-1")
        store.start("case-2")
        store.end("case-2", DONE)
    with BatchStore(state_path(tmp_path)) as store:
        assert store.put_back_all() == 1
        assert [case.state for case in store.cases()] == [CaseState.WAITING, CaseState.DONE, CaseState.WAITING]
        assert [case.attempts for case in store.cases()] == [0, 0, 0]


def test_a_case_that_has_to_be_alone_is_not_offered_with_the_others(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1", "case-2") as store:
        store.start("case-1")
        assert store.put_back("case-1", exclusive=True) == 0
        store.start("case-2")
        assert store.put_back("case-2", exclusive=True, attempted=True) == 1
        assert store.next_waiting(exclusive=False) is None
        alone = store.next_waiting(exclusive=True)
        assert alone is not None
        assert alone.key == "case-1"


def test_retry_and_cancel_touch_only_what_they_may(tmp_path: Path) -> None:
    with store_of(tmp_path, "done", "failed", "waiting", "aside") as store:
        store.end("done", DONE)
        store.end("failed", FAILED)
        store.end("aside", Outcome(CaseState.SET_ASIDE, reason="It crashed."))
        assert store.cancel([]) == 1
        assert store.cancel(["done"]) == 0
        assert store.cancel(["aside"]) == 1
        assert store.case("waiting").state == CaseState.CANCELLED
        assert store.retry(["failed"]) == 1
        assert store.case("failed").reason == ""
        assert store.retry([]) == 2
        assert [case.state for case in store.cases()].count(CaseState.WAITING) == 3
        assert store.case("done").state == CaseState.DONE
        with pytest.raises(UsageError, match="no case nobody"):
            store.retry(["nobody"])


def test_a_cancelled_case_cannot_be_begun(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1") as store:
        store.cancel(["case-1"])
        assert not store.start("case-1")


def test_a_decision_is_kept_and_only_a_mask_can_be_decided_on(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1", "case-2") as store:
        store.end("case-1", DONE)
        store.review("case-1", Decision.REJECTED, "the left one is missing")
        store.review("case-1", Decision.ACCEPTED, "'; DROP TABLE cases; --")
        review = store.case("case-1").review
        assert review is not None
        assert (review.decision, review.note) == (Decision.ACCEPTED, "'; DROP TABLE cases; --")
        with pytest.raises(UsageError, match="no mask to decide on"):
            store.review("case-2", Decision.ACCEPTED, "")


def test_nothing_of_a_transaction_that_failed_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store_of(tmp_path) as store:
        monkeypatch.setattr("time.time", lambda: "never")  # STRICT tables refuse a text here
        with pytest.raises((BatchStateError, OutOfSpaceError)):
            store.add(tmp_path / "a", "s", "case-1")
        monkeypatch.undo()
        assert store.cases() == []
        assert store.key_of(tmp_path / "a", "s") is None
        assert store.add(tmp_path / "a", "s", "case-1")


def test_a_newer_state_is_refused(tmp_path: Path) -> None:
    store_of(tmp_path).close()
    with sqlite3.connect(state_path(tmp_path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(BatchStateError, match="newer version"):
        BatchStore(state_path(tmp_path))


def test_what_is_no_state_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no batch at"):
        BatchStore(tmp_path / "nothing")
    (tmp_path / "begun").touch()
    with pytest.raises(UsageError, match="no batch at"):
        BatchStore(tmp_path / "begun")
    text = tmp_path / "text"
    text.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(BatchStateError, match="damaged"):
        BatchStore(text, create=True)
    assert text.read_bytes().startswith(b"not a database")
    other = tmp_path / "other"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(BatchStateError, match="no state of a batch"):
        BatchStore(other, create=True)


def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutOfSpaceError, match="cannot be written"):
        BatchStore(tmp_path / "file" / "state.sqlite", create=True)


def test_a_case_that_was_gone_waits_again_when_it_is_back_at_the_same_place(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1") as store:
        place = tmp_path / "case-1.nii.gz"
        store.lose("case-1", Outcome(CaseState.FAILED, problem=GONE, reason="It was taken away."))
        assert store.case("case-1").state == CaseState.FAILED
        assert store.key_of(place, "signature") is None
        assert store.add(place, "signature", "case-1")
        assert (store.case("case-1").state, store.case("case-1").reason) == (CaseState.WAITING, "")


def test_what_could_not_be_read_gives_way_to_what_it_turns_out_to_be(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1") as store:
        for name in ("a", "b"):
            store.add(tmp_path / name, "signature", f"{UNREADABLE}{name}")
            store.end(f"{UNREADABLE}{name}", FAILED)
        assert store.add(tmp_path / "a", "now readable", "case-2")
        assert [case.key for case in store.cases()] == ["case-1", f"{UNREADABLE}b", "case-2"]
        assert store.retry([f"{UNREADABLE}b"]) == 1
        assert store.key_of(tmp_path / "b", "signature") is None  # found anew at the next look
        assert [case.key for case in store.cases()] == ["case-1", "case-2"]
