"""Access to DICOM files: a single file, all files in a folder and its subfolders, or the members of a zip archive.

Zip archives are never unpacked to disk.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from fseft_edge.runtime.errors import ArchiveError, FseftEdgeError, UnreadableFileError
from fseft_edge.runtime.scans.dicom.elements import SNIFFED_BYTES, looks_like_dicom

MAX_ARCHIVE_BYTES = 16 << 30
"""Largest accepted unpacked size of an archive. For comparison, a CT of 2000 slices needs 1 GiB."""

MAX_ARCHIVE_MEMBERS = 100_000

_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_DICOM_ROOT = b"1.2.840.10008."
_ZEROS = 64
_COPY_BYTES = 1 << 20
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class DicomFile:
    """Location of one DICOM file.

    Attributes:
        path: path of the DICOM file or of the zip archive.
        member: name of the DICOM file within the archive; None if ``path`` is the DICOM file.
    """

    path: Path
    member: str | None = None


class DicomSource:
    """A file, folder or zip archive with DICOM files. Use it as a context manager, which keeps an archive open.

    Args:
        path: path as given by the user; error messages contain only this path.

    Attributes:
        no_dicom: number of files that :meth:`files` skipped although they are empty, or have the name or parts of
            DICOM.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.no_dicom = path, 0
        self._archive: zipfile.ZipFile | None = None

    def __enter__(self) -> DicomSource:
        """Open the archive if the path is a zip archive.

        Raises:
            UnreadableFileError: the path does not exist, or the file is not readable.
            ArchiveError: the archive is damaged or encrypted, or exceeds ``MAX_ARCHIVE_BYTES`` or
                ``MAX_ARCHIVE_MEMBERS``.
        """
        try:
            if not self.path.is_dir() and not _is_dicom_file(self.path) and zipfile.is_zipfile(self.path):
                self._archive = zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            raise _damaged_archive(self.path) from None
        except OSError as error:
            raise UnreadableFileError(
                f"{self.path} cannot be read: {error.strerror or 'disk error'}.",
                remedy="Check the path and the file permissions.",
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
        """Yield the DICOM files, sorted by name.

        A DICOM file has ``DICM`` after its first 128 bytes (PS3.10), or starts with elements of DICOM. Other files,
        hidden files and hidden folders are skipped, and links to folders are not followed.

        Raises:
            UnreadableFileError: a file or subfolder is not readable.
            ArchiveError: a member of the archive is damaged.
        """
        self.no_dicom = 0
        patterns: set[str] = set()
        unknown: list[str] = []
        for file in self._candidates():
            with self.open(file) as stream:
                head = stream.read(SNIFFED_BYTES)
            name = file.member or str(file.path)
            if looks_like_dicom(head):
                patterns.add(_name_pattern(name))
                yield file
            elif _should_be_dicom(head, name):
                self.no_dicom += 1
            else:
                unknown.append(name)
        self.no_dicom += sum(_name_pattern(name) in patterns for name in unknown)

    @contextmanager
    def open(self, file: DicomFile) -> Iterator[BinaryIO]:
        """Open one of the files for reading. A member of an archive is unpacked in memory while it is read.

        Raises:
            UnreadableFileError: the file is not readable.
            ArchiveError: the member of the archive is damaged.
        """
        try:
            if self._archive is None:
                with file.path.open("rb", buffering=0) as raw, _BoundedReader(raw) as stream:
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
                f"A file in {self.path} cannot be read: {error.strerror or 'disk error'}.",
                remedy="Check the file permissions and the disk.",
            ) from None

    def verify(self, file: DicomFile) -> None:
        """Read a complete member of an archive, so that its checksum is compared; other files are not read.

        Raises:
            ArchiveError: the checksum differs.
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
            raise ArchiveError(
                f"The zip archive {self.path} is encrypted.", remedy="Unpack the archive and give the folder."
            )
        total = sum(member.file_size for member in members)
        if total > MAX_ARCHIVE_BYTES or len(members) > MAX_ARCHIVE_MEMBERS:
            raise ArchiveError(
                f"The zip archive {self.path} contains {len(members)} files with a total of {total / 2**30:.1f} GiB, "
                f"but the limits are {MAX_ARCHIVE_MEMBERS} files and {MAX_ARCHIVE_BYTES >> 30} GiB.",
                remedy="If you trust the source of the archive, unpack the archive and give the folder.",
            )


def contains_dicom(path: Path) -> bool:
    """Return True if a path is a DICOM file, or a folder or zip archive that contains a DICOM file.

    Raises:
        UnreadableFileError: a file or folder is not readable.
        ArchiveError: the zip archive is damaged, encrypted or too large.
    """
    with DicomSource(path) as source:
        return next(source.files(), None) is not None


class _BoundedReader(io.BufferedReader):
    """Reader that never requests more bytes than remain in the file.

    A damaged length field would otherwise allocate gigabytes before the read.
    """

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self._bytes = os.fstat(raw.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self._bytes - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def _should_be_dicom(head: bytes, name: str) -> bool:
    """Return True for a file that is no DICOM although it seems so.

    It is empty, begins with zeros like most preambles, is named like DICOM, or contains a UID of DICOM.
    """
    return not head[:_ZEROS].strip(b"\0") or name.lower().endswith(_DICOM_SUFFIXES) or _DICOM_ROOT in head


def _name_pattern(name: str) -> str:
    """Return a path with one sign for each number: files of a series usually differ only in numbers."""
    return re.sub(r"\d+", "#", name)


def _is_dicom_file(path: Path) -> bool:
    with path.open("rb") as file:
        return looks_like_dicom(file.read(SNIFFED_BYTES))


def _files_below(folder: Path) -> Iterator[Path]:
    def failed(error: OSError) -> None:
        raise error

    try:
        for parent, folders, names in os.walk(folder, onerror=failed):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            paths = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
            yield from (path for path in paths if path.is_file())  # reading from a pipe would block
    except OSError as error:
        raise UnreadableFileError(
            f"A folder in {folder} cannot be read: {error.strerror or 'disk error'}.",
            remedy="Check the permissions of the folder and its subfolders.",
        ) from None


def _is_hidden(member: str) -> bool:
    return any(part.startswith(".") for part in member.split("/") if part not in (".", ".."))


def _damaged_archive(path: Path) -> ArchiveError:
    return ArchiveError(f"The zip archive {path} is damaged.", remedy="Copy the archive again from its source.")
