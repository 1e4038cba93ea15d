"""Search for DICOM series in a file, folder or archive: grouping of slices, their order, and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fseft_edge.runtime.errors import InputError, NoSeriesError, UnreadableFileError
from fseft_edge.runtime.scans.dicom.files import DicomFile, DicomSource
from fseft_edge.runtime.scans.dicom.headers import DamagedHeaderError, SliceHeader, read_header, read_slices
from fseft_edge.runtime.scans.dicom.kinds import check_kind, is_localiser
from fseft_edge.runtime.scans.dicom.pixels import check_pixels
from fseft_edge.runtime.scans.dicom.stack import affine_of, check_stack, normal_of, sort_slices

SAME_DIRECTION = 1e-4
"""Largest difference of direction cosines within one stack. It allows for rounding to four decimals."""

SAME_SPACING_MM = 1e-5
"""Largest difference of pixel spacings within one stack. It corresponds to 0.005 mm across 512 pixels."""

_NAMED_PLANE = 0.999


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """Slices of one series with equal orientation and matrix size, sorted along the slice normal.

    If the images of a DICOM series differ in orientation or matrix size, this series becomes several objects with the
    same ``uid``.

    Attributes:
        source: path of the file, folder or archive as given by the user.
        number: number of the series within ``source``, from 1.
        slices: headers of the slices, sorted along the slice normal if all positions are known.
        problem: reason why the series is not a readable CT; None if the headers show no problem.
    """

    source: Path
    number: int
    slices: tuple[SliceHeader, ...] = field(repr=False)
    problem: InputError | None = field(repr=False)

    @property
    def uid(self) -> str:
        """SeriesInstanceUID."""
        return self.slices[0].series_uid

    @property
    def study_uid(self) -> str:
        """StudyInstanceUID."""
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

        The headers identify the patient: never write them to messages or logs.

        Raises:
            UnreadableFileError: a file is missing or was changed.
            ArchiveError: the archive is damaged.
        """
        found = []
        with DicomSource(self.source) as source:
            for file in self.files:
                with source.open(file) as stream:
                    try:
                        found.append(read_header(stream))
                    except Exception:  # pydicom raises many kinds of exception, whose messages quote header values
                        raise UnreadableFileError(
                            f"A DICOM file in {self.source} was changed or deleted during the work.",
                            remedy="Start again, and do not change the files of the scan during the work.",
                        ) from None
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
            said.append(_plane(first))
        if first.kernel:
            said.append(f"kernel {first.kernel}")
        if is_localiser(first):
            said.append("localiser")
        return ", ".join([first.modality or "no modality", *said])


def find_series(path: Path) -> list[DicomSeries]:
    """Return all image series in a DICOM file, in a folder and its subfolders, or in a zip archive.

    Only headers are read. Slices belong to one series if they agree in SeriesInstanceUID, modality, SOP class, rows,
    columns, PixelSpacing (within ``SAME_SPACING_MM``) and ImageOrientationPatient (within ``SAME_DIRECTION``), and if
    all or none of them are localisers. Files that are not DICOM or contain no image are skipped. The order of the
    series does not depend on file names.

    Raises:
        UnreadableFileError: the path does not exist, or a DICOM file is truncated, damaged or not readable.
        ArchiveError: the zip archive is encrypted, damaged or too large.
        NoSeriesError: there is no DICOM image.
    """
    slices: list[SliceHeader] = []
    seen = damaged = 0
    with DicomSource(path) as source:
        for file in source.files():
            seen += 1
            with source.open(file) as stream:
                try:
                    slices += read_slices(file, stream)
                except DamagedHeaderError:
                    damaged += 1
    if damaged:
        raise UnreadableFileError(
            f"{damaged} of {seen} DICOM files in {path} are truncated, damaged, or in a deflated transfer syntax.",
            remedy="Copy the series again from its source, or export it from the PACS as uncompressed DICOM.",
        )
    if not slices:
        found = f"{seen} DICOM files, but no DICOM image" if seen else "no DICOM file"
        raise NoSeriesError(f"{path} contains {found}.", remedy="Give the folder, zip archive or file of a CT series.")
    groups = sorted(_grouped(slices), key=lambda group: _sorting_key(group[0]))
    return [_series(path, number, group) for number, group in enumerate(groups, start=1)]


def _series(path: Path, number: int, slices: Sequence[SliceHeader]) -> DicomSeries:
    problem = None
    try:
        check_kind(slices, path)
        check_pixels(slices, path)
        check_stack(slices, path)
    except InputError as found:
        problem = found
    return DicomSeries(path, number, sort_slices(slices), problem)


def _grouped(slices: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    groups: dict[tuple[object, ...], list[list[SliceHeader]]] = {}
    for slice_ in slices:
        alike = groups.setdefault(_exact_key(slice_), [])
        for group in alike:
            if _agree(slice_.orientation, group[0].orientation, SAME_DIRECTION) and _agree(
                slice_.spacing, group[0].spacing, SAME_SPACING_MM
            ):
                group.append(slice_)
                break
        else:
            alike.append([slice_])
    return [group for alike in groups.values() for group in alike]


def _exact_key(slice_: SliceHeader) -> tuple[object, ...]:
    kind = (slice_.modality, slice_.sop_class, is_localiser(slice_))
    return (slice_.series_uid, *kind, slice_.rows, slice_.columns)


def _sorting_key(slice_: SliceHeader) -> tuple[object, ...]:
    return (slice_.study_uid, *_exact_key(slice_), slice_.spacing or (), slice_.orientation or ())


def _agree(a: tuple[float, ...] | None, b: tuple[float, ...] | None, tolerance: float) -> bool:
    """Return True if the numbers agree within a tolerance.

    Missing numbers agree with all numbers, so that a slice without them stays in its series, and the series is refused.
    """
    if a is None or b is None:
        return True
    return bool(np.abs(np.subtract(a, b)).max() <= tolerance)


def _plane(slice_: SliceHeader) -> str:
    normal = np.abs(normal_of(slice_))
    names = ("sagittal", "coronal", "axial")
    return names[int(normal.argmax())] if normal.max() >= _NAMED_PLANE else "oblique"
