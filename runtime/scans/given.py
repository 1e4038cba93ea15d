"""Scans and label maps that a Python caller gives: a path, a NIfTI image in memory, or the toolkit's own type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import nibabel as nib

from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.image_files import read_label_map
from fseft_edge.runtime.scans.images import label_map_of_image, volume_of_image
from fseft_edge.runtime.scans.sources import Scan, find_scan, list_scans
from fseft_edge.runtime.scans.volume import LabelMap, Volume

GivenScan: TypeAlias = str | Path | nib.nifti1.Nifti1Pair | Volume
"""A CT: path of a NIfTI, NRRD or MetaImage file or of a DICOM series, NIfTI image in memory, or ``Volume``."""

GivenLabels: TypeAlias = str | Path | nib.nifti1.Nifti1Pair | LabelMap
"""A label map: path of a NIfTI, NRRD or MetaImage file, NIfTI image in memory, or ``LabelMap``."""


def given_scan(given: GivenScan, series: str | None = None, *, name: str = "scan") -> Scan:
    """Return one CT.

    Args:
        given: the CT. A path must not contain more than one scan.
        series: DICOM series (see :func:`fseft_edge.runtime.scans.sources.find_scan`).
        name: name of a CT in memory.

    Raises:
        UsageError: a path contains several scans, or the type of ``given`` is not supported.
        InputError: the CT is not usable.
    """
    if isinstance(given, str | Path):
        found = list_scans(Path(given))
        if len(found) > 1:
            raise UsageError(
                f"{given} contains {len(found)} scans, but one scan is expected here.",
                remedy="Give the path of one scan, or a list of scans.",
            )
        return find_scan(found[0], series)
    if isinstance(given, Volume):
        return Scan(name, volume=given)
    if isinstance(given, nib.nifti1.Nifti1Pair):
        return Scan(name, volume=volume_of_image(given))
    raise UsageError(
        f"A value of type {type(given).__name__} is not a scan.",
        remedy="Give a path, a NIfTI image of nibabel, or a fseft_edge Volume(array, affine).",
    )


def given_labels(given: GivenLabels) -> LabelMap:
    """Return one label map.

    Raises:
        UsageError: the type of ``given`` is not supported.
        InputError: the label map is not usable.
    """
    if isinstance(given, str | Path):
        return read_label_map(Path(given))
    if isinstance(given, LabelMap):
        return given
    if isinstance(given, nib.nifti1.Nifti1Pair):
        return label_map_of_image(given)
    raise UsageError(
        f"A value of type {type(given).__name__} is not a label map.",
        remedy="Give a path, a NIfTI image of nibabel, or a fseft_edge LabelMap(array, affine).",
    )


def one_or_many(given: GivenScan | Sequence[GivenScan]) -> tuple[bool, list[GivenScan]]:
    """Return whether one scan was given, and the given scans as a list."""
    if isinstance(given, str | Path | Volume | nib.nifti1.Nifti1Pair) or not isinstance(given, Sequence):
        return True, [given]
    return False, list(given)
