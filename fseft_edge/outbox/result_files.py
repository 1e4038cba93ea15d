"""Open result files of a case safely: no links, only regular files."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from fseft_edge.runtime.errors import UnreadableFileError

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def open_result(outbox: Path, key: str, suffix: str) -> BinaryIO:
    """Open ``OUTBOX/<key>/<key><suffix>`` for reading.

    No symbolic link below the outbox is followed, neither for the folder of the case nor for the file, even if the link
    is created while this function runs. Only regular files are opened.

    Args:
        outbox: outbox of the batch.
        key: key of a case in the state of the batch.
        suffix: ``.nii.gz``, ``.json`` or ``.png``.

    Raises:
        UnreadableFileError: the file does not exist, is not a regular file, or cannot be opened.
    """
    if not _PLAIN_NAME.fullmatch(key):
        raise _unreadable(key, suffix, "the key is not a plain file name")
    try:
        box = os.open(outbox, os.O_RDONLY | os.O_DIRECTORY)
        try:
            folder = os.open(key, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=box)
            try:
                # O_NONBLOCK keeps a named pipe from waiting for a program that writes to it.
                result = os.open(key + suffix, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            finally:
                os.close(folder)
        finally:
            os.close(box)
    except OSError as error:
        raise _unreadable(key, suffix, error.strerror or "it cannot be opened") from error
    if not stat.S_ISREG(os.fstat(result).st_mode):
        os.close(result)
        raise _unreadable(key, suffix, "it is not a regular file")
    return os.fdopen(result, "rb")


def _unreadable(key: str, suffix: str, reason: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"The result {key}{suffix} cannot be read: {reason}.",
        remedy="Restore the file in OUTBOX, or segment the scan again into another OUTBOX.",
    )
