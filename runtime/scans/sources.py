"""Scans on disk: a NIfTI file, or a DICOM series in a folder, a zip archive or a single file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fseft_edge.runtime.errors import UnreadableFileError, UsageError
from fseft_edge.runtime.scans.nifti import case_name, is_nifti_file, list_cases, read_ct
from fseft_edge.runtime.scans.volume import Volume

if TYPE_CHECKING:
    from fseft_edge.runtime.scans.dicom import DicomSeries

_DICOM_SUFFIXES = (".zip", ".dcm")


def is_nifti(path: Path) -> bool:
    """Return True if a path is not a folder and has the name of a NIfTI file. All other paths are read as DICOM."""
    return is_nifti_file(path)


def read_scan(path: Path, series: str | None = None) -> Volume:
    """Read a CT from a NIfTI file, or from a DICOM series in a folder, a zip archive or a single file.

    Args:
        path: path of one scan, as returned by :func:`list_scans`.
        series: number, UID or end of the UID of the DICOM series (see
            :func:`fseft_edge.runtime.scans.dicom.choose_series`); None selects the series automatically.

    Raises:
        UsageError: ``series`` is given for a NIfTI file.
        InputError: the scan is not a readable CT (see :func:`fseft_edge.runtime.scans.nifti.read_ct` and
            :func:`fseft_edge.runtime.scans.dicom.find_series`, ``choose_series`` and ``read_series``).
        OutOfSpaceError: the temporary folder has too little disk space for the unpacked scan.
    """
    return find_scan(path, series).read()


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan before reading, or a scan that is already in memory.

    Attributes:
        name: name of the scan (see :func:`scan_name`).
        path: path of the scan; None for a scan in memory.
        series: the selected DICOM series; None for any other scan.
        volume: the scan in memory; None for a scan that has to be read.
    """

    name: str
    path: Path | None = None
    series: DicomSeries | None = None
    volume: Volume | None = None

    def read(self) -> Volume:
        """Read the scan.

        Raises:
            InputError: the scan is not a readable CT.
            OutOfSpaceError: the temporary folder has too little disk space for the unpacked scan.
        """
        if self.volume is not None:
            return self.volume
        if self.series is not None:
            from fseft_edge.runtime.scans.dicom import read_series  # noqa: PLC0415 - loads pydicom

            return read_series(self.series)
        assert self.path is not None  # noqa: S101 - every scan has one of the three
        return read_ct(self.path)


def find_scan(path: Path, series: str | None = None) -> Scan:
    """Return the scan at a path without reading its voxels. For DICOM, this function selects the series.

    Args:
        path: path of one scan, as returned by :func:`list_scans`.
        series: number, UID or end of the UID of the DICOM series; None selects the series automatically.

    Raises:
        UsageError: ``series`` is given for a NIfTI file.
        InputError: no DICOM series can be selected, or the selected series is not a readable CT.
    """
    if is_nifti(path):
        if series is not None:
            raise UsageError(
                f"{path} is a NIfTI file, but --series can only be used with DICOM.", remedy="Leave --series out."
            )
        return Scan(scan_name(path), path)
    from fseft_edge.runtime.scans import dicom  # noqa: PLC0415 - loads pydicom

    return Scan(scan_name(path), path, dicom.choose_series(dicom.find_series(path), series))


def list_scans(path: Path) -> list[Path]:
    """Return the paths of all scans in a file or folder.

    A file is one scan. In a folder with NIfTI files, each NIfTI file is one scan; these are sorted by name. Any other
    folder is one scan if the folder or its subfolders contain DICOM files.

    Raises:
        UnreadableFileError: the path does not exist, or contains no NIfTI and no DICOM file.
        ArchiveError: a zip archive is encrypted, damaged or too large.
    """
    if is_nifti(path) or not path.exists():
        return list_cases(path)
    if path.is_dir():
        try:
            return list_cases(path)
        except UnreadableFileError as no_nifti:
            if not _contains_dicom(path):
                raise UnreadableFileError(
                    f"The folder {path} contains no NIfTI file, and no DICOM file in it or its subfolders.",
                    remedy=no_nifti.remedy,
                ) from None
    elif not _contains_dicom(path):
        raise UnreadableFileError(
            f"{path} is not a NIfTI file, not a DICOM file, and not a zip archive with DICOM files.",
            remedy="Give a .nii or .nii.gz file, or the folder or zip archive of a DICOM series.",
        )
    return [path]


def scan_name(path: Path) -> str:
    """Return the name of a scan: the name of its file or folder without ``.nii.gz``, ``.nii``, ``.zip`` or ``.dcm``."""
    if is_nifti(path):
        return case_name(path)
    name = path.name or path.resolve().name
    if not path.is_dir() and name.lower().endswith(_DICOM_SUFFIXES):
        return name[: -len(_DICOM_SUFFIXES[0])]
    return name


def _contains_dicom(path: Path) -> bool:
    from fseft_edge.runtime.scans.dicom.files import contains_dicom  # noqa: PLC0415 - loads pydicom

    return contains_dicom(path)
