"""Scans on disk: a NIfTI, NRRD or MetaImage file, or a DICOM series in a folder, a zip archive or a single file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fseft_edge.runtime.errors import UnreadableFileError, UsageError
from fseft_edge.runtime.scans.image_files import is_image_file, read_ct
from fseft_edge.runtime.scans.image_names import is_segmentation_file
from fseft_edge.runtime.scans.nifti import case_name, list_cases
from fseft_edge.runtime.scans.volume import Volume

if TYPE_CHECKING:
    from fseft_edge.runtime.scans.dicom import DicomSeries

_DICOM_SUFFIXES = (".zip", ".dcm")


def read_scan(path: Path, series: str | None = None) -> Volume:
    """Read a CT from a NIfTI, NRRD or MetaImage file, or a DICOM series in a folder, a zip archive or a single file.

    Args:
        path: path of one scan, as returned by :func:`list_scans`.
        series: number, UID or end of the UID of the DICOM series (see
            :func:`fseft_edge.runtime.scans.dicom.choose_series`); None selects the series automatically.

    Raises:
        UsageError: ``series`` is given for a file that is not DICOM.
        InputError: the scan is not a readable CT (see :func:`fseft_edge.runtime.scans.image_files.read_ct` and
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
        UsageError: ``series`` is given for a file that is not DICOM.
        InputError: no DICOM series can be selected, or the selected series is not a readable CT.
    """
    if is_image_file(path):
        if series is not None:
            raise UsageError(
                f"{path} is a single image, but --series can only be used with DICOM.", remedy="Leave --series out."
            )
        return Scan(scan_name(path), path)
    from fseft_edge.runtime.scans import dicom  # noqa: PLC0415 - loads pydicom

    return Scan(scan_name(path), path, dicom.choose_series(dicom.find_series(path), series))


def list_scans(path: Path) -> list[Path]:
    """Return the paths of all scans in a file or folder.

    A file is one scan. In a folder with NIfTI, NRRD or MetaImage files, each of these files is one scan; they are
    sorted by name. Any other folder is one scan if the folder or its subfolders contain DICOM files. A segmentation of
    3D Slicer (``.seg.nrrd``) is no scan.

    Raises:
        UnreadableFileError: the path does not exist, or contains no image and no DICOM file.
        ArchiveError: a zip archive is encrypted, damaged or too large.
    """
    if is_image_file(path) or is_segmentation_file(path) or not path.exists():
        return list_cases(path)
    if path.is_dir():
        try:
            return list_cases(path)
        except UnreadableFileError as no_image:
            if not _contains_dicom(path):
                raise UnreadableFileError(
                    f"The folder {path} contains no NIfTI, NRRD or MetaImage file, and no DICOM file in it or its "
                    "subfolders.",
                    remedy=no_image.remedy,
                ) from None
    elif not _contains_dicom(path):
        raise UnreadableFileError(
            f"{path} is not a NIfTI, NRRD, MetaImage or DICOM file, and not a zip archive with DICOM files.",
            remedy="Give a .nii, .nii.gz, .nrrd or .mha file, or the folder or zip archive of a DICOM series.",
        )
    return [path]


def scan_name(path: Path) -> str:
    """Return the name of a scan: the name of its file or folder without the ending of its format."""
    if is_image_file(path):
        return case_name(path)
    name = path.name or path.resolve().name
    if not path.is_dir() and name.lower().endswith(_DICOM_SUFFIXES):
        return name[: -len(_DICOM_SUFFIXES[0])]
    return name


def _contains_dicom(path: Path) -> bool:
    from fseft_edge.runtime.scans.dicom.files import contains_dicom  # noqa: PLC0415 - loads pydicom

    return contains_dicom(path)
