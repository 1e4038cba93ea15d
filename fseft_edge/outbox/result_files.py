"""Opening the results of a case, and nothing else."""

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

    No link is followed below the outbox, neither the case's folder nor the file, however late it was put there; and
    only regular files are opened.

    Args:
        outbox: the batch's results.
        key: a case's key, as the batch's state holds it.
        suffix: ``.nii.gz``, ``.json`` or ``.png``.

    Raises:
        UnreadableFileError: there is none, or it is not what it should be.
    """
    if not _PLAIN_NAME.fullmatch(key):
        raise _refused(key, suffix, "the key is no file name")
    try:
        box = os.open(outbox, os.O_RDONLY | os.O_DIRECTORY)
        try:
            folder = os.open(key, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=box)
            try:
                # Without O_NONBLOCK a named pipe would wait for somebody to write.
                result = os.open(key + suffix, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            finally:
                os.close(folder)
        finally:
            os.close(box)
    except OSError as error:
        raise _refused(key, suffix, error.strerror or "it cannot be opened") from error
    if not stat.S_ISREG(os.fstat(result).st_mode):
        os.close(result)
        raise _refused(key, suffix, "it is no regular file")
    return os.fdopen(result, "rb")


def _refused(key: str, suffix: str, reason: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"The result {key}{suffix} cannot be read: {reason}.",
        remedy="Results lie in OUTBOX as the batch wrote them; let it do the case again.",
    )
