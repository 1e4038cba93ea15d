"""Search for DICOM series in a file, folder or archive: grouping of slices, their order, and checks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.valuerep import format_number_as_ds

from fseft_edge.runtime.errors import FseftEdgeError, InputError, NoSeriesError, UnreadableFileError
from fseft_edge.runtime.scans.dicom.copies import without_copies
from fseft_edge.runtime.scans.dicom.elements import element_name
from fseft_edge.runtime.scans.dicom.files import DicomFile, DicomSource
from fseft_edge.runtime.scans.dicom.headers import NoImage, SliceHeader, UnreadableImage, read_header, read_slices
from fseft_edge.runtime.scans.dicom.kinds import check_kind, is_localiser
from fseft_edge.runtime.scans.dicom.pixels import check_pixels
from fseft_edge.runtime.scans.dicom.stack import (
    affine_of,
    check_stack,
    drift_of,
    normal_of,
    perpendicular,
    same_plane,
    sort_slices,
)

_NAMED_PLANE = 0.999
_MODALITY = re.compile(r"[A-Z]{2,8}")


@dataclass(frozen=True)
class OtherFiles:
    """Files in a folder or archive that contain no readable image.

    Attributes:
        dicom: number of DICOM files, readable or not.
        unreadable: number of each unreadable file in the order of the names, from 1, and what is wrong with it.
        without_image: SeriesInstanceUIDs of objects without image.
        no_dicom: number of files that are empty, or have the name of a DICOM file and are none.
    """

    dicom: int = 0
    unreadable: tuple[tuple[int, UnreadableImage], ...] = ()
    without_image: tuple[str, ...] = ()
    no_dicom: int = 0

    def unreadable_slices_of(self, uid: str) -> list[tuple[int, UnreadableImage]]:
        """Return the unreadable files that may contain slices of a CT series with this SeriesInstanceUID."""
        return [
            (number, image)
            for number, image in self.unreadable
            if image.may_be_ct and (not uid or image.series_uid in ("", uid))
        ]


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """Slices of one series with equal orientation and matrix size, sorted along the slice normal.

    If the images of a DICOM series differ in kind, orientation, spacing or matrix size, this series becomes several
    objects with the same ``uid``.

    Attributes:
        source: path of the file, folder or archive as given by the user.
        number: number of the series within ``source``, from 1.
        slices: headers of the slices, sorted along the slice normal if all positions are known.
        problem: reason why the series is not a readable CT; None if the headers show no problem.
        warnings: what was left out, corrected or assumed, one sentence each, for :attr:`Volume.warnings`.
        others: files in ``source`` that contain no readable image.
    """

    source: Path
    number: int
    slices: tuple[SliceHeader, ...] = field(repr=False)
    problem: InputError | None = field(repr=False)
    warnings: tuple[str, ...] = ()
    others: OtherFiles = field(default=OtherFiles(), repr=False)

    @property
    def uid(self) -> str:
        """SeriesInstanceUID; empty if missing."""
        return self.slices[0].series_uid

    @property
    def study_uid(self) -> str:
        """StudyInstanceUID; empty if missing."""
        return self.slices[0].study_uid

    @property
    def frame_of_reference_uid(self) -> str:
        """FrameOfReferenceUID; empty if missing."""
        return self.slices[0].frame_of_reference_uid

    @property
    def modality(self) -> str:
        """Modality: ``CT``, ``MR``, ..."""
        return self.slices[0].modality

    @property
    def patient(self) -> bytes:
        """Anonymous key that is equal for all images of one patient within this run."""
        return self.slices[0].patient

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of columns, rows and slices, which become the x, y and z axis of the volume."""
        return self.slices[0].columns, self.slices[0].rows, len(self.slices)

    @cached_property
    def affine(self) -> NDArray[np.float64]:
        """Affine from voxel index to RAS+ world coordinates in mm, float64 4x4.

        Raises:
            InputError: the series is not readable; this is :attr:`problem`.
        """
        if self.problem is not None:
            raise self.problem
        return affine_of(self.slices)

    @property
    def files(self) -> tuple[DicomFile, ...]:
        """The files of the slices in the order of the slices, without repetitions."""
        return tuple(dict.fromkeys(slice_.file for slice_ in self.slices))

    def headers(self) -> list[Dataset]:
        """Read and return the complete headers of :attr:`files` without pixel data. DICOM results refer to them.

        A missing SOPClassUID is filled in. If single-frame slices differ in the rounding of ImageOrientationPatient or
        PixelSpacing, their headers get the mean value, which the volume has too.

        The headers identify the patient: never write them to messages or logs.

        Raises:
            UnreadableFileError: a file is missing or was changed.
            ArchiveError: the archive is damaged.
        """
        common = _common_plane(self.slices)
        classes = {slice_.file: slice_.sop_class for slice_ in self.slices}
        found = []
        with DicomSource(self.source) as source:
            for file in self.files:
                with source.open(file) as stream:
                    try:
                        header = read_header(stream)
                    except FseftEdgeError:
                        raise
                    except Exception:  # pydicom raises many kinds of exception, whose messages quote header values
                        raise UnreadableFileError(
                            f"The header of a DICOM file in {self.source} cannot be read as a whole, or was changed "
                            "during the work.",
                            remedy="Do not change the files of the scan during the work, or leave --dicom out.",
                        ) from None
                    if not header.get("SOPClassUID"):
                        header.SOPClassUID = classes[file]
                    for keyword, value in common.items():
                        setattr(header, keyword, value)
                    found.append(header)
        return found

    def description(self) -> str:
        """Return a description of the series without free text, because free text can identify the patient."""
        columns, rows, slices = self.shape
        first = self.slices[0]
        said = [f"{slices} slice{'s' * (slices > 1)} of {columns}x{rows}"]
        if first.spacing is not None:
            between = "" if self.problem else f" x {np.linalg.norm(self.affine[:3, 2]):.2f}"
            said.append(f"{first.spacing[1]:.2f} x {first.spacing[0]:.2f}{between} mm")
        if first.orientation is not None:
            said.append(_plane(self.slices[:1]))
        if first.kernel:
            said.append(f"kernel {first.kernel}")
        if is_localiser(first):
            said.append("localiser")
        modality = first.modality if _MODALITY.fullmatch(first.modality) else "other modality"
        return ", ".join([modality if first.modality else "no modality", *said])


def find_series(path: Path) -> list[DicomSeries]:
    """Return all image series in a DICOM file, in a folder and its subfolders, or in a zip archive.

    Only headers are read. Slices belong to one series if they agree in SeriesInstanceUID, modality, SOP class, rows,
    columns, PixelSpacing and ImageOrientationPatient (but for rounding, see
    :func:`fseft_edge.runtime.scans.dicom.stack.same_plane`), and if all or none of them are localisers and have a
    geometry. Images without SeriesInstanceUID must also agree in patient, study and frame of reference. Files that are
    not DICOM or contain no image are skipped. Of several equal slices one is used. The order of the series does not
    depend on file names.

    Raises:
        UnreadableFileError: the path does not exist or is not readable, or no header of a DICOM image is readable.
        ArchiveError: the zip archive is encrypted, damaged or too large.
        NoSeriesError: there is no DICOM image.
    """
    slices: list[SliceHeader] = []
    unreadable: list[tuple[int, UnreadableImage]] = []
    without_image: list[str] = []
    seen = 0
    with DicomSource(path) as source:
        for seen, file in enumerate(source.files(), start=1):
            with source.open(file) as stream:
                found = read_slices(file, stream)
            if isinstance(found, UnreadableImage):
                unreadable.append((seen, found))
            elif isinstance(found, NoImage):
                without_image.append(found.series_uid)
            else:
                slices += found
        others = OtherFiles(seen, tuple(unreadable), tuple(without_image), source.no_dicom)
        if not slices and unreadable:
            raise unreadable_files(path, unreadable, seen)
        if not slices:
            content = f"{seen} DICOM files, but no DICOM image" if seen else "no DICOM file"
            raise NoSeriesError(
                f"{path} contains {content}.", remedy="Give the folder, zip archive or file of a CT series."
            )
        groups = sorted(_grouped(slices), key=lambda group: _sorting_key(group[0]))
        return [_series(source, number, group, others) for number, group in enumerate(groups, start=1)]


def unreadable_files(path: Path, files: Sequence[tuple[int, UnreadableImage]], seen: int) -> UnreadableFileError:
    """Return the error for DICOM files that may be slices but cannot be read.

    Args:
        path: path as given by the user.
        files: number of each file in the order of the names, from 1, and what is wrong with it.
        seen: number of DICOM files.
    """
    number, first = files[0]
    which = f"file {number} in the order of the names" if seen > 1 else "the file"
    return UnreadableFileError(
        f"{len(files)} of {seen} DICOM files in {path} cannot be read, and may contain slices of the scan: in {which}, "
        f"{first.damage}.",
        remedy="Copy these files again from their source; or move them out of the folder if the scan is complete "
        "without them.",
    )


def _series(source: DicomSource, number: int, slices: Sequence[SliceHeader], others: OtherFiles) -> DicomSeries:
    path, problem = source.path, None
    given = list(slices)
    try:
        check_kind(slices, path)
        slices = without_copies(slices, source)
        check_pixels(slices, path)
        check_stack(slices, path)
    except InputError as found:
        problem = found
    warnings = [*_assumptions(slices)]
    if copies := len(given) - len(slices):
        warnings.append(
            f"{copies} {'copies of slices were' if copies > 1 else 'copy of a slice was'} left out: position and "
            "pixels are equal."
        )
    stack = sort_slices(slices)
    if problem is None and not perpendicular(affine_of(stack)):
        warnings.append(
            f"The axes of the volume are not perpendicular, as {element_name('ImagePositionPatient')} and "
            f"{element_name('ImageOrientationPatient')} state: the last slice is shifted sideways by "
            f"{drift_of(stack):.2g} mm relative to the first one. Programs based on ITK may not read such a volume."
        )
    return DicomSeries(path, number, stack, problem, tuple(warnings), others)


def _assumptions(slices: Sequence[SliceHeader]) -> Iterator[str]:
    counts = Counter(sentence for slice_ in slices for sentence in slice_.assumptions)
    for keyword, values, assumption in (
        ("SeriesInstanceUID", [slice_.series_uid for slice_ in slices], "grouped by study and geometry"),
        ("StudyInstanceUID", [slice_.study_uid for slice_ in slices], "assumed to belong to one study"),
        (
            "FrameOfReferenceUID",
            [slice_.frame_of_reference_uid for slice_ in slices],
            "assumed to have one frame of reference",
        ),
    ):
        if values.count("") and (any(values) or keyword == "SeriesInstanceUID"):
            counts[f"{element_name(keyword)} is missing: the images are {assumption}."] = values.count("")
    for sentence, count in counts.items():
        yield sentence if count == len(slices) else f"In {count} of {len(slices)} slices, {sentence}"


def _grouped(slices: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    groups: dict[tuple[object, ...], list[list[SliceHeader]]] = {}
    for slice_ in sorted(slices, key=_sorting_key):
        alike = groups.setdefault(_exact_key(slice_), [])
        for group in alike:
            if same_plane(slice_, group[0]):
                group.append(slice_)
                break
        else:
            alike.append([slice_])
    return [group for alike in groups.values() for group in alike]


def _exact_key(slice_: SliceHeader) -> tuple[object, ...]:
    kind = (slice_.modality, slice_.sop_class, is_localiser(slice_), slice_.placed)
    beside = ("", b"") if slice_.series_uid else (slice_.frame_of_reference_uid, slice_.patient)
    return (slice_.series_uid, *beside, *kind, slice_.rows, slice_.columns)


def _common_plane(slices: Sequence[SliceHeader]) -> dict[str, list[str]]:
    """Return the mean value of the elements in which single-frame slices of one stack differ by rounding."""
    found = {}
    for keyword, values in (
        ("ImageOrientationPatient", [slice_.orientation for slice_ in slices]),
        ("PixelSpacing", [slice_.spacing for slice_ in slices]),
    ):
        if len(set(values)) > 1 and None not in values and slices[0].frames == 1:
            mean = np.array(values, float).mean(axis=0)
            found[keyword] = [format_number_as_ds(float(value)) for value in mean]
    return found


def _sorting_key(slice_: SliceHeader) -> tuple[object, ...]:
    return (slice_.study_uid, *_exact_key(slice_), slice_.spacing or (), slice_.orientation or ())


def _plane(slices: Sequence[SliceHeader]) -> str:
    normal = np.abs(normal_of(slices))
    names = ("sagittal", "coronal", "axial")
    return names[int(normal.argmax())] if normal.max() >= _NAMED_PLANE else "oblique"
