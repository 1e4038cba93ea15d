"""The state of a batch: an SQLite file that a crash, at any moment, leaves consistent.

WAL mode with ``synchronous=FULL``: a transaction that has returned survives a power cut. One process writes (the
coordinator, which holds the outbox's lock) and any may read; `retry`, `cancel` and the review write single rows beside
it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import string
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote_from_bytes, unquote_to_bytes

from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import CaseRecord, CaseState, Decision, Duplicate, Outcome, Review, StageSeconds
from fseft_edge.runtime.errors import BatchStateError, OutOfSpaceError, UsageError

SCHEMA_VERSION: Final = 1
STATE_FOLDER: Final = ".fseft-edge"
STATE_FILE: Final = "state.sqlite"

UNREADABLE: Final = "unread-"
"""How keys begin of what lies in the inbox and cannot be read: they come from its place, not from its content."""

GONE: Final = "Gone"
"""The problem of a case whose scan was changed or taken away before it was done."""

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
_PLAIN: Final = (string.punctuation + " ").replace("%", "")
_BUSY_SECONDS: Final = 30.0


def state_path(outbox: Path, state: Path | None = None) -> Path:
    """Return where the state of an outbox lies: in it, unless another place is named."""
    return state or outbox / STATE_FOLDER / STATE_FILE


class BatchStore:
    """The cases of one outbox.

    A context manager; leaving it closes the file.

    Args:
        path: the SQLite file.
        create: make it where there is none.

    Raises:
        UsageError: there is none.
        BatchStateError: it is damaged, no state of a batch, or from a newer version.
        OutOfSpaceError: the disk is full or cannot be written to.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        if not create and not path.is_file():
            raise self._none()
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Every statement is its own transaction unless `_transaction` opens one. One thread at a time uses it.
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
                f"The state {self.path} was written by a newer version of fseft-edge (schema {version}).",
                remedy="Update fseft-edge on this machine, or use another OUTBOX.",
            )
        tables = {
            row["name"] for row in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        if version == SCHEMA_VERSION and tables >= {"meta", "cases", "sources"}:
            return
        if not tables and not create:
            raise self._none()
        if tables:
            raise BatchStateError(
                f"{self.path} is an SQLite file, but no state of a batch.", remedy="Name another OUTBOX or --state."
            )
        with self._transaction():
            for statement in _SCHEMA.split(";")[:-1]:
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _none(self) -> UsageError:
        return UsageError(
            f"There is no batch at {self.path}.",
            remedy="Name the OUTBOX of a `batch run`, and its --state if it had one.",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # What is there

    def cases(self) -> list[CaseRecord]:
        """Return every case, in the order in which they were found."""
        return [_record(row) for row in self._execute("SELECT * FROM cases ORDER BY found_at, key")]

    def case(self, key: str) -> CaseRecord:
        """Return one case.

        Raises:
            UsageError: there is none of that key.
        """
        rows = self._execute("SELECT * FROM cases WHERE key = ?", key)
        if not rows:
            raise UsageError(f"There is no case {key}.", remedy="`fseft-edge batch status OUTBOX` lists the cases.")
        return _record(rows[0])

    def duplicates(self) -> list[Duplicate]:
        """Return what lies in the inbox more than once, without the first of each."""
        rows = self._execute(
            "SELECT path, sources.key FROM sources JOIN cases USING (key) WHERE path <> source ORDER BY path"
        )
        return [Duplicate(_as_path(row["path"]), row["key"]) for row in rows]

    def key_of(self, source: Path, signature: str) -> str | None:
        """Return the case that what lies there, with this signature, has become; None where it is new."""
        rows = self._execute("SELECT key FROM sources WHERE path = ? AND signature = ?", _as_text(source), signature)
        return str(rows[0]["key"]) if rows else None

    def sources_of(self, key: str) -> dict[Path, str]:
        """Return where a case was found, with the signature it had there."""
        rows = self._execute("SELECT path, signature FROM sources WHERE key = ? ORDER BY path", key)
        return {_as_path(row["path"]): row["signature"] for row in rows}

    def next_waiting(self, *, exclusive: bool) -> CaseRecord | None:
        """Return the case that waits longest, of those that have to run alone or of the others."""
        rows = self._execute(
            "SELECT * FROM cases WHERE state = ? AND alone = ? ORDER BY found_at, key LIMIT 1",
            CaseState.WAITING,
            int(exclusive),
        )
        return _record(rows[0]) if rows else None

    def noted(self, name: str) -> str | None:
        """Return what is noted of the whole batch under a name: ``recipe``, ``outbox``."""
        rows = self._execute("SELECT value FROM meta WHERE name = ?", name)
        return str(rows[0]["value"]) if rows else None

    # What happens

    def note(self, name: str, value: str) -> None:
        """Note something of the whole batch."""
        self._execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", name, value)

    def add(self, source: Path, signature: str, key: str) -> bool:
        """Note what lies in the inbox; return whether a case waits for it: a new one, or one that was gone."""
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
            # The first place that a case was found in may be gone, or hold something else now.
            self._connection.execute(
                "UPDATE cases SET source = ? WHERE key = ? AND source NOT IN (SELECT path FROM sources WHERE key = ?)",
                (_as_text(source), key, key),
            )
            back = self._connection.execute(
                "UPDATE cases SET state = ?, finished_at = NULL, problem = '', reason = '', remedy = ''"
                " WHERE key = ? AND problem = ?",
                (CaseState.WAITING, key, GONE),
            ).rowcount
        return bool(new or back)

    def lose(self, key: str, outcome: Outcome) -> None:
        """Note that a case is nowhere any more; where it lay is forgotten, so that it is found again there."""
        self.end(key, outcome)
        self._execute("DELETE FROM sources WHERE key = ?", key)

    def forget_unreadable(self) -> None:
        """Forget what could not be read, so that it is looked at again."""
        with self._transaction():
            self._forget_unreadable("SELECT key FROM cases")

    def _forget_unreadable(self, keys: str, *values: object) -> None:
        """Forget cases that could not even be read to be known by their content."""
        found = [str(row[0]) for row in self._connection.execute(keys, values) if str(row[0]).startswith(UNREADABLE)]
        for key in found:
            self._connection.execute("DELETE FROM sources WHERE key = ?", (key,))
            self._connection.execute("DELETE FROM cases WHERE key = ?", (key,))

    def start(self, key: str) -> bool:
        """Note that a waiting case is begun; False when it waits no more."""
        return self._changed(
            "UPDATE cases SET state = ?, started_at = ? WHERE key = ? AND state = ?",
            CaseState.RUNNING,
            time.time(),
            key,
            CaseState.WAITING,
        )

    def end(self, key: str, outcome: Outcome) -> None:
        """Note how a case ended."""
        self._execute(
            "UPDATE cases SET state = ?, finished_at = ?, organs = ?, seconds = ?, problem = ?, reason = ?, remedy = ?"
            " WHERE key = ?",
            outcome.state,
            time.time(),
            json.dumps([asdict(organ) for organ in outcome.organs]),
            json.dumps(asdict(outcome.seconds)) if outcome.seconds else None,
            outcome.problem,
            outcome.reason,
            outcome.remedy,
            key,
        )

    def put_back(self, key: str, *, exclusive: bool = False, attempted: bool = False) -> int:
        """Let a case that was begun wait again; return how often it was attempted.

        Args:
            key: the case.
            exclusive: from now on nothing else runs beside it in its worker.
            attempted: the attempt counts against it.
        """
        with self._transaction():
            self._connection.execute(
                "UPDATE cases SET state = ?, started_at = NULL, alone = alone | ?, attempts = attempts + ?"
                " WHERE key = ? AND state = ?",
                (CaseState.WAITING, int(exclusive), int(attempted), key, CaseState.RUNNING),
            )
        return self.case(key).attempts

    def put_back_all(self) -> int:
        """Let all cases that were begun wait again, after the process that had them is gone; return how many."""
        with self._explained():
            return self._connection.execute(
                "UPDATE cases SET state = ?, started_at = NULL WHERE state = ?", (CaseState.WAITING, CaseState.RUNNING)
            ).rowcount

    def retry(self, keys: Sequence[str]) -> int:
        """Let ended cases that are not done wait again, their attempts forgotten; all of them when none is named.

        Returns:
            How many.
        """
        again = (CaseState.FAILED, CaseState.SET_ASIDE, CaseState.CANCELLED)
        wanted = [case for case in self._named(keys) if case.state in again]
        for case in wanted:
            if case.key.startswith(UNREADABLE):  # found anew, by its content
                with self._transaction():
                    self._forget_unreadable("SELECT ?", case.key)
                continue
            self._execute(
                "UPDATE cases SET state = ?, attempts = 0, started_at = NULL, finished_at = NULL, problem = '',"
                " reason = '', remedy = '' WHERE key = ? AND state = ?",
                CaseState.WAITING,
                case.key,
                case.state,
            )
        return len(wanted)

    def cancel(self, keys: Sequence[str]) -> int:
        """Take waiting cases out, all of them when none is named; a failure that is named too. Return how many."""
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

    def review(self, key: str, decision: Decision, note: str) -> None:
        """Note what a person made of a mask; a later decision takes the place of an earlier one.

        Raises:
            UsageError: there is no such case, or it is not done.
        """
        if self.case(key).state != CaseState.DONE:
            raise UsageError(f"{key} has no mask to decide on.", remedy="Review cases that are done.")
        self._execute(
            "UPDATE cases SET decision = ?, note = ?, decided_at = ? WHERE key = ?", decision, note, time.time(), key
        )

    def _named(self, keys: Sequence[str]) -> list[CaseRecord]:
        return [self.case(key) for key in keys] if keys else self.cases()

    def _changed(self, statement: str, *values: object) -> bool:
        with self._explained():
            return self._connection.execute(statement, values).rowcount > 0

    def _execute(self, statement: str, *values: object) -> list[sqlite3.Row]:
        with self._explained():
            return self._connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise BatchStateError(
                    f"The state {self.path} is held by another program.",
                    remedy="End what has it open. The state belongs on a local disk.",
                ) from error
            raise OutOfSpaceError(
                f"The state {self.path} cannot be written: {error}.",
                remedy="Free some space on that disk, or name a file on another by --state.",
            ) from error
        except sqlite3.DatabaseError as error:
            raise BatchStateError(
                f"The state {self.path} is damaged: {error}.",
                remedy="Move it away and run again: results that are there are recognised and not made again.",
            ) from error


def _record(row: sqlite3.Row) -> CaseRecord:
    seconds: dict[str, Any] | None = json.loads(row["seconds"]) if row["seconds"] else None
    review = None
    if row["decision"]:
        review = Review(Decision(row["decision"]), row["note"], row["decided_at"])
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
        organs=tuple(SegmentedOrgan.from_json(organ) for organ in json.loads(row["organs"])),
        seconds=StageSeconds(**seconds) if seconds else None,
        review=review,
    )


def _as_text(path: Path) -> str:
    """Return a path as text that SQLite takes, whatever bytes are in it: all but plain ASCII is percent-encoded."""
    return quote_from_bytes(os.fsencode(path), safe=_PLAIN)


def _as_path(text: str) -> Path:
    return Path(os.fsdecode(unquote_to_bytes(text)))
