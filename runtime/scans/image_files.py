"""CTs and label maps in files of every supported format: NIfTI, NRRD and MetaImage; and the annotations of a folder."""

from __future__ import annotations

from pathlib import Path

from fseft_edge.runtime.errors import LabelError, UnreadableFileError
from fseft_edge.runtime.scans import nifti
from fseft_edge.runtime.scans.hounsfield import check_hounsfield
from fseft_edge.runtime.scans.image_names import is_metaimage_file, is_nrrd_file, is_segmentation_file
from fseft_edge.runtime.scans.metaimage import read_metaimage
from fseft_edge.runtime.scans.nrrd_files import read_nrrd
from fseft_edge.runtime.scans.stored_image import StoredImage
from fseft_edge.runtime.scans.volume import LabelMap, Volume


def is_image_file(path: Path) -> bool:
    """Return True if a path is not a folder and has the name of a NIfTI, NRRD or MetaImage file."""
    return nifti.is_nifti_file(path) or is_nrrd_file(path) or is_metaimage_file(path)


def read_ct(path: Path) -> Volume:
    """Read a CT from a NIfTI, NRRD or MetaImage file.

    Uncompressed voxels are mapped, and compressed voxels are unpacked as a stream into an unnamed file in the temporary
    folder of the system. All intensities are read once and must be plausible HU.

    Args:
        path: image file. Any name that is not that of an NRRD or MetaImage file is read as NIfTI.

    Raises:
        UnreadableFileError: the file is missing, a folder, truncated, damaged, or not in the format of its name.
        NotACtError: the image has more than three axes, fewer than two slices, or intensities not in HU.
        GeometryError: the geometry is missing or impossible
            (see :mod:`fseft_edge.runtime.scans.nrrd_files`, ``metaimage`` and ``nifti_forms``).
        OutOfSpaceError: the temporary folder has too little disk space for the unpacked file.
    """
    stored = _stored(path)
    if stored is None:
        return nifti.read_ct(path)
    volume = Volume(stored.array, stored.affine, source=path, warnings=stored.warnings)
    check_hounsfield(volume)
    return volume


def read_label_map(path: Path) -> LabelMap:
    """Read a label map from a NIfTI, NRRD or MetaImage file, as the smallest unsigned integer type for its values.

    What is corrected or assumed about the file is logged as a warning.

    Args:
        path: image file. Any name that is not that of an NRRD or MetaImage file is read as NIfTI.

    Raises:
        UnreadableFileError: the file is missing, a folder, truncated, damaged, or not in the format of its name.
        LabelError: the image is not three-dimensional, a value is negative, too large or not a whole number, or the
            file is a segmentation of 3D Slicer, whose segments are read by their names.
        GeometryError: the geometry is missing or impossible.
        OutOfSpaceError: the temporary folder has too little disk space for the unpacked file.
    """
    if is_segmentation_file(path):
        raise LabelError(
            f"{path} is a segmentation of 3D Slicer, which names its segments, and not a label map.",
            remedy="In 3D Slicer, export the segmentation as a label map (.nii.gz) with the scan as reference.",
        )
    stored = _stored(path)
    if stored is None:
        return nifti.read_label_map(path)
    labels = nifti.label_values_of(stored.array, 1.0, 0.0, path)
    nifti.log_warnings(path, stored.warnings)
    return LabelMap(labels, stored.affine, path)


def read_label_names(path: Path) -> dict[int, str]:
    """Return the names of the label values that a label map file contains; no names if it contains none.

    Only NIfTI files contain names (see :func:`fseft_edge.runtime.scans.nifti.read_label_names`).

    Raises:
        UnreadableFileError: the NIfTI file is missing, a folder, or damaged.
        LabelError: the table of names in the file is damaged.
    """
    return {} if is_nrrd_file(path) or is_metaimage_file(path) else nifti.read_label_names(path)


def annotations_by_name(labels: Path, images: Path | None) -> dict[str, Path]:
    """Return the annotations at a path, as a dictionary with the case names as keys.

    Annotations are label maps, and segmentations of 3D Slicer (``.seg.nrrd``). In a folder that is also the folder of
    the images, only segmentations are annotations.

    Args:
        labels: folder of annotations, or one annotation.
        images: folder of the images, or one image; None if they lie elsewhere.

    Raises:
        UnreadableFileError: the path does not exist, is not an annotation, or is a folder without annotations.
        InputError: two annotations have the same case name, such as ``a.nrrd`` and ``a.seg.nrrd``.
    """
    if not labels.is_dir():
        return nifti.named_cases(
            [labels] if labels.exists() and is_segmentation_file(labels) else nifti.list_cases(labels)
        )
    segmentations = sorted(
        file for file in labels.iterdir() if not file.name.startswith(".") and is_segmentation_file(file)
    )
    if segmentations and images is not None and images.is_dir() and labels.samefile(images):
        return nifti.named_cases(segmentations)
    try:
        label_maps = nifti.list_cases(labels)
    except UnreadableFileError:
        if not segmentations:
            raise
        label_maps = []
    return nifti.named_cases(sorted([*label_maps, *segmentations]))


def _stored(path: Path) -> StoredImage | None:
    """Return the image in an NRRD or MetaImage file; None for the name of any other file."""
    if is_nrrd_file(path):
        return read_nrrd(path).image
    return read_metaimage(path) if is_metaimage_file(path) else None
