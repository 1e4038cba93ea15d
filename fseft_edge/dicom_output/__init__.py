"""Masks as DICOM objects in the study of the scan: Segmentation and RT Structure Set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydicom.dataset import Dataset

from fseft_edge.dicom_output.instance import DicomKind, SegmentationAlgorithm, WrittenDicom
from fseft_edge.dicom_output.segmentation_object import write_dicom_segmentation
from fseft_edge.dicom_output.source_headers import SourceHeaders
from fseft_edge.dicom_output.structure_set import write_structure_set
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.volume import LabelMap

if TYPE_CHECKING:
    from fseft_edge.masks.result import SegmentedOrgan

__all__ = [
    "DicomKind",
    "SegmentationAlgorithm",
    "SourceHeaders",
    "WrittenDicom",
    "write_dicom_results",
    "write_dicom_segmentation",
    "write_structure_set",
]

_WRITERS = {"seg": write_dicom_segmentation, "rtstruct": write_structure_set}


def write_dicom_results(
    folder: Path,
    stem: str,
    kinds: Iterable[DicomKind],
    *,
    labels: LabelMap,
    organs: Sequence[SegmentedOrgan],
    source: Sequence[Dataset],
    algorithm: SegmentationAlgorithm,
) -> tuple[WrittenDicom, ...]:
    """Write a mask as ``folder/<stem>.seg.dcm``, ``folder/<stem>.rtstruct.dcm`` or both.

    Each file appears complete or not at all. Equal results give equal bytes. An organ without voxels is omitted. If the
    whole mask is empty, no file is written, and an existing file of that name is deleted.

    Args:
        folder: output folder; created if it does not exist.
        stem: first part of the file names.
        kinds: objects to write, ``"seg"``, ``"rtstruct"`` or both, in the order of writing.
        labels: the mask, on the lattice of the source series.
        organs: every organ of the mask.
        source: headers of the CT images without pixel data, in any order, or the header of one multi-frame image.
        algorithm: encoder and adapters that made the mask.

    Returns:
        One entry for each object, in the order of ``kinds``.

    Raises:
        UsageError: a name in ``kinds`` is unknown.
        InputError: a header has no UID or no size, or the headers do not belong to one series.
        GeometryError: a header has no position, orientation or spacing, or the lattices of series and mask differ.
        LabelError: the mask contains a label value that does not belong to an organ.
        OutOfSpaceError: the disk is full or not writable.
    """
    wanted = tuple(kinds)
    for kind in wanted:
        if kind not in _WRITERS:
            raise UsageError(
                f"The kind of DICOM object {kind!r} is unknown.", remedy=f"Choose from: {', '.join(_WRITERS)}."
            )
    return tuple(_WRITERS[kind](folder / f"{stem}.{kind}.dcm", labels, organs, source, algorithm) for kind in wanted)
