"""Temporary files without a name, into which scans are unpacked: they vanish with whoever holds them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import IO

from fseft_edge.runtime.errors import OutOfSpaceError


def unnamed_file(scan: Path) -> IO[bytes]:
    """Open an empty file in the system's temporary folder (``TMPDIR``) to unpack a scan into.

    Raises:
        OutOfSpaceError: that folder cannot be written to.
    """
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise no_room_to_unpack(scan) from error


def no_room_to_unpack(scan: Path) -> OutOfSpaceError:
    """Return the error to raise when such a file cannot be made or filled."""
    folder = tempfile.gettempdir()
    return OutOfSpaceError(
        f"There is no room in {folder} to unpack {scan}.",
        remedy=f"Free some space ({shutil.disk_usage(folder).free >> 20} MiB are left), or point TMPDIR elsewhere.",
    )
