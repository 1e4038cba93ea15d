"""What lies in the inbox: scans whose files have stopped growing, known by their content."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fseft_edge.outbox.content_key import files_below, open_regular_file
from fseft_edge.runtime.errors import UnreadableFileError
from fseft_edge.runtime.scans.nifti import SUFFIXES

_ARCHIVE: Final = ".zip"


@dataclass(frozen=True)
class Arrival:
    """A file or folder that may be a scan; its signature changes when a file in it grows, comes or goes."""

    source: Path
    signature: str


@dataclass
class Inbox:
    """A folder that scans arrive in.

    A NIfTI file or a ZIP archive, at any depth, is a scan. So is a folder directly in the inbox that holds neither, or
    DICOM files too: those of one patient, nested as they may be. A DICOM file directly in the inbox is one by itself.
    Names that begin with a dot are left alone: copying programs use them for what is not complete.

    Args:
        folder: the inbox.
        settle: seconds for which nothing about a scan may change before it is taken for complete.
        clock: seconds; only differences count.

    Raises:
        UnreadableFileError: there is no such folder.
    """

    folder: Path
    settle: float
    clock: Callable[[], float] = time.monotonic
    _since: dict[Path, tuple[str, float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UnreadableFileError(f"{self.folder} is no folder.", remedy="Name the folder that scans arrive in.")

    def settled(self) -> list[Arrival]:
        """Look, and return what has not changed for long enough."""
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
    def unsettled(self) -> bool:
        """Whether something seen at the last look may still be growing."""
        now = self.clock()
        return any(now - since < self.settle for _, since in self._since.values())


def arrivals(folder: Path) -> list[Arrival]:
    """Return everything in the inbox that may be a scan, by name.

    Raises:
        UnreadableFileError: the inbox cannot be listed.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UnreadableFileError(
            f"The inbox {folder} cannot be read: {error.strerror}.", remedy="Check that it is there and may be read."
        ) from error
    found: list[Arrival] = []
    for entry in entries:
        if not os.path.isdir(entry):  # noqa: PTH112 - is_dir() raises where a link leads to what may not be looked at
            found += [_arrival(entry, [entry])] if _is_one_file(entry) or _is_dicom(entry) else []
            continue
        try:
            files = sorted(files_below(entry))
        except OSError:  # listed all the same: content_key says what is wrong
            found.append(_arrival(entry, [entry]))
            continue
        scans = [file for file in files if _is_one_file(file)]
        found += [_arrival(file, [file]) for file in scans]
        others = [file for file in files if not _is_one_file(file)]
        if (files and not scans) or any(map(_is_dicom, others)):
            found.append(_arrival(entry, files))
    return found


def signature_of(source: Path) -> str | None:
    """Return the signature of what lies there now, or None where nothing does."""
    try:
        if os.path.isdir(source):  # noqa: PTH112 - as above
            return _arrival(source, sorted(files_below(source))).signature
        return _arrival(source, [source]).signature if source.exists() else None
    except OSError:
        return None


def _is_one_file(path: Path) -> bool:
    return path.name.lower().endswith((*SUFFIXES, _ARCHIVE))


def _is_dicom(file: Path) -> bool:
    """Whether a file begins as DICOM does (PS3.10 7.1); False for what cannot be read."""
    try:
        with open_regular_file(file) as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _arrival(source: Path, files: list[Path]) -> Arrival:
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
        except OSError:  # gone, or a dangling link: it counts by its name
            digest.update(repr(str(file)).encode())
            continue
        digest.update(repr((str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns)).encode())
    return Arrival(source, digest.hexdigest())
