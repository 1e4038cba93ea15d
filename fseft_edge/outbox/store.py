"""The state of a batch: an SQLite file that stays consistent if a crash happens at any moment.

The database uses WAL mode with ``synchronous=FULL``, so a completed transaction survives a power cut. The coordinator,
which has locked the outbox, is the main writer. `retry`, `cancel` and the review change single rows at the same time.
Any process may read.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import string
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote_from_bytes, unquote_to_bytes

from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import (
    CaseRecord,
    CaseState,
    CorrectedOrgan,
    Correction,
    Decision,
    Duplicate,
    Origin,
    Outcome,
    Review,
    StageSeconds,
)
from fseft_edge.runtime.errors import BatchStateError, OutOfSpaceError, UsageError
from fseft_edge.runtime.system.json_text import parse_json

SCHEMA_VERSION: Final = 4
STATE_FOLDER: Final = ".fseft-edge"
STATE_FILE: Final = "state.sqlite"

UNREADABLE_PREFIX: Final = "unread-"
"""Prefix of the keys of files and folders that cannot be read. Such a key depends on the path, not on the content."""

SOURCE_MISSING: Final = "Gone"
"""Value of ``problem`` of a case whose scan was changed or removed before it was segmented."""

FINGERPRINT_KEY: Final = "recipe"  # earlier files use this name
"""Key of the options fingerprint in the state file and in the record of each case."""

# The column `alone` is the parameter `exclusive` in the code; earlier files use this name.
_SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE cases (
    key TEXT PRIMARY KEY, source TEXT NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
    alone INTEGER NOT NULL DEFAULT 0, found_at REAL NOT NULL, started_at REAL, finished_at REAL,
    problem TEXT NOT NULL DEFAULT '', reason TEXT NOT NULL DEFAULT '', remedy TEXT NOT NULL DEFAULT '',
    organs TEXT NOT NULL DEFAULT '[]', seconds TEXT, decision TEXT, note TEXT, decided_at REAL
) STRICT;
CREATE TABLE sources (path TEXT PRIMARY KEY, signature TEXT NOT NULL, key TEXT NOT NULL REFERENCES cases (key)) STRICT;
"""
_LATER: Final = {
    2: """
ALTER TABLE cases ADD COLUMN warnings TEXT NOT NULL DEFAULT '[]';
ALTER TABLE cases ADD COLUMN superseded_by TEXT NOT NULL DEFAULT '';
ALTER TABLE cases ADD COLUMN series TEXT NOT NULL DEFAULT '';
CREATE TABLE contents (key TEXT PRIMARY KEY, first TEXT NOT NULL, files TEXT NOT NULL) STRICT;
CREATE INDEX contents_first ON contents (first);
""",
    3: """
CREATE TABLE decisions (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL REFERENCES cases (key), decision TEXT NOT NULL, note TEXT NOT NULL,
    at REAL NOT NULL, reviewer TEXT NOT NULL, mask_sha256 TEXT NOT NULL
) STRICT;
INSERT INTO decisions (key, decision, note, at, reviewer, mask_sha256)
    SELECT key, decision, note, decided_at, '', '' FROM cases WHERE decision NOTNULL ORDER BY decided_at;
ALTER TABLE cases DROP COLUMN decision;
ALTER TABLE cases DROP COLUMN note;
ALTER TABLE cases DROP COLUMN decided_at;
CREATE INDEX decisions_of_case ON decisions (key);
CREATE VIEW records AS SELECT cases.*, (
    SELECT json_group_array(json_array(number, decision, note, at, reviewer, mask_sha256))
    FROM decisions WHERE decisions.key = cases.key
) AS decisions FROM cases;
""",
    4: """
CREATE TABLE corrections (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL REFERENCES cases (key), at REAL NOT NULL, reviewer TEXT NOT NULL,
    origin TEXT NOT NULL, mask_sha256 TEXT NOT NULL, based_on TEXT NOT NULL, organs TEXT NOT NULL
) STRICT;
CREATE INDEX corrections_of_case ON corrections (key);
DROP VIEW records;
CREATE VIEW records AS SELECT cases.*, (
    SELECT json_group_array(json_array(number, decision, note, at, reviewer, mask_sha256))
    FROM decisions WHERE decisions.key = cases.key
) AS decisions, (
    SELECT json_group_array(json_array(number, at, reviewer, origin, mask_sha256, based_on, json(organs)))
    FROM corrections WHERE corrections.key = cases.key
) AS corrections FROM cases;
""",
}
"""What each later version of the schema adds. A file of an earlier version gets it when it is opened."""

_PLAIN: Final = (string.punctuation + " ").replace("%", "")
_BUSY_SECONDS: Final = 30.0
_LOCKED: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_NOT_WRITABLE: Final = {
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM),
}
_UNLESS_SUPERSEDED: Final = f"CASE WHEN superseded_by = '' THEN ? ELSE '{CaseState.SUPERSEDED}' END"
"""The new state of a running case, in SQL."""


def state_path(outbox: Path, state: Path | None = None) -> Path:
    """Return the path of the state file: ``state`` if it is given, else the state file in the outbox."""
    return state or outbox / STATE_FOLDER / STATE_FILE


@dataclass(frozen=True)
class Superseded:
    """Keys of earlier cases that a new case supersedes, and of earlier masks whose file or folder it replaced."""

    keys: tuple[str, ...]
    replaced: tuple[str, ...]


class BatchStore:
    """The state of all cases of one outbox.

    This is a context manager; leaving the context closes the file.

    Args:
        path: the SQLite file.
        create: create the file if it does not exist.

    Raises:
        UsageError: the file does not exist.
        BatchStateError: the file is damaged, is not the state of a batch, or was written by a newer version.
        OutOfSpaceError: the disk is full or not writable.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        if not create and not path.is_file():
            raise self._no_batch()
        with self._database_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Every statement is a transaction unless `_transaction` opens a larger one. The caller makes sure that only
            # one thread at a time uses the connection.
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._prepare(create=create)

    def _prepare(self, *, create: bool) -> None:
        version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise BatchStateError(
                f"The state file {self.path} was written by a newer version of fseft-edge (schema {version}; this "
                f"version reads {SCHEMA_VERSION}).",
                remedy="Update fseft-edge on this machine, or give another OUTBOX.",
            )
        tables = {
            row["name"] for row in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        if version > 0 and tables >= {"meta", "cases", "sources"}:
            self._upgrade(version)
            return
        if not tables and not create:
            raise self._no_batch()
        if tables:
            raise BatchStateError(
                f"{self.path} is an SQLite file, but not the state file of a batch.",
                remedy="Give another OUTBOX, or another file with --state.",
            )
        with self._transaction():
            for statement in _SCHEMA.split(";")[:-1]:
                self._connection.execute(statement)
            self._connection.execute("PRAGMA user_version = 1")
        self._upgrade(1)

    def _upgrade(self, version: int) -> None:
        """Add what later versions of the schema have, unless another process has just done it."""
        if version == SCHEMA_VERSION:
            return
        with self._transaction():
            reached = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
            for later in range(reached + 1, SCHEMA_VERSION + 1):
                for statement in _LATER[later].split(";")[:-1]:
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {max(reached, SCHEMA_VERSION)}")

    def _no_batch(self) -> UsageError:
        return UsageError(
            f"There is no batch: the state file {self.path} does not exist or is empty.",
            remedy="Name the OUTBOX of a `batch run`, and its --state file if that run had one.",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the state file."""
        self._connection.close()

    # Queries

    def cases(self) -> list[CaseRecord]:
        """Return all cases in the order in which they were found."""
        return [self._recorded(row) for row in self._execute("SELECT * FROM records ORDER BY found_at, key")]

    def case(self, key: str) -> CaseRecord:
        """Return the case with this key.

        Raises:
            UsageError: there is no case with this key.
        """
        rows = self._execute("SELECT * FROM records WHERE key = ?", key)
        if not rows:
            raise UsageError(
                f"There is no case {key} in this batch.", remedy="List the cases with `fseft-edge batch status OUTBOX`."
            )
        return self._recorded(rows[0])

    def duplicates(self) -> list[Duplicate]:
        """Return the files and folders whose content was already found elsewhere, without the source of each case."""
        rows = self._execute(
            "SELECT path, sources.key FROM sources JOIN cases USING (key) WHERE path <> source ORDER BY path"
        )
        return [Duplicate(_as_path(row["path"]), row["key"]) for row in rows]

    def key_of(self, source: Path, signature: str) -> str | None:
        """Return the key of the case that was found at this path with this signature; None if it is new."""
        rows = self._execute("SELECT key FROM sources WHERE path = ? AND signature = ?", _as_text(source), signature)
        return str(rows[0]["key"]) if rows else None

    def sources_of(self, key: str) -> dict[Path, str]:
        """Return the paths at which a case was found, with the signature at each path."""
        rows = self._execute("SELECT path, signature FROM sources WHERE key = ? ORDER BY path", key)
        return {_as_path(row["path"]): row["signature"] for row in rows}

    def next_waiting(self, *, exclusive: bool) -> CaseRecord | None:
        """Return the waiting case that was found first, among the exclusive cases or among all others."""
        rows = self._execute(
            "SELECT * FROM records WHERE state = ? AND alone = ? ORDER BY found_at, key LIMIT 1",
            CaseState.WAITING,
            int(exclusive),
        )
        return self._recorded(rows[0]) if rows else None

    def metadata(self, name: str) -> str | None:
        """Return a value of the whole batch, :data:`FINGERPRINT_KEY` or ``outbox``; None if it is not set."""
        rows = self._execute("SELECT value FROM meta WHERE name = ?", name)
        return str(rows[0]["value"]) if rows else None

    # Changes

    def set_metadata(self, name: str, value: str) -> None:
        """Set a value that belongs to the whole batch."""
        self._execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", name, value)

    def add(self, source: Path, signature: str, key: str, files: Collection[str] = ()) -> bool:
        """Record a scan of the inbox.

        Args:
            source: file or folder in the inbox.
            signature: signature of the file or folder.
            key: key of the case.
            files: digests of the files of the scan, see :class:`fseft_edge.outbox.content_key.Content`.

        Returns:
            Whether this made it a waiting case: it is new, or was missing, or was superseded by a case that is no
            longer in the inbox.
        """
        with self._transaction():
            self._forget_unreadable("SELECT key FROM sources WHERE path = ?", _as_text(source))
            new = self._connection.execute(
                "INSERT OR IGNORE INTO cases (key, source, state, found_at) VALUES (?, ?, ?, ?)",
                (key, _as_text(source), CaseState.WAITING, time.time()),
            ).rowcount
            self._connection.execute(
                "INSERT OR REPLACE INTO sources (path, signature, key) VALUES (?, ?, ?)",
                (_as_text(source), signature, key),
            )
            # The path recorded as source may be missing now, or may have other content.
            self._connection.execute(
                "UPDATE cases SET source = ? WHERE key = ? AND source NOT IN (SELECT path FROM sources WHERE key = ?)",
                (_as_text(source), key, key),
            )
            if files:
                self._connection.execute(
                    "INSERT OR REPLACE INTO contents (key, first, files) VALUES (?, ?, ?)",
                    (key, min(files), " ".join(sorted(files))),
                )
            found_again = self._connection.execute(
                "UPDATE cases SET state = ?, finished_at = NULL, problem = '', reason = '', remedy = '',"
                " warnings = '[]', superseded_by = '' WHERE key = ? AND (superseded_by <> '' OR problem = ?)"
                " AND superseded_by NOT IN (SELECT key FROM sources)",
                (CaseState.WAITING, key, SOURCE_MISSING),
            ).rowcount
        return bool(new or found_again)

    def supersede_earlier(self, source: Path, key: str) -> Superseded:
        """Compare a case that was just found with earlier cases, and mark those whose place it takes.

        An earlier case is superseded if all of its files are also files of this case: a series that arrived in parts.
        It is also superseded if its file or folder now has the content of this case, it has no other place in the
        inbox, and either it has no mask, or it shares files with this case. Any other mask whose file or folder now has
        the content of this case gets a warning, because it is not known whether it shows the same scan.

        Args:
            source: file or folder in which this case was found.
            key: key of this case.
        """
        superseded, replaced = [], []
        with self._transaction():
            files = self._files(key)
            for row in self._connection.execute(
                "SELECT * FROM cases WHERE key <> ? AND superseded_by = '' AND (source = ? OR key IN"
                " (SELECT key FROM contents WHERE first IN (SELECT value FROM json_each(?)))) ORDER BY found_at, key",
                (key, _as_text(source), json.dumps(sorted(files))),
            ).fetchall():
                earlier = self._files(row["key"])
                contained = bool(earlier) and earlier < files
                placed = self._connection.execute("SELECT 1 FROM sources WHERE key = ?", (row["key"],)).fetchone()
                if not contained and (placed or row["source"] != _as_text(source)):
                    continue
                if contained or row["state"] != CaseState.DONE or (earlier & files and not files < earlier):
                    self._connection.execute(
                        "UPDATE cases SET superseded_by = ?, state = CASE WHEN state = ? THEN state ELSE ? END"
                        " WHERE key = ?",
                        (key, CaseState.RUNNING, CaseState.SUPERSEDED, row["key"]),
                    )
                    self._connection.execute(
                        "UPDATE cases SET superseded_by = ? WHERE superseded_by = ?", (key, row["key"])
                    )
                    superseded.append(str(row["key"]))
                elif self._warn(row["key"], _replaced(key)):
                    replaced.append(str(row["key"]))
        return Superseded(tuple(superseded), tuple(replaced))

    def _files(self, key: str) -> frozenset[str]:
        row = self._connection.execute("SELECT files FROM contents WHERE key = ?", (key,)).fetchone()
        return frozenset(str(row["files"]).split()) if row else frozenset()

    def _warn(self, key: str, warning: str) -> bool:
        """Add a warning to a case; return False if the case already has it."""
        (text,) = self._connection.execute("SELECT warnings FROM cases WHERE key = ?", (key,)).fetchone()
        warnings = parse_json(text)
        if warning in warnings:
            return False
        self._connection.execute("UPDATE cases SET warnings = ? WHERE key = ?", (json.dumps([*warnings, warning]), key))
        return True

    def mark_missing(self, key: str, outcome: Outcome) -> None:
        """Record that the scan of a case is missing; delete its paths, so that the scan can be found there again."""
        self.end(key, outcome)
        self._execute("DELETE FROM sources WHERE key = ?", key)

    def forget_unreadable(self) -> None:
        """Delete all cases that could not be read, so that the next look into the inbox finds them again."""
        with self._transaction():
            self._forget_unreadable("SELECT key FROM cases")

    def _forget_unreadable(self, keys: str, *values: object) -> None:
        """Delete those of the selected cases that have no content key because they could not be read."""
        found = [
            str(row[0]) for row in self._connection.execute(keys, values) if str(row[0]).startswith(UNREADABLE_PREFIX)
        ]
        for key in found:
            self._connection.execute("DELETE FROM sources WHERE key = ?", (key,))
            self._connection.execute("DELETE FROM cases WHERE key = ?", (key,))

    def start(self, key: str) -> bool:
        """Mark a waiting case as running; return False if it is not waiting any more."""
        return self._changed(
            "UPDATE cases SET state = ?, started_at = ? WHERE key = ? AND state = ?",
            CaseState.RUNNING,
            time.time(),
            key,
            CaseState.WAITING,
        )

    def end(self, key: str, outcome: Outcome) -> tuple[str, ...]:
        """Record the outcome of a case. A case that was superseded while it was running becomes superseded.

        If the outcome is a mask, cases with other files of the same DICOM series get a warning. Earlier masks of
        another series are no longer superseded by this case: their folder got a further series.

        Returns:
            Keys of the masks that are no longer superseded.
        """
        with self._transaction():
            self._end(key, outcome)
            if outcome.state != CaseState.DONE or not outcome.series:
                return ()
            restored = self._connection.execute(
                "SELECT key FROM cases WHERE superseded_by = ? AND series NOT IN ('', ?) AND seconds NOTNULL",
                (key, outcome.series),
            ).fetchall()
            for other in restored:
                self._connection.execute(
                    "UPDATE cases SET state = ?, superseded_by = '' WHERE key = ?", (CaseState.DONE, other["key"])
                )
                self._warn(other["key"], _replaced(key))
            if self._connection.execute("SELECT superseded_by FROM cases WHERE key = ?", (key,)).fetchone()[0]:
                return tuple(str(other["key"]) for other in restored)
            for other in self._connection.execute(
                "SELECT key FROM cases WHERE series = ? AND key <> ? AND state = ?",
                (outcome.series, key, CaseState.DONE),
            ).fetchall():
                self._warn(key, _same_series(other["key"]))
                self._warn(other["key"], _same_series(key))
            return tuple(str(other["key"]) for other in restored)

    def _end(self, key: str, outcome: Outcome) -> None:
        self._connection.execute(
            f"UPDATE cases SET state = {_UNLESS_SUPERSEDED}, finished_at = ?, organs = ?, seconds = ?, problem = ?,"  # noqa: S608 - a constant
            " reason = ?, remedy = ?, warnings = ?, series = ? WHERE key = ?",
            (
                outcome.state,
                time.time(),
                json.dumps([asdict(organ) for organ in outcome.organs]),
                json.dumps(asdict(outcome.seconds)) if outcome.seconds else None,
                outcome.problem,
                outcome.reason,
                outcome.remedy,
                json.dumps(outcome.warnings),
                outcome.series,
                key,
            ),
        )

    def requeue(self, key: str, *, exclusive: bool = False, attempted: bool = False) -> int:
        """Return a running case to the queue.

        Args:
            key: key of the case.
            exclusive: from now on, run the case without other cases in its worker.
            attempted: count this attempt.

        Returns:
            Number of counted attempts of the case.
        """
        with self._transaction():
            self._connection.execute(
                f"UPDATE cases SET state = {_UNLESS_SUPERSEDED}, started_at = NULL, alone = alone | ?,"  # noqa: S608 - a constant
                " attempts = attempts + ? WHERE key = ? AND state = ?",
                (CaseState.WAITING, int(exclusive), int(attempted), key, CaseState.RUNNING),
            )
        return self.case(key).attempts

    def requeue_running(self) -> int:
        """Return all running cases to the queue, after the process that ran them has ended. Return their number."""
        with self._database_errors():
            return self._connection.execute(
                f"UPDATE cases SET state = {_UNLESS_SUPERSEDED}, started_at = NULL WHERE state = ?",  # noqa: S608 - a constant
                (CaseState.WAITING, CaseState.RUNNING),
            ).rowcount

    def retry(self, keys: Sequence[str] = ()) -> int:
        """Return failed, set-aside and cancelled cases to the queue, with their attempts set to 0.

        Args:
            keys: keys of the cases; empty means all such cases.

        Returns:
            Number of cases returned to the queue.
        """
        again = (CaseState.FAILED, CaseState.SET_ASIDE, CaseState.CANCELLED)
        wanted = [case for case in self._named(keys) if case.state in again]
        for case in wanted:
            if case.key.startswith(UNREADABLE_PREFIX):  # the next look into the inbox finds it again
                with self._transaction():
                    self._forget_unreadable("SELECT ?", case.key)
                continue
            self._execute(
                "UPDATE cases SET state = ?, attempts = 0, started_at = NULL, finished_at = NULL, problem = '',"
                " reason = '', remedy = '', warnings = '[]' WHERE key = ? AND state = ?",
                CaseState.WAITING,
                case.key,
                case.state,
            )
        return len(wanted)

    def cancel(self, keys: Sequence[str] = ()) -> int:
        """Cancel waiting cases.

        Args:
            keys: keys of the cases; empty means all waiting cases. Failed and set-aside cases are cancelled only if
                their key is given.

        Returns:
            Number of cancelled cases.
        """
        may_be = (CaseState.WAITING, CaseState.FAILED, CaseState.SET_ASIDE) if keys else (CaseState.WAITING,)
        return sum(
            self._changed(
                "UPDATE cases SET state = ?, finished_at = ? WHERE key = ? AND state = ?",
                CaseState.CANCELLED,
                time.time(),
                case.key,
                case.state,
            )
            for case in self._named(keys)
            if case.state in may_be
        )

    def review(self, key: str, decision: Decision, note: str, *, reviewer: str, mask_sha256: str) -> None:
        """Record the decision of a reviewer on a mask. The latest decision counts; earlier ones are kept.

        Args:
            key: key of the case.
            decision: the decision.
            note: free text of the reviewer.
            reviewer: name of the person who decided.
            mask_sha256: sha256 of the mask file that was displayed, as hexadecimal digits.

        Raises:
            UsageError: there is no case with this key, or the case is not done.
        """
        self.reviewable(key)
        self._execute(
            "INSERT INTO decisions (key, decision, note, at, reviewer, mask_sha256) VALUES (?, ?, ?, ?, ?, ?)",
            *(key, decision, note, time.time(), reviewer, mask_sha256),
        )

    def correct(self, key: str, correction: Correction) -> None:
        """Record a correction of a mask. Earlier corrections are kept.

        Raises:
            UsageError: there is no case with this key, or the case is not done.
        """
        self.reviewable(key)
        self._execute(
            "INSERT INTO corrections (key, at, reviewer, origin, mask_sha256, based_on, organs)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(key, correction.at, correction.reviewer, correction.origin, correction.mask_sha256, correction.based_on),
            json.dumps([asdict(organ) for organ in correction.organs]),
        )

    def reviewable(self, key: str) -> CaseRecord:
        """Return a case whose mask a person can correct, accept or reject.

        Raises:
            UsageError: there is no case with this key, or the case is not done.
        """
        case = self.case(key)
        if case.state == CaseState.SUPERSEDED:
            raise UsageError(
                f"{key} is superseded by {case.superseded_by}, so its mask cannot be reviewed.",
                remedy=f"Review {case.superseded_by}.",
            )
        if case.state != CaseState.DONE:
            raise UsageError(
                f"{key} has no mask that can be reviewed.", remedy="Review only cases in the state `done`."
            )
        return case

    def _named(self, keys: Sequence[str]) -> list[CaseRecord]:
        return [self.case(key) for key in keys] if keys else self.cases()

    def _changed(self, statement: str, *values: object) -> bool:
        with self._database_errors():
            return self._connection.execute(statement, values).rowcount > 0

    def _execute(self, statement: str, *values: object) -> list[sqlite3.Row]:
        with self._database_errors():
            return self._connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._database_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _recorded(self, row: sqlite3.Row) -> CaseRecord:
        try:
            return _record(row)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise self._damaged("the record of a case is not valid") from error

    def _damaged(self, reason: object) -> BatchStateError:
        return BatchStateError(
            f"The state file {self.path} is damaged: {reason}.",
            remedy="Move the file away and run the batch again. Existing results are recognised and kept.",
        )

    @contextlib.contextmanager
    def _database_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, UnicodeDecodeError, OSError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _LOCKED:
                raise BatchStateError(
                    f"Another program has locked the state file {self.path}.",
                    remedy="Close the program that has the file open. Keep the state file on a local disk.",
                ) from error
            if code in _NOT_WRITABLE or isinstance(error, OSError):
                raise OutOfSpaceError(
                    f"The state file {self.path} cannot be written: {error}.",
                    remedy="Free some space on that disk, or give a file on another disk with --state.",
                ) from error
            raise self._damaged(error) from error


def _replaced(key: str) -> str:
    return (
        f"The file or folder of this scan has other content now, which is {key}. If {key} is a newer version of the "
        "same scan, reject this mask."
    )


def _same_series(key: str) -> str:
    return (
        f"{key} has other files of the same DICOM series. The series may have arrived in several parts, or twice with "
        "different headers. Compare both cases before you use a mask; put all files of a series into one folder."
    )


def _record(row: sqlite3.Row) -> CaseRecord:
    seconds: dict[str, Any] | None = parse_json(row["seconds"]) if row["seconds"] else None
    return CaseRecord(
        key=row["key"],
        source=_as_path(row["source"]),
        state=CaseState(row["state"]),
        attempts=row["attempts"],
        found_at=row["found_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        problem=row["problem"],
        reason=row["reason"],
        remedy=row["remedy"],
        organs=tuple(SegmentedOrgan.from_json(organ) for organ in parse_json(row["organs"])),
        seconds=StageSeconds(**seconds) if seconds else None,
        decisions=tuple(
            Review(Decision(decision), *rest) for _, decision, *rest in sorted(parse_json(row["decisions"]))
        ),
        corrections=tuple(_correction(fields) for _, *fields in sorted(parse_json(row["corrections"]))),
        warnings=tuple(map(str, parse_json(row["warnings"]))),
        superseded_by=row["superseded_by"],
        series=row["series"],
    )


def _correction(fields: Sequence[Any]) -> Correction:
    at, reviewer, origin, mask_sha256, based_on, organs = fields
    compared = tuple(CorrectedOrgan(**organ) for organ in organs)
    return Correction(at, reviewer, Origin(origin), mask_sha256, based_on, compared)


def _as_text(path: Path) -> str:
    """Return a path as ASCII text: every byte outside printable ASCII is percent-encoded, so any path can be stored."""
    return quote_from_bytes(os.fsencode(path), safe=_PLAIN)


def _as_path(text: str) -> Path:
    return Path(os.fsdecode(unquote_to_bytes(text)))
