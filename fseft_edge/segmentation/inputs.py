"""What `segment` is given, looked through before any work: scans, adapters, their encoder, the output folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fseft_edge.adapters.file import AdapterFile
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.sources import is_nifti, list_scans, scan_name


def cases_of(scans: Sequence[Path], series: str | None = None) -> list[Path]:
    """Return the CTs that files and folders name.

    Raises:
        UsageError: there is none, or two would be written under one name, or a DICOM series is named of several.
    """
    paths = [path for scan in scans for path in list_scans(scan)]
    if not paths:
        raise UsageError("No CT was given.", remedy="Name NIfTI files or DICOM series, or folders.")
    if series is not None and len(paths) > 1:
        raise UsageError(
            f"--series names a series of one scan, and {len(paths)} are given.",
            remedy="Segment the scan whose series is to be chosen by itself.",
        )
    seen: dict[str, Path] = {}
    for path in paths:
        earlier = seen.setdefault(scan_name(path), path)
        if earlier is not path:
            raise UsageError(
                f"{earlier} and {path} would both be written as {scan_name(path)}.nii.gz.",
                remedy="Rename one, or segment them into different folders.",
            )
    return paths


def check_organs(files: Sequence[AdapterFile]) -> None:
    """Raise :class:`UsageError` if two adapters segment an organ of the same name."""
    names = [organ.name for file in files for organ in file.description.organs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"Two adapters segment {', '.join(twice)}.", remedy="Give one of them, or segment into two folders."
        )


def check_output(output: Path, scans: Sequence[Path]) -> None:
    """Raise :class:`UsageError` if masks would take the place of scans, or ``output`` is no folder."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file.", remedy="Name a folder for the masks.")
    target = output.resolve()
    for scan in scans:
        folder = scan.resolve() if scan.is_dir() else scan.resolve().parent
        if target == folder or (scan.is_dir() and folder in target.parents):
            raise UsageError(
                f"{output} holds the scans: masks would overwrite what lies there, or be taken for scans.",
                remedy="Write to another folder.",
            )


def check_dicom(scans: Sequence[Path]) -> None:
    """Raise :class:`UsageError` if a scan is no DICOM series, which its mask as DICOM would have to refer to."""
    plain = [scan for scan in scans if is_nifti(scan)]
    if plain:
        raise UsageError(
            f"{plain[0]} is NIfTI, and a mask as DICOM belongs to a DICOM series.",
            remedy="Leave --dicom out, or give the series itself.",
        )
