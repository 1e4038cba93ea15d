"""Reading of annotations: which organs a label map, or a file that names its structures, contains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeGuard, cast

import numpy as np

from fseft_edge.runtime.errors import GeometryError, InputError, LabelError, UnreadableFileError
from fseft_edge.runtime.scans.annotation import OrganShares
from fseft_edge.runtime.scans.content import found_label_values
from fseft_edge.runtime.scans.given import GivenLabels, given_labels
from fseft_edge.runtime.scans.image_files import is_image_file, read_label_map, read_label_names
from fseft_edge.runtime.scans.image_names import is_nrrd_file, is_segmentation_file
from fseft_edge.runtime.scans.nifti import log_warnings
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.structure_names import listed_names, names_in
from fseft_edge.runtime.scans.structures import BoxedShare, Lattice, Structure, StructureFile
from fseft_edge.runtime.scans.volume import LabelMap

if TYPE_CHECKING:
    from fseft_edge.runtime.scans.dicom.annotation_objects import AnnotationObject

_LOG = logging.getLogger(__name__)

_HEADER_BYTES = 1 << 20

FoundAnnotation: TypeAlias = "Path | AnnotationObject"
"""An annotation before reading: the path of a label map or of a segmentation of 3D Slicer, or a DICOM object."""


def names_structures(annotation: GivenLabels | FoundAnnotation) -> TypeGuard[str | FoundAnnotation]:
    """Return whether an annotation names its structures, and is no label map."""
    if isinstance(annotation, str | Path):
        path = Path(annotation)
        return is_segmentation_file(path) or not is_image_file(path) or _has_segments(path)
    return isinstance(annotation, StructureFile)


def _has_segments(path: Path) -> bool:
    """Return whether an NRRD file names segments as 3D Slicer does, whatever its name is."""
    if not is_nrrd_file(path):
        return False
    try:
        with path.open("rb") as file:
            return b"\nSegment0_" in file.read(_HEADER_BYTES)
    except OSError:  # reported when the file is read
        return False


def structures_of(annotation: str | FoundAnnotation, *, interpolate: bool = True) -> StructureFile:
    """Return an annotation that names its structures.

    Args:
        annotation: the annotation, or the path of its file.
        interpolate: for a path, whether slices between contours on every second or every n-th slice are filled.

    Raises:
        UnreadableFileError: there is not exactly one annotation at the path.
        InputError: the annotation cannot be read.
    """
    if not isinstance(annotation, str | Path):
        return annotation
    path = Path(annotation)
    if is_segmentation_file(path) or is_nrrd_file(path):
        from fseft_edge.runtime.scans.slicer_segmentations import (  # noqa: PLC0415 - loads scipy.ndimage
            read_segmentation,
        )

        return read_segmentation(path)
    found = dicom_annotations(path, interpolate=interpolate)
    if len(found) != 1:
        raise UnreadableFileError(
            f"{path} contains {len(found)} annotations in DICOM, but one is expected here.",
            remedy="Give the file of one RT Structure Set or DICOM Segmentation.",
        )
    return found[0]


def dicom_annotations(path: Path, *, interpolate: bool = True) -> Sequence[AnnotationObject]:
    """Return the RT Structure Sets and DICOM Segmentations in a file, a folder and its subfolders, or an archive.

    Those that cannot be read are logged.

    Args:
        path: file, folder or archive.
        interpolate: whether slices between contours on every second or every n-th slice are filled.

    Raises:
        InputError: there are annotations, but none of them can be read.
    """
    from fseft_edge.runtime.scans.dicom.annotations import find_annotations  # noqa: PLC0415 - loads pydicom

    found = find_annotations(path, interpolate=interpolate)
    if found.problems and not found.objects:
        raise found.problems[0][1]
    for _, problem in found.problems:
        _LOG.warning("an annotation was left out: %s", problem.message)
    return found.objects


def contents_of(annotations: Sequence[GivenLabels | FoundAnnotation]) -> str:
    """Return the label values and the names of structures in annotations as sentences for a message."""
    label_maps = [one for one in annotations if not names_structures(one)]
    named = [structures_of(one) for one in annotations if names_structures(one)]
    sentences = []
    if label_maps:
        values = found_label_values(given_labels(cast("GivenLabels", one)) for one in label_maps)
        sentences.append(f"Label values in the annotations: {values}.")
    if named:
        sentences.append(f"Structures in the annotations: {listed_names(named)}.")
    return " ".join(sentences)


def organs_of_structures(
    file: StructureFile,
    organs: Sequence[OrganLabel],
    lattice: Lattice,
    case: str,
    *,
    frame_of_reference: str = "",
) -> OrganShares:
    """Return the organs among the structures of an annotation file, on the lattice of its CT.

    Args:
        file: the annotation file.
        organs: wanted organs; they have names.
        lattice: lattice of the CT.
        case: name of the case, for messages.
        frame_of_reference: FrameOfReferenceUID of the CT; empty if it is unknown, as for a CT in NIfTI.

    Raises:
        LabelError: an organ has no names, or two structures have names of one organ.
        GeometryError: a structure is in another frame of reference than the CT.
        InputError: a structure does not belong to the lattice, or cannot be converted without a guess.
    """
    log_warnings(case, file.warnings)
    shares: dict[int, BoxedShare] = {}
    for organ in organs:
        structure = _structure_of(organ, file, case)
        if structure is None:
            continue
        of_structure = structure.frame_of_reference
        if frame_of_reference and of_structure and of_structure != frame_of_reference:
            raise GeometryError(
                f"In the annotation of the case {case}, the structure of the organ {organ.name} is in another frame of "
                "reference than the CT.",
                remedy="Export the structures on this CT, or register them to it first.",
            )
        try:
            share, warnings = structure.share(lattice)
        except InputError as error:
            raise type(error)(f"{case}: {organ.name}: {error.message}", remedy=error.remedy) from None
        log_warnings(f"{case}: {organ.name}", warnings)
        if share.voxels > 0 and share.mask().voxels == 0:
            log_warnings(f"{case}: {organ.name}", ("The structure fills less than half of every voxel.",))
        shares[organ.label] = share
    return OrganShares(shares, lattice.affine, lattice.shape, file.path)


def _structure_of(organ: OrganLabel, file: StructureFile, case: str) -> Structure | None:
    """Return the structure of an organ; None if there is none, or if it is empty."""
    if not organ.names:
        raise LabelError(
            f"The annotation of the case {case} names its structures, but --organ {organ.name}={organ.label} gives a "
            "label value.",
            remedy=f"Give --organ {organ.name} (structures with a known name of this organ), or --organ "
            f"'{organ.name}=NAME|OTHER NAME'.",
        )
    found = [
        index
        for index, structure in enumerate(file.structures)
        if organ.is_named(structure.name) or f"#{structure.number}" in organ.names
    ]
    filled = [index for index in found if not file.structures[index].is_empty]
    if len(filled) > 1:
        names = names_in(file)
        raise LabelError(
            f"The annotation of the case {case} contains {len(filled)} structures with names of the organ "
            f"{organ.name}: {', '.join(f'{names[index]} (#{file.structures[index].number})' for index in filled)}.",
            remedy=f"Name one: --organ '{organ.name}=NAME', or '{organ.name}=#NUMBER' if their names are equal.",
        )
    if not filled:
        return None
    structure = file.structures[filled[0]]
    _LOG.info("%s: %s is the structure #%d", case, organ.name, structure.number)
    return structure


def organs_of_label_map(path: Path, organs: Sequence[OrganLabel]) -> LabelMap:
    """Read a label map. Organs without a label value are found by the names that the file contains.

    Raises:
        LabelError: the file contains no names, or several names of one organ.
        InputError: the label map cannot be read.
    """
    labels = read_label_map(path)
    if all(organ.in_label_maps for organ in organs):
        return labels
    names = read_label_names(path)
    if not names:
        wanted = next(organ for organ in organs if not organ.in_label_maps)
        raise LabelError(
            f"The label map {path} contains no names of organs, so the organ {wanted.name} cannot be found by name.",
            remedy=f"Give its label value: --organ {wanted.name}=ID.",
        )
    table = np.zeros(int(labels.array.max(initial=0)) + 1, np.min_scalar_type(max(organ.label for organ in organs)))
    for organ in organs:
        values = [organ.label] if organ.in_label_maps else [v for v, name in names.items() if organ.is_named(name)]
        if len(values) > 1:
            raise LabelError(
                f"The label map {path} contains {len(values)} names of the organ {organ.name}: "
                f"{', '.join(names[value] for value in values)}.",
                remedy=f"Give its label value: --organ {organ.name}=ID.",
            )
        for value in values:
            if value < table.size:
                table[value] = organ.label
    return LabelMap(table[labels.array], labels.affine, labels.source, labels.forms)
