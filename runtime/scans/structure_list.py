"""The structures in annotation files, as `fseft-edge contours` lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fseft_edge.runtime.errors import InputError, UnreadableFileError
from fseft_edge.runtime.scans.annotation_files import dicom_annotations, structures_of
from fseft_edge.runtime.scans.image_names import is_segmentation_file
from fseft_edge.runtime.scans.structure_names import names_in
from fseft_edge.runtime.scans.structures import Structure, StructureFile, StructureSummary

if TYPE_CHECKING:
    from fseft_edge.runtime.scans.dicom.annotation_objects import AnnotationObject


@dataclass(frozen=True)
class ListedStructure:
    """A structure of an annotation file.

    Attributes:
        name: name in the file; replaced if it contains the patient's name.
        number: ROI number, segment number or label value.
        volume_ml: volume in ml (see :class:`StructureSummary`); None if it is unknown.
        contours: number of contours; 0 for a segment.
        planes: number of planes with contours, or of slices with voxels.
        types: geometric types of the contours, or the type of the segmentation.
        warnings: what will be left out, corrected or assumed, or why the structure cannot be read.
    """

    name: str
    number: int
    volume_ml: float | None
    contours: int
    planes: int
    types: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ListedAnnotation:
    """An annotation file.

    Attributes:
        annotation: number in the list, from 1: the number for ``--structure-set``.
        kind: ``rtstruct``, ``seg`` or ``seg.nrrd``.
        file: path of the file.
        label: label of a DICOM annotation, if names are shown.
        date: date of a DICOM annotation as ``YYYY-MM-DD``; empty if unknown.
        approval: ApprovalStatus of a DICOM annotation; empty if unknown.
        warnings: what was left out, corrected or assumed in the file as a whole.
        structures: all structures, in the order of the file.
    """

    annotation: int
    kind: str
    file: Path
    label: str
    date: str
    approval: str
    warnings: tuple[str, ...]
    structures: tuple[ListedStructure, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary for each structure, ready for JSON."""
        shared = {
            "annotation": self.annotation,
            "kind": self.kind,
            "file": str(self.file),
            "label": self.label,
            "date": self.date,
            "approval": self.approval,
        }
        return [
            asdict(structure) | shared | {"warnings": [*self.warnings, *structure.warnings]}
            for structure in self.structures
        ]


def list_annotations(path: Path, *, show_names: bool = False) -> list[ListedAnnotation]:
    """Return the annotations that name their structures: in a file, a folder and its subfolders, or an archive.

    Args:
        path: ``.seg.nrrd`` file, DICOM file, folder or archive.
        show_names: also return names that contain the patient's name, and labels.

    Raises:
        UnreadableFileError: the path does not exist, or contains no such annotation.
        InputError: none of the annotations can be read.
    """
    if not path.exists():
        raise UnreadableFileError(f"{path} does not exist.", remedy="Check the path.")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if is_segmentation_file(file))
    listed: list[ListedAnnotation] = []
    for file in files:
        if is_segmentation_file(file):
            found = structures_of(file)
            listed.append(
                ListedAnnotation(
                    len(listed) + 1, "seg.nrrd", file, "", "", "", found.warnings, _structures(found, show_names)
                )
            )
    if not (path.is_file() and listed):
        for annotation in dicom_annotations(path):
            listed.append(_of_dicom(annotation, len(listed) + 1, show_names=show_names))
    if not listed:
        raise UnreadableFileError(
            f"{path} contains no RT Structure Set, no DICOM Segmentation and no .seg.nrrd file.",
            remedy="Give the file or the folder of an annotation. Label maps have label values and no structures.",
        )
    return listed


def _of_dicom(annotation: AnnotationObject, number: int, *, show_names: bool) -> ListedAnnotation:
    date = annotation.date
    return ListedAnnotation(
        number,
        annotation.kind,
        annotation.path,
        annotation.label if show_names else "",
        f"{date[:4]}-{date[4:6]}-{date[6:]}" if len(date) == len("YYYYMMDD") and date.isdecimal() else "",
        annotation.approval,
        annotation.warnings,
        _structures(annotation, show_names),
    )


def _structures(file: StructureFile, show_names: bool) -> tuple[ListedStructure, ...]:
    names: Sequence[str] = names_in(file, show_all=show_names)
    listed = []
    for name, structure in zip(names, file.structures, strict=True):
        summary = _summary(structure)
        volume = None if summary.volume_ml is None else round(summary.volume_ml, 3)
        listed.append(
            ListedStructure(
                name, structure.number, volume, summary.contours, summary.planes, summary.forms, summary.warnings
            )
        )
    return tuple(listed)


def _summary(structure: Structure) -> StructureSummary:
    try:
        return structure.summary()
    except InputError as error:
        return StructureSummary(0, 0, None, (), (error.message,))
