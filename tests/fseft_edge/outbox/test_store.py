"""The state of a batch: everything written can be read after a restart, and other files are refused."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import pytest
from doubles.errors import refused

from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import CaseState, Decision, Outcome, Review, StageSeconds
from fseft_edge.outbox.store import (
    _SCHEMA,
    SCHEMA_VERSION,
    SOURCE_MISSING,
    UNREADABLE_PREFIX,
    BatchStore,
    Superseded,
    state_path,
)
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
        store.review("case-1", Decision.REJECTED, "the left one is missing", reviewer="Ada", mask_sha256="01")
        first = store.case("case-1").review
        note = "'; DROP TABLE cases; --"
        store.review("case-1", Decision.ACCEPTED, note, reviewer="Bo é", mask_sha256="02")
        case = store.case("case-1")
        assert case.review == case.decisions[-1]
        assert case.decisions[0] == first
        assert [(review.decision, review.note, review.reviewer, review.mask_sha256) for review in case.decisions] == [
            (Decision.REJECTED, "the left one is missing", "Ada", "01"),
            (Decision.ACCEPTED, note, "Bo é", "02"),
        ]
        assert datetime.fromisoformat(case.decisions[1].when).timestamp() == int(case.decisions[1].at)
        assert case.decisions[1].when.endswith("+00:00")
        with refused(UsageError, "case-2"):
            store.review("case-2", Decision.ACCEPTED, "", reviewer="Ada", mask_sha256="01")


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


def found(store: BatchStore, folder: Path, name: str, key: str, files: str) -> Superseded:
    """Record a scan with one file for each letter of ``files``."""
    store.add(folder / name, f"signature of {files}", key, tuple(files))
    return store.supersede_earlier(folder / name, key)


def states(store: BatchStore) -> dict[str, tuple[str, str]]:
    return {case.key: (case.state.value, case.superseded_by) for case in store.cases()}


def test_a_series_with_more_files_supersedes_its_part_in_the_same_and_in_another_folder(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        found(store, tmp_path, "a", "part", "abc")
        store.end("part", DONE)
        store.review("part", Decision.ACCEPTED, "", reviewer="Ada", mask_sha256="01")
        assert found(store, tmp_path, "a", "whole", "abcdef") == Superseded(("part",), ())
        assert states(store) == {"part": ("superseded", "whole"), "whole": ("waiting", "")}
        assert store.case("part").review is not None
        with refused(UsageError, "part", "whole"):
            store.review("part", Decision.ACCEPTED, "", reviewer="Ada", mask_sha256="01")
        assert found(store, tmp_path, "b", "elsewhere", "abcdefg") == Superseded(("whole",), ())
        assert states(store)["part"] == ("superseded", "elsewhere")
        assert found(store, tmp_path, "c", "other", "cdx") == Superseded((), ())
        assert store.retry([]) == store.cancel(["part"]) == 0


def test_a_case_without_a_mask_is_superseded_by_any_other_content_of_its_file(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        for name, outcome in (("failed", FAILED), ("waiting", None), ("copied", FAILED)):
            found(store, tmp_path, name, name, name[0])
            if outcome:
                store.end(name, outcome)
        found(store, tmp_path, "copy", "copied", "c")
        for name in ("failed", "waiting", "copied"):
            found(store, tmp_path, name, f"new {name}", name.upper())
        assert {key: by for key, (_, by) in states(store).items() if by} == {
            "failed": "new failed",
            "waiting": "new waiting",
        }


def test_a_mask_whose_file_has_other_content_stays_with_a_warning(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        found(store, tmp_path, "a", "first", "a")
        store.end("first", DONE)
        assert found(store, tmp_path, "a", "second", "b") == Superseded((), ("first",))
        case = store.case("first")
        assert (case.state, case.warnings[:-1]) == (CaseState.DONE, DONE.warnings)
        assert "second" in case.warnings[-1]


def test_a_mask_of_a_folder_from_which_files_were_removed_is_not_superseded(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        found(store, tmp_path, "a", "whole", "abcd")
        store.end("whole", DONE)
        assert found(store, tmp_path, "a", "part", "ab") == Superseded((), ("whole",))
        found(store, tmp_path, "b", "exchanged", "xyz")
        store.end("exchanged", replace(DONE, series="other"))
        assert found(store, tmp_path, "b", "one other file", "xyw") == Superseded(("exchanged",), ())


def test_a_running_case_is_superseded_when_it_ends(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        for key, files in (("ends", "ab"), ("crashes", "cd"), ("is killed", "ef")):
            found(store, tmp_path, key, key, files)
            store.start(key)
            assert found(store, tmp_path, f"{key} again", f"{key}, more", f"{files}x") == Superseded((key,), ())
            assert store.case(key).state == CaseState.RUNNING
        store.end("ends", DONE)
        store.requeue("crashes", attempted=True)
        assert store.requeue_running() == 1
        assert {key: by for key, (state, by) in states(store).items() if state == "superseded"} == {
            "ends": "ends, more",
            "crashes": "crashes, more",
            "is killed": "is killed, more",
        }
        assert "same DICOM series" not in " ".join(store.case("ends").warnings)


def test_a_superseded_case_waits_again_when_the_folder_has_its_old_content(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        found(store, tmp_path, "a", "first", "ab")
        store.end("first", DONE)
        found(store, tmp_path, "a", "second", "abc")
        assert not store.add(tmp_path / "copy", "s", "first", "ab")
        assert states(store)["first"] == ("superseded", "second")
        assert store.add(tmp_path / "a", "signature of ab", "first", "ab")
        assert states(store)["first"] == ("waiting", "")


def test_a_folder_with_a_further_series_does_not_supersede_the_mask_of_the_first(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        found(store, tmp_path, "a", "first", "ab")
        store.end("first", DONE)
        found(store, tmp_path, "a", "second", "abc")
        assert states(store)["first"] == ("superseded", "second")
        assert store.end("second", replace(DONE, series="another")) == ("first",)
        assert set(states(store).values()) == {("done", "")}
        assert "second" in store.case("first").warnings[-1]


def test_two_masks_with_different_files_of_one_series_get_a_warning(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        for key, files, series in (("first", "ab", "s"), ("second", "cd", "s"), ("nifti", "e", ""), ("other", "f", "")):
            found(store, tmp_path, key, key, files)
            store.end(key, replace(DONE, series=series, warnings=()))
        warnings = {case.key: case.warnings for case in store.cases()}
        assert [len(warnings[key]) for key in ("first", "second", "nifti", "other")] == [1, 1, 0, 0]
        assert warnings["first"][0].startswith("second has other files of the same DICOM series.")
        assert warnings["second"][0].startswith("first ")


def test_a_state_file_of_the_first_version_gets_the_new_columns(tmp_path: Path) -> None:
    state_path(tmp_path).parent.mkdir()
    connection = sqlite3.connect(state_path(tmp_path))
    connection.executescript(f"{_SCHEMA} PRAGMA user_version = 1;")
    connection.execute(
        "INSERT INTO cases (key, source, state, found_at, organs, decision, note, decided_at)"
        " VALUES ('case-1', ?, 'done', 1.0, ?, 'accepted', 'good', 2.5)",
        (f"{tmp_path}/case-1.nii.gz", json.dumps([asdict(organ) for organ in DONE.organs])),
    )
    connection.commit()
    connection.close()
    for _ in range(2):
        with BatchStore(state_path(tmp_path)) as store:
            (case,) = store.cases()
            assert (case.state, case.organs, case.warnings, case.superseded_by) == (CaseState.DONE, DONE.organs, (), "")
            assert case.decisions == (Review(Decision.ACCEPTED, "good", 2.5, reviewer="", mask_sha256=""),)
    with BatchStore(state_path(tmp_path)) as store:  # its files are unknown, so a larger folder cannot supersede it
        assert found(store, tmp_path, "case-1.nii.gz", "case-2", "ab") == Superseded((), ("case-1",))


@pytest.mark.parametrize(
    "change",
    [
        "PRAGMA user_version = -1",
        "ALTER TABLE cases DROP COLUMN reason",
        "ALTER TABLE sources DROP COLUMN signature",
        "UPDATE cases SET organs = 'x'",
        "UPDATE cases SET organs = '-1'",
        "UPDATE cases SET organs = '[{\"name\": 1}]'",
        "UPDATE cases SET seconds = '{\"read\": 1}'",
        "UPDATE cases SET warnings = replace(hex(zeroblob(50000)), '0', '[')",
        "UPDATE cases SET state = 'unheard_of'",
        "UPDATE cases SET key = CAST(X'ff' AS TEXT), state = CAST(X'ff' AS TEXT)",
    ],
    ids=lambda change: change[:50],
)
def test_a_state_with_content_that_no_version_wrote_is_damaged(tmp_path: Path, change: str) -> None:
    with store_of(tmp_path, "case-1"):
        pass
    with closing(sqlite3.connect(state_path(tmp_path), isolation_level=None)) as database:
        database.execute(change)
    with refused(BatchStateError, state_path(tmp_path)), BatchStore(state_path(tmp_path)) as store:
        store.cases()
        store.sources_of("case-1")
