"""Unnamed temporary files for unpacked scans. The operating system deletes such a file when its last user closes it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import IO

from fseft_edge.runtime.errors import OutOfSpaceError


def unnamed_file(scan: Path) -> IO[bytes]:
    """Open an empty unnamed file for an unpacked scan, in the temporary folder of the system (``TMPDIR``).

    Args:
        scan: path of the scan, for the error message.

    Raises:
        OutOfSpaceError: no file can be created in the temporary folder.
    """
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise no_space_to_unpack(scan) from error


def no_space_to_unpack(scan: Path) -> OutOfSpaceError:
    """Return the error for an unnamed file that cannot be created or is too small for the unpacked scan."""
    folder = tempfile.gettempdir()
    return OutOfSpaceError(
        f"{scan} cannot be unpacked to {folder}: the disk is full, or the folder is not writable.",
        remedy=f"Free disk space ({shutil.disk_usage(folder).free >> 20} MiB are free now), or set the environment "
        "variable TMPDIR to another folder.",
    )
