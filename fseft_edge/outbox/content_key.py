"""The checksum of a scan, and the key of a case: both depend only on the content of the files of the scan."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final

from fseft_edge.runtime.errors import UnreadableFileError
from fseft_edge.runtime.scans.nifti import files_of

_KEY_DIGITS: Final = 12
_FILE_DIGITS: Final = 16
_CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class Content:
    """Content of a scan. File names, dates and the order of the files in a folder have no effect.

    Attributes:
        sha256: sha256 of the content of all files, as hexadecimal digits: equal for a series that is sent again.
        files: first 16 hexadecimal digits of the sha256 of each file.
    """

    sha256: str
    files: frozenset[str]

    @property
    def key(self) -> str:
        """Pseudonym of the scan: ``case-`` and the first 12 digits of :attr:`sha256`."""
        return f"case-{self.sha256[:_KEY_DIGITS]}"


def content_key(source: Path) -> str:
    """Return the pseudonym of a scan: ``case-`` and the first 12 hexadecimal digits of its :func:`content_sha256`.

    Raises:
        UnreadableFileError: a file cannot be read.
    """
    return content_of(source).key


def content_sha256(source: Path) -> str:
    """Return the sha256 of the content of the files of a scan, as hexadecimal digits.

    File names, dates and the order of the files in a folder have no effect: a series that is sent again gets the same
    value.

    Raises:
        UnreadableFileError: a file cannot be read.
    """
    return content_of(source).sha256


def content_of(source: Path) -> Content:
    """Return the content of a file, of a NIfTI pair of header and voxels, or of all files in a folder.

    Raises:
        UnreadableFileError: a file cannot be read.
    """
    try:
        if os.path.isdir(source):  # noqa: PTH112 - is_dir() raises PermissionError for a link into a folder without access
            digests = sorted(_sha256(file) for file in files_below(source))
            whole = hashlib.sha256(b"".join(digests)).hexdigest()
        else:
            digests = [_sha256(file) for file in files_of(source)]
            whole = digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()
    except OSError as error:
        # The name of a file inside the folder may contain a patient's name: the message names only `source`.
        raise UnreadableFileError(
            f"{source} cannot be read: {error.strerror}.", remedy="Check its permissions, or copy it again."
        ) from error
    return Content(whole, frozenset(digest.hex()[:_FILE_DIGITS] for digest in digests))


def open_regular_file(file: Path) -> BufferedReader:
    """Open a regular file for reading. O_NONBLOCK keeps a named pipe from waiting for a program that writes to it."""
    stream = open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: PTH123, SIM115 - opens a file descriptor; the caller closes it
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return stream


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file in a folder and its subfolders, without names that begin with a dot.

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
