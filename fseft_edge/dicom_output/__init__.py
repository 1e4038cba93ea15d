"""Masks as DICOM objects of the study that the scan belongs to: Segmentation and RT Structure Set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydicom.dataset import Dataset

from fseft_edge.dicom_output.instance import DicomKind, SegmentationAlgorithm, WrittenDicom
from fseft_edge.dicom_output.segmentation_object import write_dicom_segmentation
from fseft_edge.dicom_output.structure_set import write_structure_set
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.volume import LabelMap

if TYPE_CHECKING:
    from fseft_edge.masks.result import SegmentedOrgan

__all__ = [
    "DicomKind",
    "SegmentationAlgorithm",
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
    """Write a mask as ``folder/<stem>.seg.dcm`` and ``folder/<stem>.rtstruct.dcm``, whichever are asked for.

    Each file appears complete or not at all, and the same result gives the same bytes. An organ without a voxel is left
    out; of an empty mask no file is written, and an older one of that name is removed.

    Args:
        folder: made if need be.
        stem: of the file names.
        kinds: ``"seg"``, ``"rtstruct"`` or both; written in this order.
        labels: the mask, on the lattice of the source.
        organs: every organ of the mask.
        source: headers of the CT images, without their voxels, in any order; or that of one multi-frame image.
        algorithm: what made the mask.

    Raises:
        UsageError: a kind is unknown.
        InputError: a header lacks what identifies it, or the headers are not of one series.
        GeometryError: a header lacks its place in space, or series and label map do not agree.
        LabelError: the mask holds a value that is no organ's.
        OutOfSpaceError: the disk is full or not writable.
    """
    wanted = tuple(kinds)
    for kind in wanted:
        if kind not in _WRITERS:
            raise UsageError(f"The DICOM object {kind!r} is unknown.", remedy=f"Choose from {', '.join(_WRITERS)}.")
    return tuple(_WRITERS[kind](folder / f"{stem}.{kind}.dcm", labels, organs, source, algorithm) for kind in wanted)
