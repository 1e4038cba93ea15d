"""The key of a case: a pseudonym that depends on the content of its files alone."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from fseft_edge.runtime.errors import UnreadableFileError

_KEY_DIGITS: Final = 12
_CHUNK: Final = 1 << 20


def content_key(source: Path) -> str:
    """Return a scan's pseudonym: ``case-`` and 12 digits of the sha256 of its content.

    Names, dates and the order of the files in a folder do not count: the same series sent again is the same case.

    Raises:
        UnreadableFileError: a file cannot be read.
    """
    try:
        if os.path.isdir(source):  # noqa: PTH112 - is_dir() raises where a link leads to what may not be looked at
            digests = sorted(_sha256(file) for file in files_below(source))
            digest = hashlib.sha256(b"".join(digests)).hexdigest()
        else:
            digest = _sha256(source).hex()
    except OSError as error:
        # The name of a file within may be a patient's: only what the user knows is named.
        raise UnreadableFileError(
            f"{source} cannot be read: {error.strerror}.", remedy="Check the permissions, or copy it again."
        ) from error
    return f"case-{digest[:_KEY_DIGITS]}"


def open_regular_file(file: Path) -> BinaryIO:
    """Open a regular file; without O_NONBLOCK a named pipe would wait for somebody to write."""
    stream = open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: PTH123, SIM115 - of a descriptor; the caller closes it
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    return stream


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file in a folder and below it; names that begin with a dot are left out.

    Raises:
        OSError: a folder cannot be listed.
    """

    def failed(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=failed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent) / name for name in names if not name.startswith("."))


def _sha256(file: Path) -> bytes:
    digest = hashlib.sha256()
    with open_regular_file(file) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()
