"""The state of a batch: everything written can be read after a restart, and other files are refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from doubles.errors import refused

from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import CaseState, Decision, Outcome, StageSeconds
from fseft_edge.outbox.store import SCHEMA_VERSION, SOURCE_MISSING, UNREADABLE_PREFIX, BatchStore, state_path
from fseft_edge.runtime.errors import BatchStateError, OutOfSpaceError, UsageError

DONE = Outcome(
    CaseState.DONE,
    (SegmentedOrgan("liver", 1, 1500.25, ("large",)),),
    StageSeconds(1.0, 2.0, 0.5),
    warnings=("The table drifts.", "Slices were left out."),
    series="ab",
)
FAILED = Outcome(CaseState.FAILED, problem="NotACtError", reason="The scan is not a CT.", remedy="Give a CT.")


def store_of(folder: Path, *keys: str) -> BatchStore:
    store = BatchStore(state_path(folder), create=True)
    for key in keys:
        assert store.add(folder / f"{key}.nii.gz", "signature", key)
    return store


def test_a_case_waits_runs_and_is_done_with_its_organs_and_times(tmp_path: Path) -> None:
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
    assert (case.warnings, case.series, case.superseded_by) == (DONE.warnings, "ab", "")
    assert case.seconds is not None
    assert case.seconds.total == 3.5
    assert case.started_at is not None
    assert case.finished_at is not None
    assert case.found_at <= case.started_at <= case.finished_at


def test_equal_content_at_another_path_is_a_duplicate_and_not_a_case(tmp_path: Path) -> None:
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


def test_a_path_is_found_only_with_its_signature(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1") as store:
        path = tmp_path / "case-1.nii.gz"
        assert store.key_of(path, "signature") == "case-1"
        assert store.key_of(path, "changed") is None
        assert store.add(path, "changed", "case-2")
        assert store.key_of(path, "signature") is None
        assert store.sources_of("case-1") == {}
        assert store.duplicates() == []


def test_running_cases_wait_again_after_a_restart_without_a_counted_attempt(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1", "case-2", "case-3") as store:
        store.start("case-1")
        store.start("case-2")
        store.end("case-2", DONE)
    with BatchStore(state_path(tmp_path)) as store:
        assert store.requeue_running() == 1
        assert [case.state for case in store.cases()] == [CaseState.WAITING, CaseState.DONE, CaseState.WAITING]
        assert [case.attempts for case in store.cases()] == [0, 0, 0]


def test_an_exclusive_case_is_not_returned_among_the_other_cases(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1", "case-2") as store:
        store.start("case-1")
        assert store.requeue("case-1", exclusive=True) == 0
        store.start("case-2")
        assert store.requeue("case-2", exclusive=True, attempted=True) == 1
        assert store.next_waiting(exclusive=False) is None
        next_case = store.next_waiting(exclusive=True)
        assert next_case is not None
        assert next_case.key == "case-1"


def test_retry_and_cancel_change_only_cases_in_the_right_states(tmp_path: Path) -> None:
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
        with refused(UsageError, "unknown-key"):
            store.retry(["unknown-key"])


def test_a_cancelled_case_cannot_be_started(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1") as store:
        store.cancel(["case-1"])
        assert not store.start("case-1")


def test_a_decision_is_stored_and_only_for_a_case_with_a_mask(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1", "case-2") as store:
        store.end("case-1", DONE)
        store.review("case-1", Decision.REJECTED, "the left one is missing")
        store.review("case-1", Decision.ACCEPTED, "'; DROP TABLE cases; --")
        review = store.case("case-1").review
        assert review is not None
        assert (review.decision, review.note) == (Decision.ACCEPTED, "'; DROP TABLE cases; --")
        with refused(UsageError, "case-2"):
            store.review("case-2", Decision.ACCEPTED, "")


def test_a_failed_transaction_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store_of(tmp_path) as store:
        monkeypatch.setattr("time.time", lambda: "never")  # STRICT tables refuse text in this column
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
    with refused(BatchStateError, state_path(tmp_path), SCHEMA_VERSION + 1):
        BatchStore(state_path(tmp_path))


def test_a_file_that_is_not_a_state_is_refused_and_not_changed(tmp_path: Path) -> None:
    with refused(UsageError, tmp_path / "nothing"):
        BatchStore(tmp_path / "nothing")
    (tmp_path / "empty").touch()
    with refused(UsageError, tmp_path / "empty"):
        BatchStore(tmp_path / "empty")
    text = tmp_path / "text"
    text.write_bytes(b"not a database, but as long as one" * 100)
    with refused(BatchStateError, text):
        BatchStore(text, create=True)
    assert text.read_bytes().startswith(b"not a database")
    other = tmp_path / "other"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE of_another_program (x)")
    connection.close()
    with refused(BatchStateError, other):
        BatchStore(other, create=True)


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(OutOfSpaceError, tmp_path / "file"):
        BatchStore(tmp_path / "file" / "state.sqlite", create=True)


def test_a_missing_case_waits_again_when_its_scan_is_found_at_the_same_path(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1") as store:
        path = tmp_path / "case-1.nii.gz"
        store.mark_missing("case-1", Outcome(CaseState.FAILED, problem=SOURCE_MISSING, reason="It was removed."))
        assert store.case("case-1").state == CaseState.FAILED
        assert store.key_of(path, "signature") is None
        assert store.add(path, "signature", "case-1")
        assert (store.case("case-1").state, store.case("case-1").reason) == (CaseState.WAITING, "")


def test_an_unreadable_case_is_replaced_when_its_file_becomes_readable(tmp_path: Path) -> None:
    with store_of(tmp_path, "case-1") as store:
        for name in ("a", "b"):
            store.add(tmp_path / name, "signature", f"{UNREADABLE_PREFIX}{name}")
            store.end(f"{UNREADABLE_PREFIX}{name}", FAILED)
        assert store.add(tmp_path / "a", "now readable", "case-2")
        assert [case.key for case in store.cases()] == ["case-1", f"{UNREADABLE_PREFIX}b", "case-2"]
        assert store.retry([f"{UNREADABLE_PREFIX}b"]) == 1
        assert store.key_of(tmp_path / "b", "signature") is None  # the next look into the inbox finds it again
        assert [case.key for case in store.cases()] == ["case-1", "case-2"]
