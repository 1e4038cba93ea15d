"""The inbox of a batch: which files and folders are scans, and which of them are complete."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fseft_edge.outbox.content_key import files_below, open_regular_file
from fseft_edge.runtime.errors import UnreadableFileError
from fseft_edge.runtime.scans.image_names import METAIMAGE_SUFFIXES, NRRD_SUFFIXES, is_segmentation_file
from fseft_edge.runtime.scans.nifti import SUFFIXES, files_of, stands_for_image

_ARCHIVE: Final = ".zip"


@dataclass(frozen=True)
class Arrival:
    """A file or folder that may be a scan. Its signature changes when a file is changed, added or removed."""

    source: Path
    signature: str


@dataclass
class Inbox:
    """A folder in which scans arrive.

    The following are scans: a NIfTI, NRRD or MetaImage file, a NIfTI pair of header and voxels, or a ZIP archive at any
    depth; a DICOM file directly in the inbox; a folder directly in the inbox that contains DICOM files, or files but no
    such file. Such a folder has to contain the DICOM files of one patient; subfolders are allowed. Names that
    begin with a dot are ignored, because copying programs use such names for incomplete files.

    Args:
        folder: the inbox.
        settle: a scan is complete when it has not changed for this many seconds.
        clock: function that returns a time in seconds; only differences of times are used.

    Raises:
        UnreadableFileError: the folder does not exist.
    """

    folder: Path
    settle: float
    clock: Callable[[], float] = time.monotonic
    _since: dict[Path, tuple[str, float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UnreadableFileError(
                f"The inbox {self.folder} does not exist or is not a folder.",
                remedy="Give the folder in which scans arrive.",
            )

    def complete_arrivals(self) -> list[Arrival]:
        """Look into the inbox; return the scans that have not changed for ``settle`` seconds."""
        now = self.clock()
        seen = {arrival.source: arrival for arrival in arrivals(self.folder)}
        self._since = {
            source: self._since[source]
            if self._since.get(source, ("", 0.0))[0] == arrival.signature
            else (arrival.signature, now)
            for source, arrival in seen.items()
        }
        return [arrival for source, arrival in seen.items() if now - self._since[source][1] >= self.settle]

    @property
    def incomplete(self) -> int:
        """Number of scans that were found at the last look and may still be incomplete."""
        now = self.clock()
        return sum(now - since < self.settle for _, since in self._since.values())


def arrivals(folder: Path) -> list[Arrival]:
    """Return everything in the inbox that may be a scan, sorted by name.

    Raises:
        UnreadableFileError: the inbox cannot be listed.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UnreadableFileError(
            f"The inbox {folder} cannot be read: {error.strerror}.",
            remedy="Check that the folder exists and that this account may read it.",
        ) from error
    found: list[Arrival] = []
    for entry in entries:
        if not os.path.isdir(entry):  # noqa: PTH112 - is_dir() raises PermissionError for a link into a folder without access
            found += [_arrival(entry, files_of(entry))] if _is_one_file(entry) or _is_dicom(entry) else []
            continue
        try:
            files = sorted(files_below(entry))
        except OSError:  # listed nevertheless, so that content_key reports the reason
            found.append(_arrival(entry, [entry]))
            continue
        scans = [file for file in files if _is_one_file(file)]
        found += [_arrival(file, files_of(file)) for file in scans]
        others = [file for file in files if not _is_one_file(file)]
        if (files and not scans) or any(map(_is_dicom, others)):
            found.append(_arrival(entry, files))
    return found


def signature_of(source: Path) -> str | None:
    """Return the present signature of a file or folder, or None if it does not exist or cannot be listed."""
    try:
        if os.path.isdir(source):  # noqa: PTH112 - is_dir() raises PermissionError for some links
            return _arrival(source, sorted(files_below(source))).signature
        return _arrival(source, files_of(source)).signature if source.exists() else None
    except OSError:
        return None


def _is_one_file(path: Path) -> bool:
    endings = (*SUFFIXES, *NRRD_SUFFIXES, *METAIMAGE_SUFFIXES, _ARCHIVE)
    return (path.name.lower().endswith(endings) and not is_segmentation_file(path)) or stands_for_image(path)


def _is_dicom(file: Path) -> bool:
    """Whether a file has the DICOM prefix (PS3.10 section 7.1); False if it cannot be read."""
    try:
        with open_regular_file(file) as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _arrival(source: Path, files: Sequence[Path]) -> Arrival:
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
        except OSError:  # deleted meanwhile, or a dangling link: only its name enters the signature
            digest.update(repr(str(file)).encode())
            continue
        digest.update(repr((str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns)).encode())
    return Arrival(source, digest.hexdigest())
