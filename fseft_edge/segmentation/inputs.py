"""Checks of the arguments of `segment` before any computation: scans, organs of the adapters, output folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fseft_edge.adapters.file import AdapterFile
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.given import GivenScan, given_scan, one_or_many
from fseft_edge.runtime.scans.image_files import is_image_file
from fseft_edge.runtime.scans.sources import Scan, list_scans, scan_name


def cases_of(scans: GivenScan | Sequence[GivenScan], series: str | None = None) -> list[Path | Scan]:
    """Return every CT among the given files and folders as its path, and every CT in memory as a ``Scan``.

    A single CT in memory has the name ``scan``; the CTs of a list have the names ``scan_1``, ``scan_2`` and so on.

    Raises:
        UsageError: no CT is given, two CTs would be written to the same mask file, or ``series`` is given with more
            than one CT.
    """
    single, given = one_or_many(scans)
    cases: list[Path | Scan] = []
    for number, scan in enumerate(given, start=1):
        if isinstance(scan, str | Path):
            cases += list_scans(Path(scan))
        else:
            cases.append(given_scan(scan, name="scan" if single else f"scan_{number}"))
    if not cases:
        raise no_scan()
    check_series(series, len(cases))
    seen: dict[str, Path | Scan] = {}
    for case in cases:
        name = name_of(case)
        earlier = seen.setdefault(name, case)
        if earlier is not case:
            both = " and ".join(str(one) if isinstance(one, Path) else "a scan in memory" for one in (earlier, case))
            raise UsageError(
                f"The masks of {both} would have the same file name, {name}.nii.gz.",
                remedy="Rename one of the two scans, or write their masks to different folders.",
            )
    return cases


def check_series(series: str | None, scans: int) -> None:
    """Raise UsageError if a series is given together with several scans."""
    if series is not None and scans > 1:
        raise UsageError(
            f"--series can only be used with one scan, but {scans} scans were given.",
            remedy="Give only the scan from which the series is to be chosen.",
        )


def no_scan() -> UsageError:
    """Return the error for a list without any CT."""
    return UsageError("No CT was given.", remedy="Give NIfTI files, DICOM series, or folders that contain them.")


def name_of(case: Path | Scan) -> str:
    """Return the name of a CT that :func:`cases_of` returned."""
    return scan_name(case) if isinstance(case, Path) else case.name


def check_organs(files: Sequence[AdapterFile]) -> None:
    """Raise UsageError if two adapters segment an organ of the same name."""
    names = [organ.name for file in files for organ in file.description.organs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"More than one of the given adapters segments {', '.join(twice)}.",
            remedy="Give only one of these adapters, or use each adapter in a separate run with its own output folder.",
        )


def check_output(output: Path, scans: Sequence[Path | Scan]) -> None:
    """Raise UsageError if ``output`` is a file, or if the masks would be written among the scans."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"The output {output} is a file, not a folder.", remedy="Give a folder for the masks.")
    target = output.resolve()
    for scan in scans:
        if isinstance(scan, Scan):
            continue
        folder = scan.resolve() if scan.is_dir() else scan.resolve().parent
        if target == folder or (scan.is_dir() and folder in target.parents):
            raise UsageError(
                f"The output folder {output} contains the scans. Masks could overwrite them or be read as scans.",
                remedy="Give another output folder.",
            )


def check_dicom(scans: Sequence[Path | Scan]) -> None:
    """Raise UsageError if a scan is not a DICOM series: a DICOM mask object has to refer to its source series."""
    plain = [scan for scan in scans if isinstance(scan, Scan) or is_image_file(scan)]
    if plain:
        what = "A scan in memory" if isinstance(plain[0], Scan) else f"{plain[0]}"
        raise UsageError(
            f"{what} was given, but --dicom can only be used with DICOM series.",
            remedy="Remove --dicom, or give the DICOM series of this scan.",
        )
