"""The outbox folder: locks against a second run, checks of its disk, and removal of temporary files."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from fseft_edge.outbox.store import STATE_FOLDER, state_path
from fseft_edge.runtime.errors import EnvironmentProblemError, OutOfSpaceError, UsageError
from fseft_edge.runtime.system.atomic import atomic_path
from fseft_edge.runtime.system.machine import network_file_system

_PROBE_BYTES: Final = 1 << 20


def check_folders(inbox: Path, outbox: Path) -> None:
    """Check that results in the outbox cannot be found as scans in the inbox.

    Raises:
        UsageError: the outbox is a file, or inbox and outbox are the same folder, or one is inside the other.
    """
    if outbox.exists() and not outbox.is_dir():
        raise UsageError(f"The outbox {outbox} is a file, not a folder.", remedy="Give a folder for the results.")
    inbox, outbox = inbox.resolve(), outbox.resolve()
    if inbox == outbox or inbox in outbox.parents or outbox in inbox.parents:
        raise UsageError(
            f"The inbox {inbox} and the outbox {outbox} overlap, so results would be read as scans.",
            remedy="Give two folders of which neither contains the other.",
        )


def checked_state_path(outbox: Path, state: Path | None) -> Path:
    """Return the path of the state file after a check of its file system: SQLite needs a local disk.

    Raises:
        UsageError: the path is on a network drive.
    """
    path = state_path(outbox, state)
    kind = network_file_system(path)
    if kind is not None:
        raise UsageError(
            f"The state file {path} is on a network drive ({kind}), where a crash can damage it.",
            remedy="Give a file on a local disk with --state. The outbox may stay on the network drive.",
        )
    return path


@contextlib.contextmanager
def lock_outbox(outbox: Path, state: Path) -> Iterator[None]:
    """Lock the outbox and the state file, so that only one run at a time writes to them.

    Raises:
        UsageError: another run has locked the outbox or the state file.
        OutOfSpaceError: a lock file cannot be written.
    """
    locks = dict.fromkeys([outbox / STATE_FOLDER / "lock", state.with_name(f"{state.name}.lock")])
    with contextlib.ExitStack() as stack:
        for path in locks:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(path, timeout=0))
            except Timeout:
                raise UsageError(
                    f"Another `batch run` is using {outbox} or its state file.",
                    remedy="Wait until the other run has ended, stop it, or give another OUTBOX.",
                ) from None
            except OSError as error:
                raise OutOfSpaceError(
                    f"Files cannot be written to {path.parent}: {error.strerror}.",
                    remedy="Give an OUTBOX in which this account may write, on a disk with free space.",
                ) from error
        yield


def outbox_id(outbox: Path) -> str:
    """Return the identifier of an outbox. The first run creates it; it does not change when the folder is renamed.

    Raises:
        OutOfSpaceError: the identifier cannot be written.
    """
    file = outbox / STATE_FOLDER / "id"
    if not file.exists():
        with atomic_path(file) as temporary:
            temporary.write_text(secrets.token_hex(16), encoding="ascii")
    return file.read_text(encoding="ascii", errors="replace")


@contextlib.contextmanager
def scratch_folder(outbox: Path) -> Iterator[Path]:
    """Provide an empty folder for temporary files of workers; files of an earlier run of this outbox are deleted."""
    name = f"fseft-edge-batch-{sha256(str(outbox.resolve()).encode()).hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir()) / name
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
        raise EnvironmentProblemError(
            f"The folder for temporary files {folder} belongs to another account.",
            remedy="Set the environment variable TMPDIR to a folder of this account.",
        )
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise OutOfSpaceError(
            f"The folder for temporary files {folder} cannot be created: {error.strerror}.",
            remedy="Set the environment variable TMPDIR to a folder with free disk space.",
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_partial_results(outbox: Path) -> None:
    """Delete results whose worker died while it wrote them. No other process may be writing to the outbox."""
    for leftover in outbox.glob(".*.partial*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def disk_problem(folders: Sequence[Path]) -> OutOfSpaceError | None:
    """Return an error if a folder cannot be written now; None if all can, so only one case was too large for a disk."""
    for folder in folders:
        try:
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(_PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            return OutOfSpaceError(
                f"Files cannot be written to {folder}: {error.strerror}.",
                remedy="Free some space on that disk, then run the same command again. It does the remaining cases.",
            )
    return None
