"""Atomic writing: a file or folder appears under its final name only after it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from fseft_edge.runtime.errors import OutOfSpaceError, UsageError

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``target``; rename the temporary file to ``target`` after the body succeeds.

    The temporary name starts with a dot and ends with the suffixes of the target (``.nii.gz``). Missing parent folders
    are created. After the body succeeds, the file is flushed to disk and replaces ``target``. After any exception,
    including an interrupt, the temporary file is removed and ``target`` is unchanged.

    Raises:
        OutOfSpaceError: the disk is full, the quota is used up, or the folder is not writable.
        UsageError: ``target`` is a folder.
    """
    _check_not_a_folder(target)
    temporary = _temporary_sibling(target)
    with _write_errors_named(target, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _flush(target.parent)


def check_writable(target: Path) -> None:
    """Check, before long work, that the file ``target`` can be written. No file remains after the check.

    Raises:
        OutOfSpaceError: the folder of ``target``, or its nearest existing parent folder, is not writable.
        UsageError: ``target`` is a folder.
    """
    _check_not_a_folder(target)
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    probe = _temporary_sibling(folder / target.name)
    with _write_errors_named(target, probe):
        probe.touch()
        probe.unlink()


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new temporary folder next to ``target``; rename this folder to ``target`` after the body succeeds.

    With ``overwrite``, an existing folder is renamed first, and deleted only after the new folder is in its place.
    After any exception, including an interrupt, the existing folder gets its name back and the temporary folder is
    removed.

    Raises:
        OutOfSpaceError: the disk is full, the quota is used up, or the parent folder is not writable.
        UsageError: ``target`` exists and ``overwrite`` is false, or ``target`` is not a folder.
    """
    _check_name_is_free(target, overwrite=overwrite)
    temporary = _temporary_sibling(target)
    with _write_errors_named(target, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            for path in sorted(temporary.rglob("*")):
                _flush(path)
            _flush(temporary)
            _check_name_is_free(target, overwrite=overwrite)  # another process may have written the folder meanwhile
            _rename_or_replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _flush(target.parent)


def _check_not_a_folder(target: Path) -> None:
    if target.is_dir():
        raise UsageError(f"{target} is a folder, not a file.", remedy="Give the name of a file to write.")


def _check_name_is_free(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} exists and is not a folder.", remedy="Choose another name.")
    if target.exists() and not overwrite:
        raise UsageError(
            f"{target} already exists.", remedy="Choose another name, or delete the existing folder first."
        )


def _rename_or_replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    previous = _temporary_sibling(target)
    target.rename(previous)
    try:
        temporary.rename(target)
    except BaseException:
        previous.rename(target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _temporary_sibling(target: Path) -> Path:
    return target.with_name(f".{secrets.token_hex(8)}.partial{''.join(target.suffixes[-2:])}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _write_errors_named(target: Path, temporary: Path) -> Iterator[None]:
    """Convert an :class:`OSError` about writing into an :class:`OutOfSpaceError` that names ``target``.

    An error about an unrelated file, such as an unreadable input, passes unchanged.
    """
    try:
        yield
    except OSError as error:
        concerned = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else temporary
        ours = concerned == temporary or temporary in concerned.parents or concerned in target.parents
        if ours and error.errno in _DISK_FULL:
            raise OutOfSpaceError(
                f"{target} cannot be written: the disk is full, or the disk quota is used up.",
                remedy="Free disk space, or write to another disk.",
            ) from error
        if ours and error.errno in _NOT_WRITABLE:
            raise OutOfSpaceError(
                f"{target} cannot be written: {error.strerror}.",
                remedy="Write to a folder for which your account has write permission.",
            ) from error
        raise
