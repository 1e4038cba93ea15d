"""Search for annotations in DICOM: RT Structure Sets and Segmentations in a file, folder or zip archive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fseft_edge.runtime.errors import ArchiveError, InputError
from fseft_edge.runtime.scans.dicom.annotation_objects import AnnotationObject, read_kind
from fseft_edge.runtime.scans.dicom.files import DicomFile, DicomSource
from fseft_edge.runtime.scans.dicom.segmentations import read_segmentation
from fseft_edge.runtime.scans.dicom.structure_sets import read_structure_set


@dataclass(frozen=True)
class FoundAnnotations:
    """Annotations in a file, folder or archive, in the order of the file names.

    Attributes:
        objects: the readable ones.
        problems: the files of the others, and what is wrong with each of them.
    """

    objects: tuple[AnnotationObject, ...]
    problems: tuple[tuple[DicomFile, InputError], ...]


def find_annotations(path: Path, *, interpolate: bool = True) -> FoundAnnotations:
    """Return all RT Structure Sets and Segmentations in a DICOM file, in a folder and its subfolders, or in an archive.

    Other files are skipped. Both tuples are empty if there is no annotation.

    Args:
        path: path as given by the user.
        interpolate: whether a ROI with contours on every second (third, ...) slice is filled between them.

    Raises:
        UnreadableFileError: the path does not exist or is not readable.
        ArchiveError: the archive is encrypted, damaged or too large.
    """
    objects: list[AnnotationObject] = []
    problems: list[tuple[DicomFile, InputError]] = []
    with DicomSource(path) as source:
        for file in source.files():
            with source.open(file) as stream:
                kind = read_kind(stream)
            try:
                if kind == "rtstruct":
                    objects.append(read_structure_set(file, source, interpolate=interpolate))
                elif kind == "seg":
                    objects.append(read_segmentation(file, source))
            except ArchiveError:
                raise
            except InputError as problem:
                problems.append((file, problem))
    return FoundAnnotations(tuple(objects), tuple(problems))
