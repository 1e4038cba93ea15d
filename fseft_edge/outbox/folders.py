"""The outbox: one run at a time, on a disk with room, with its temporary files where the next run finds them."""

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
    """Make sure that results are not taken for scans.

    Raises:
        UsageError: the outbox is a file, or one of the two lies in the other.
    """
    if outbox.exists() and not outbox.is_dir():
        raise UsageError(f"{outbox} is a file.", remedy="Name a folder for the results.")
    inbox, outbox = inbox.resolve(), outbox.resolve()
    if inbox == outbox or inbox in outbox.parents or outbox in inbox.parents:
        raise UsageError(
            "INBOX and OUTBOX lie within one another, so results would be taken for scans.",
            remedy="Name two folders side by side.",
        )


def place_of_state(outbox: Path, state: Path | None) -> Path:
    """Return where the state lies; SQLite needs a local disk.

    Raises:
        UsageError: it would lie on a network drive.
    """
    path = state_path(outbox, state)
    kind = network_file_system(path)
    if kind is not None:
        raise UsageError(
            f"The state {path} would lie on a network drive ({kind}), where a crash can damage it.",
            remedy="Name a file on a local disk by --state; the results may stay where they are.",
        )
    return path


@contextlib.contextmanager
def only_one_run(outbox: Path, state: Path) -> Iterator[None]:
    """Hold the outbox and the state, so that one run at a time writes there.

    Raises:
        UsageError: another run holds one of them.
        OutOfSpaceError: one of them cannot be written to.
    """
    locks = dict.fromkeys([outbox / STATE_FOLDER / "lock", state.with_name(f"{state.name}.lock")])
    with contextlib.ExitStack() as stack:
        for path in locks:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(path, timeout=0))
            except Timeout:
                raise UsageError(
                    f"Another `batch run` works on {outbox} or with its state.",
                    remedy="Wait for it, end it, or use another OUTBOX.",
                ) from None
            except OSError as error:
                raise OutOfSpaceError(
                    f"{path.parent} cannot be written to: {error.strerror}.",
                    remedy="Name an OUTBOX that this account may write to, on a disk with free space.",
                ) from error
        yield


def outbox_number(outbox: Path) -> str:
    """Return the outbox's own number, which it gets when it is first used and keeps when it is renamed.

    Raises:
        OutOfSpaceError: it cannot be written.
    """
    file = outbox / STATE_FOLDER / "id"
    if not file.exists():
        with atomic_path(file) as temporary:
            temporary.write_text(secrets.token_hex(16), encoding="ascii")
    return file.read_text(encoding="ascii", errors="replace")


@contextlib.contextmanager
def scratch_folder(outbox: Path) -> Iterator[Path]:
    """Give a folder for workers' temporary files, cleared of what an earlier run of this outbox left."""
    name = f"fseft-edge-batch-{sha256(str(outbox.resolve()).encode()).hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir()) / name
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
        raise EnvironmentProblemError(
            f"{folder} belongs to somebody else.", remedy="Set TMPDIR to a folder of this account."
        )
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise OutOfSpaceError(
            f"{folder} cannot be made: {error.strerror}.", remedy="Set TMPDIR to a folder with free space."
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_leftovers(outbox: Path) -> None:
    """Remove results that were being written when their worker died; nobody may be writing now."""
    for leftover in outbox.glob(".*.partial*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def no_room(folders: Sequence[Path]) -> OutOfSpaceError | None:
    """Return why nothing could be written now, or None where there is room again: then one case alone was too large."""
    for folder in folders:
        try:
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(_PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            return OutOfSpaceError(
                f"{folder} cannot be written to: {error.strerror}.",
                remedy="Free some space on that disk, then run the batch again: it goes on where it was.",
            )
    return None
