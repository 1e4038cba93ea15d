"""Checks of the arguments of `segment` before any computation: scans, organs of the adapters, output folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fseft_edge.adapters.file import AdapterFile
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.sources import is_nifti, list_scans, scan_name


def cases_of(scans: Sequence[Path], series: str | None = None) -> list[Path]:
    """Return the path of every CT among the given files and folders.

    Raises:
        UsageError: no CT is given, two CTs would be written to the same mask file, or ``series`` is given with more
            than one CT.
    """
    paths = [path for scan in scans for path in list_scans(scan)]
    if not paths:
        raise UsageError("No CT was given.", remedy="Give NIfTI files, DICOM series, or folders that contain them.")
    if series is not None and len(paths) > 1:
        raise UsageError(
            f"--series can only be used with one scan, but {len(paths)} scans were given.",
            remedy="Give only the scan from which the series is to be chosen.",
        )
    seen: dict[str, Path] = {}
    for path in paths:
        earlier = seen.setdefault(scan_name(path), path)
        if earlier is not path:
            raise UsageError(
                f"The masks of {earlier} and {path} would have the same file name, {scan_name(path)}.nii.gz.",
                remedy="Rename one of the two scans, or write their masks to different folders.",
            )
    return paths


def check_organs(files: Sequence[AdapterFile]) -> None:
    """Raise UsageError if two adapters segment an organ of the same name."""
    names = [organ.name for file in files for organ in file.description.organs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"More than one of the given adapters segments {', '.join(twice)}.",
            remedy="Give only one of these adapters, or use each adapter in a separate run with its own output folder.",
        )


def check_output(output: Path, scans: Sequence[Path]) -> None:
    """Raise UsageError if ``output`` is a file, or if the masks would be written among the scans."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"The output {output} is a file, not a folder.", remedy="Give a folder for the masks.")
    target = output.resolve()
    for scan in scans:
        folder = scan.resolve() if scan.is_dir() else scan.resolve().parent
        if target == folder or (scan.is_dir() and folder in target.parents):
            raise UsageError(
                f"The output folder {output} contains the scans. Masks could overwrite them or be read as scans.",
                remedy="Give another output folder.",
            )


def check_dicom(scans: Sequence[Path]) -> None:
    """Raise UsageError if a scan is not a DICOM series: a DICOM mask object has to refer to its source series."""
    plain = [scan for scan in scans if is_nifti(scan)]
    if plain:
        raise UsageError(
            f"{plain[0]} is a NIfTI file, but --dicom can only be used with DICOM series.",
            remedy="Remove --dicom, or give the DICOM series of this scan.",
        )
