"""Unnamed temporary files for unpacked scans. The operating system deletes such a file when its last user closes it."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO

from fseft_edge.runtime.errors import OutOfSpaceError


def unnamed_file(scan: Path) -> IO[bytes]:
    """Open an empty unnamed file for an unpacked scan, in the temporary folder of the system (``TMPDIR``).

    If ``TMPDIR`` is set, no other folder is used: Python would take ``/tmp`` without a word if the disk of ``TMPDIR``
    is full, and the voxels of a patient would be on another disk than the user wanted.

    Args:
        scan: path of the scan, for the error message.

    Raises:
        OutOfSpaceError: no file can be created in the temporary folder.
    """
    try:
        folder = Path(tempfile.gettempdir()).resolve()
        if not folder.is_relative_to(Path(os.environ.get("TMPDIR") or folder).resolve()):
            raise no_space_to_unpack(scan)
        return _UnnamedFile(tempfile.TemporaryFile(buffering=0), scan)
    except OSError as error:
        raise no_space_to_unpack(scan) from error


def no_space_to_unpack(scan: Path) -> OutOfSpaceError:
    """Return the error for an unnamed file that cannot be created or is too small for the unpacked scan."""
    wanted = os.environ.get("TMPDIR")
    try:
        folder = wanted or tempfile.gettempdir()
        free = f" ({shutil.disk_usage(folder).free >> 20} MiB are free there now)"
    except OSError:  # the folder does not exist, or no folder of the system can be written to
        folder, free = wanted or "a temporary folder", ""
    source = "TMPDIR" if wanted else "TMPDIR is not set"
    return OutOfSpaceError(
        f"{scan} cannot be unpacked to {folder}, the folder for temporary files (environment variable {source}): its "
        "disk is full, or it cannot be written to.",
        remedy=f"Set the environment variable TMPDIR to a folder on another disk, or free space in {folder}{free}.",
    )


class _UnnamedFile(io.BufferedRandom):
    """An unnamed file. Closing writes what is still in the buffer, and this error must not hide an earlier one."""

    def __init__(self, raw: io.FileIO, scan: Path) -> None:
        super().__init__(raw)
        self._scan = scan

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError as full:
            if kind is None:
                raise no_space_to_unpack(self._scan) from full
