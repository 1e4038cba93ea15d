"""Writing a file or a folder so that it appears complete under its name, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from fseft_edge.runtime.errors import OutOfSpaceError, UsageError

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path next to ``target``; what the body wrote there becomes ``target`` when it ends well.

    The temporary name starts with a dot and ends with the target's own suffixes (``.nii.gz``). Missing parent folders
    are made. After the body the file is flushed to disk, then renamed over ``target``. On any exception, an interrupt
    included, the temporary file is removed and ``target`` stays as it was.

    Raises:
        OutOfSpaceError: the disk is full, the quota is spent, or the folder cannot be written to.
        UsageError: ``target`` is a folder.
    """
    if target.is_dir():
        raise UsageError(f"{target} is a folder, not a file.", remedy="Name a file to write to.")
    temporary = _temporary_sibling(target)
    with _explained(target, temporary):
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
    """Make sure, before long work, that a file can be written under this name; nothing stays behind.

    Raises:
        OutOfSpaceError: the folder, or the nearest one above it that exists, cannot be written to.
        UsageError: ``target`` is a folder.
    """
    if target.is_dir():
        raise UsageError(f"{target} is a folder, not a file.", remedy="Name a file to write to.")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    probe = _temporary_sibling(folder / target.name)
    with _explained(target, probe):
        probe.touch()
        probe.unlink()


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a new temporary folder next to ``target``; it becomes ``target`` when the body ends well.

    With ``overwrite`` an existing folder is moved aside first and deleted only after the new one stands in its place;
    on any exception, an interrupt included, it is put back and the temporary folder is removed.

    Raises:
        OutOfSpaceError: the disk is full, the quota is spent, or the folder cannot be written to.
        UsageError: ``target`` exists and ``overwrite`` is false, or it is not a folder.
    """
    _check_free(target, overwrite=overwrite)
    temporary = _temporary_sibling(target)
    with _explained(target, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            for path in sorted(temporary.rglob("*")):
                _flush(path)
            _flush(temporary)
            _check_free(target, overwrite=overwrite)  # another process may have been faster
            _put_in_place(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _flush(target.parent)


def _check_free(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} exists and is not a folder.", remedy="Choose another name.")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} already exists.", remedy="Choose another name, or allow it to be overwritten.")


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    aside = _temporary_sibling(target)
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _temporary_sibling(target: Path) -> Path:
    return target.with_name(f".{secrets.token_hex(8)}.partial{''.join(target.suffixes[-2:])}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(target: Path, temporary: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into an :class:`OutOfSpaceError` that names ``target``.

    An error that carries the name of a file elsewhere (an input that may not be read) passes unchanged.
    """
    try:
        yield
    except OSError as error:
        concerned = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else temporary
        ours = concerned == temporary or temporary in concerned.parents or concerned in target.parents
        if ours and error.errno in _NO_ROOM:
            raise OutOfSpaceError(
                f"There is no room left to write {target}.", remedy="Free some space on that disk, or write elsewhere."
            ) from error
        if ours and error.errno in _NOT_WRITABLE:
            raise OutOfSpaceError(
                f"{target} cannot be written: {error.strerror}.",
                remedy="Write to a folder that this account may write to.",
            ) from error
        raise
