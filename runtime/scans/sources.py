"""What a scan on disk is: a NIfTI file, or a DICOM series in a folder, a zip archive or one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fseft_edge.runtime.errors import UnreadableFileError, UsageError
from fseft_edge.runtime.scans.nifti import SUFFIXES, case_name, list_cases, read_ct
from fseft_edge.runtime.scans.volume import Volume

if TYPE_CHECKING:
    from fseft_edge.runtime.scans.dicom import DicomSeries

_DICOM_SUFFIXES = (".zip", ".dcm")


def is_nifti(path: Path) -> bool:
    """Whether a path is read as NIfTI: it has a NIfTI file's name and is no folder. All others are read as DICOM."""
    return path.name.lower().endswith(SUFFIXES) and not path.is_dir()


def read_scan(path: Path, series: str | None = None) -> Volume:
    """Read a CT from a NIfTI file, or from a DICOM series in a folder, a zip archive or one file.

    Args:
        path: one of those that :func:`list_scans` returns.
        series: which DICOM series (see :func:`fseft_edge.runtime.scans.dicom.choose_series`).

    Raises:
        UsageError: a series is named in a NIfTI file.
        InputError: it is no CT that can be read (see :func:`fseft_edge.runtime.scans.nifti.read_ct` and
            :func:`fseft_edge.runtime.scans.dicom.find_series`, ``choose_series`` and ``read_series``).
        OutOfSpaceError: no room to unpack it.
    """
    return find_scan(path, series).read()


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan that was found and not read yet; ``series`` is None where it is NIfTI."""

    path: Path
    series: DicomSeries | None

    def read(self) -> Volume:
        """Read it.

        Raises:
            InputError: see :func:`read_scan`.
            OutOfSpaceError: no room to unpack it.
        """
        if self.series is None:
            return read_ct(self.path)
        from fseft_edge.runtime.scans.dicom import read_series  # noqa: PLC0415 - brings in pydicom, which NIfTI does not need

        return read_series(self.series)


def find_scan(path: Path, series: str | None = None) -> Scan:
    """Return the scan that a path stands for, and of DICOM the series; arguments and errors as in :func:`read_scan`."""
    if is_nifti(path):
        if series is not None:
            raise UsageError(f"{path} is NIfTI and holds no series.", remedy="Leave --series out.")
        return Scan(path, None)
    from fseft_edge.runtime.scans import dicom  # noqa: PLC0415 - likewise

    return Scan(path, dicom.choose_series(dicom.find_series(path), series))


def list_scans(path: Path) -> list[Path]:
    """Return the scans that a path stands for.

    A file is one scan. A folder that holds NIfTI files stands for those, sorted by name. Any other folder is one
    scan when DICOM files lie in it or anywhere below.

    Raises:
        UnreadableFileError: nothing is there, or neither NIfTI nor DICOM.
        ArchiveError: a zip archive that is encrypted, damaged or too large.
    """
    if is_nifti(path) or not path.exists():
        return list_cases(path)
    if path.is_dir():
        try:
            return list_cases(path)
        except UnreadableFileError as no_nifti:
            if not _holds_dicom(path):
                raise UnreadableFileError(
                    f"{path} holds neither a .nii or .nii.gz file nor, in any folder below, a DICOM file.",
                    remedy=no_nifti.remedy,
                ) from None
    elif not _holds_dicom(path):
        raise UnreadableFileError(
            f"{path} is neither NIfTI nor DICOM, nor a zip archive that holds DICOM.",
            remedy="Name a .nii or .nii.gz file, or the folder or zip archive of a DICOM series.",
        )
    return [path]


def scan_name(path: Path) -> str:
    """Return a scan's name: its file's or folder's without ``.nii.gz``, ``.nii``, ``.zip`` or ``.dcm``."""
    if is_nifti(path):
        return case_name(path)
    name = path.name or path.resolve().name
    if not path.is_dir() and name.lower().endswith(_DICOM_SUFFIXES):
        return name[: -len(_DICOM_SUFFIXES[0])]
    return name


def _holds_dicom(path: Path) -> bool:
    from fseft_edge.runtime.scans.dicom.files import holds_dicom  # noqa: PLC0415 - likewise

    return holds_dicom(path)
