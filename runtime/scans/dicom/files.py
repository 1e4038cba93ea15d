"""Where the bytes of DICOM files lie: in a file, below a folder, or in a zip archive that is never unpacked."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from fseft_edge.runtime.errors import ArchiveError, FseftEdgeError, UnreadableFileError

MAX_ARCHIVE_BYTES = 16 << 30
"""An archive that would be larger unpacked is refused; a CT of 2000 slices takes 1 GiB."""

MAX_ARCHIVE_MEMBERS = 100_000

_PREAMBLE_BYTES = 128
_MAGIC = b"DICM"
_COPY_BYTES = 1 << 20
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class DicomFile:
    """Where one DICOM file lies; ``member`` is its name in the archive ``path``, None where that is the file itself."""

    path: Path
    member: str | None = None


class DicomSource:
    """A file, folder or zip archive that may hold DICOM files; open it by ``with``, which keeps an archive open.

    Args:
        path: as the user gave it; the only name that errors mention.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None

    def __enter__(self) -> DicomSource:
        """Open the archive, if it is one.

        Raises:
            UnreadableFileError: nothing is there, or it may not be read.
            ArchiveError: an archive that is damaged, encrypted, or larger than ``MAX_ARCHIVE_BYTES`` unpacked.
        """
        try:
            if not self.path.is_dir() and not _is_dicom_file(self.path) and zipfile.is_zipfile(self.path):
                self._archive = zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            raise _damaged_archive(self.path) from None
        except OSError as error:
            raise UnreadableFileError(
                f"{self.path} cannot be read: {error.strerror or 'an error of the disk'}.",
                remedy="Check the name and the permissions.",
            ) from None
        if self._archive is not None:
            try:
                self._check_archive(self._archive)
            except FseftEdgeError:
                self._archive.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        """Close the archive."""
        if self._archive is not None:
            self._archive.close()

    def files(self) -> Iterator[DicomFile]:
        """Yield the DICOM files (PS3.10: ``DICM`` behind 128 bytes), by name; all others are passed over.

        Hidden files and folders are left out, and links to folders are not followed.

        Raises:
            UnreadableFileError: a file or folder below may not be read.
            ArchiveError: a member of the archive is damaged.
        """
        for file in self._candidates():
            with self.open(file) as stream:
                is_dicom = stream.read(_PREAMBLE_BYTES + len(_MAGIC))[_PREAMBLE_BYTES:] == _MAGIC
            if is_dicom:
                yield file

    @contextmanager
    def open(self, file: DicomFile) -> Iterator[BinaryIO]:
        """Open one of the files to read; a member of an archive is unpacked as it is read, into memory alone.

        Raises:
            UnreadableFileError: it may not be read.
            ArchiveError: it is a damaged member of an archive.
        """
        try:
            if self._archive is None:
                with file.path.open("rb", buffering=0) as raw, _Bounded(raw) as stream:
                    yield stream
            else:
                with self._archive.open(file.member or "") as unpacked:
                    yield cast("BinaryIO", unpacked)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
            if self._archive is None:
                raise
            raise _damaged_archive(self.path) from None
        except OSError as error:
            raise UnreadableFileError(
                f"A file in {self.path} cannot be read: {error.strerror or 'an error of the disk'}.",
                remedy="Check the permissions, and that the disk is well.",
            ) from None

    def verify(self, file: DicomFile) -> None:
        """Compare a member of an archive with its checksum, which reading parts of it does not.

        Raises:
            ArchiveError: they differ.
        """
        if self._archive is not None:
            with self.open(file) as stream:
                while stream.read(_COPY_BYTES):
                    pass

    def _candidates(self) -> Iterator[DicomFile]:
        if self._archive is not None:
            members = sorted(info.filename for info in self._archive.infolist() if not info.is_dir())
            yield from (DicomFile(self.path, name) for name in members if not _is_hidden(name))
        elif self.path.is_dir():
            yield from (DicomFile(path) for path in _files_below(self.path))
        else:
            yield DicomFile(self.path)

    def _check_archive(self, archive: zipfile.ZipFile) -> None:
        members = archive.infolist()
        if any(member.flag_bits & _ENCRYPTED for member in members):
            raise ArchiveError(f"{self.path} is encrypted.", remedy="Unpack it, and name the folder.")
        total = sum(member.file_size for member in members)
        if total > MAX_ARCHIVE_BYTES or len(members) > MAX_ARCHIVE_MEMBERS:
            raise ArchiveError(
                f"{self.path} holds {len(members)} files of {total / 2**30:.1f} GiB together; at most "
                f"{MAX_ARCHIVE_MEMBERS} of {MAX_ARCHIVE_BYTES >> 30} GiB are read from an archive.",
                remedy="If it comes from a source that you trust, unpack it and name the folder.",
            )


def holds_dicom(path: Path) -> bool:
    """Whether a file is a DICOM file, or a folder or zip archive holds one.

    Raises:
        UnreadableFileError: something there may not be read.
        ArchiveError: a zip archive that is damaged, encrypted or too large.
    """
    with DicomSource(path) as source:
        return next(source.files(), None) is not None


class _Bounded(io.BufferedReader):
    """A file of which no more is asked for than is there: a damaged length would set aside gigabytes before reading."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self._bytes = os.fstat(raw.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self._bytes - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def _is_dicom_file(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(_PREAMBLE_BYTES + len(_MAGIC))[_PREAMBLE_BYTES:] == _MAGIC


def _files_below(folder: Path) -> Iterator[Path]:
    def failed(error: OSError) -> None:
        raise error

    try:
        for parent, folders, names in os.walk(folder, onerror=failed):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            paths = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
            yield from (path for path in paths if path.is_file())  # a pipe would wait for someone to write to it
    except OSError as error:
        raise UnreadableFileError(
            f"A folder in {folder} cannot be read: {error.strerror or 'an error of the disk'}.",
            remedy="Check the permissions.",
        ) from None


def _is_hidden(member: str) -> bool:
    return any(part.startswith(".") for part in member.split("/") if part not in (".", ".."))


def _damaged_archive(path: Path) -> ArchiveError:
    return ArchiveError(f"{path} is a damaged zip archive.", remedy="Copy it again from where it came, or unpack it.")
