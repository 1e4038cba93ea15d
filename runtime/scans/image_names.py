"""File names of the image formats beside NIfTI: NRRD, MetaImage, and segmentations of 3D Slicer."""

from __future__ import annotations

from pathlib import Path

NRRD_SUFFIXES = (".nrrd", ".nhdr")
"""Endings of NRRD: header and voxels in one file, or a header that names the file of its voxels."""

METAIMAGE_SUFFIXES = (".mha", ".mhd")
"""Endings of MetaImage: header and voxels in one file, or a header that names the file of its voxels."""

SEGMENTATION_SUFFIXES = (".seg.nrrd", ".seg.nhdr")
"""Endings of segmentations of 3D Slicer, which are NRRD files with named segments."""

DETACHED_SUFFIXES = (".nhdr", ".mhd")
"""Endings of headers whose voxels are in another file."""

_SUFFIXES = (*SEGMENTATION_SUFFIXES, *NRRD_SUFFIXES, *METAIMAGE_SUFFIXES)


def other_ending_of(path: Path) -> str:
    """Return the ending that makes a file name the name of one of these formats, as it is written; empty if none."""
    for suffix in _SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[-len(suffix) :]
    return ""


def is_segmentation_file(path: Path) -> bool:
    """Return True if a path has the name of a segmentation of 3D Slicer and is not a folder."""
    return other_ending_of(path).lower() in SEGMENTATION_SUFFIXES and not path.is_dir()


def is_nrrd_file(path: Path) -> bool:
    """Return True if a path has the name of an NRRD image and is not a folder. A segmentation is no image."""
    return other_ending_of(path).lower() in NRRD_SUFFIXES and not path.is_dir()


def is_metaimage_file(path: Path) -> bool:
    """Return True if a path has the name of a MetaImage and is not a folder."""
    return other_ending_of(path).lower() in METAIMAGE_SUFFIXES and not path.is_dir()
