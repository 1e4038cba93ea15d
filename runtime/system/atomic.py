"""Atomic writing: a file or folder appears under its final name only after it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from fseft_edge.runtime.errors import FseftEdgeError, OutOfSpaceError, UsageError

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_LONGEST_SUFFIX: Final = 16


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``target``; rename the temporary file to ``target`` after the body succeeds.

    The temporary name starts with a dot, ends with the suffix of the target (``.nii.gz``), and is short, so that every
    name that the file system allows for the target can be written. Missing parent folders are created. After the body
    succeeds, the file is flushed to disk and replaces ``target``. After any exception, including an interrupt, the
    temporary file is removed and ``target`` is unchanged.

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


@contextlib.contextmanager
def atomic_files(target: Path, *, first: str | None = None, last: str, outdated: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a new temporary folder in the folder ``target``; after the body succeeds, move its files to ``target``.

    Several files cannot be renamed in one step. All of them are therefore complete and on the disk before the first is
    renamed, and ``first`` and ``last`` fix the order: a file ``first`` that states the checksum of ``last`` never
    describes an older file. After any exception in the body, including an interrupt, the temporary folder is removed
    and ``target`` is unchanged.

    Args:
        target: folder of the files; created if it does not exist.
        first: name of the file that is renamed first; None if no file has to be.
        last: name of the file that is renamed last.
        outdated: files of an earlier result, relative to ``target``. Those that the body does not write again are
            deleted, because they do not belong to the new result.

    Raises:
        OutOfSpaceError: the disk is full, the quota is used up, or the folder is not writable.
        UsageError: ``target`` is a file, or a folder has the name of a file that the body wrote.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file, not a folder.", remedy="Choose another folder.")
    temporary = _temporary_sibling(target / "files")
    with _write_errors_named(target, temporary):
        target.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            with _named_as_in(target, temporary):
                yield temporary
            written = _ordered(temporary, first, last)
            for name in written:
                _check_not_a_folder(target / name)
                _check_parent(target / name)
                _flush(temporary / name)
            for name in written[:-1]:
                _move(temporary / name, target / name)
            for name in set(outdated) - set(written):
                _remove(target, name)
            _move(temporary / last, target / last)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _flush(target)


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


def _check_parent(target: Path) -> None:
    if target.parent.exists() and not target.parent.is_dir():
        raise UsageError(
            f"{target} cannot be written, because {target.parent} is a file.", remedy="Rename or delete that file."
        )


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
    suffix = ".nii.gz" if target.name.lower().endswith(".nii.gz") else target.suffix
    if len(os.fsencode(suffix)) > _LONGEST_SUFFIX:  # the part of a long name after its last dot
        suffix = ""
    return target.with_name(f".{secrets.token_hex(8)}.partial{suffix}")


def _ordered(folder: Path, first: str | None, last: str) -> list[str]:
    """Return the names of all files below a folder, relative to it, with ``first`` and ``last`` at the ends."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return [*([first] if first else []), *sorted(names - {first, last}), last]


def _move(temporary: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(target)
    _flush(target.parent)


def _remove(folder: Path, name: str) -> None:
    """Delete a file below a folder, and its own folder if that is empty then."""
    (folder / name).unlink(missing_ok=True)
    if (folder / name).parent != folder:
        with contextlib.suppress(OSError):  # the folder contains other files, or does not exist
            (folder / name).parent.rmdir()


@contextlib.contextmanager
def _named_as_in(target: Path, temporary: Path) -> Iterator[None]:
    """Let an error about a file in the temporary folder name the file in the target folder."""
    try:
        yield
    except FseftEdgeError as error:
        error.message = error.message.replace(str(temporary), str(target))
        error.remedy = error.remedy.replace(str(temporary), str(target))
        error.args = (error.message,)
        raise


def _more_space(target: Path) -> str:
    """Return the remedy for a full disk. The user did not choose the place of a temporary file, but can: TMPDIR."""
    folder = Path(tempfile.gettempdir())
    if any(folder == parent.parent and parent.name.startswith("fseft-edge-") for parent in target.parents):
        return (
            f"Set the environment variable TMPDIR to a folder on another disk, or free disk space in {folder}, the "
            "folder for temporary files."
        )
    return "Free disk space, or write to another disk."


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
        ours = temporary in (concerned, *concerned.parents) or concerned in (target, *target.parents)
        if ours and error.errno in _DISK_FULL:
            raise OutOfSpaceError(
                f"{target} cannot be written: the disk is full, or the disk quota is used up.",
                remedy=_more_space(target),
            ) from error
        if ours and error.errno in _NOT_WRITABLE:
            raise OutOfSpaceError(
                f"{target} cannot be written: {error.strerror}.",
                remedy="Write to a folder for which your account has write permission.",
            ) from error
        raise
