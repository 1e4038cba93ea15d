"""The series in a file, folder or archive: which slices belong together, in what order, and what is wrong with them."""

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
from fseft_edge.runtime.scans.dicom.stack import affine_of, check_stack, normal_of, ordered

SAME_DIRECTION = 1e-4
"""Largest difference of direction cosines within one stack: what rounding to four decimals does."""

SAME_SPACING_MM = 1e-5
"""Largest difference of pixel spacings within one stack: five thousandths of a millimetre across 512 pixels."""

_NAMED_PLANE = 0.999


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """Slices of one series that have the same orientation and matrix, ordered along their normal.

    A series whose images differ in these is several of this kind, each with the same ``uid``.

    Attributes:
        source: the path that it was found in, as given by the user.
        number: counts the series found there, from 1.
        slices: what each slice's header says and where it lies; in order, where they have a place.
        problem: why it cannot be read as a CT; None where it can, as far as headers tell.
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
        """FrameOfReferenceUID; empty where it is not given."""
        return self.slices[0].frame_of_reference_uid

    @property
    def modality(self) -> str:
        """``CT``, ``MR``, ..."""
        return self.slices[0].modality

    @property
    def patient(self) -> bytes:
        """A key that is equal for images of one patient within this run, and tells nothing else."""
        return self.slices[0].patient

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows and slices, which become the volume's x, y and z."""
        return self.slices[0].columns, self.slices[0].rows, len(self.slices)

    @cached_property
    def affine(self) -> NDArray[np.float64]:
        """Voxel index to RAS+ world coordinates in mm, 4x4.

        Raises:
            InputError: the series has a problem.
        """
        if self.problem is not None:
            raise self.problem
        return affine_of(self.slices)

    @property
    def files(self) -> tuple[DicomFile, ...]:
        """The files that hold the slices, in the order of the slices, each once."""
        return tuple(dict.fromkeys(slice_.file for slice_ in self.slices))

    def headers(self) -> list[Dataset]:
        """Read the files again, without pixels, in the order of :attr:`files`; what DICOM results refer to.

        They hold all that the files say of the patient: keep them out of messages and logs.

        Raises:
            UnreadableFileError: a file is gone or has changed.
            ArchiveError: the archive is damaged.
        """
        found = []
        with DicomSource(self.source) as source:
            for file in self.files:
                with source.open(file) as stream:
                    try:
                        found.append(read_header(stream))
                    except Exception:  # see read_slices
                        raise UnreadableFileError(
                            f"A DICOM file in {self.source} can no longer be read.",
                            remedy="Leave the scan where it is while it is worked on.",
                        ) from None
        return found

    def description(self) -> str:
        """Say what tells the series from others, without anything that was typed about a patient."""
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
    """Return the image series in a DICOM file, a folder and all below it, or a zip archive; from headers alone.

    Slices belong together when they agree in SeriesInstanceUID, in kind (SOP class, localiser or not), in rows and
    columns, in PixelSpacing (to ``SAME_SPACING_MM``) and ImageOrientationPatient (to ``SAME_DIRECTION``). Files that
    are not DICOM, or hold no image, are passed over. The order of the series depends on their UIDs alone.

    Raises:
        UnreadableFileError: nothing is there, or a DICOM file in it is truncated, damaged or may not be read.
        ArchiveError: a zip archive that is encrypted, damaged or too large.
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
            f"{damaged} of {seen} DICOM files in {path} cannot be read: truncated, damaged, or deflated.",
            remedy="Copy the series again from where it came.",
        )
    if not slices:
        found = f"no image in its {seen} DICOM files" if seen else "no DICOM file"
        raise NoSeriesError(f"{path} holds {found}.", remedy="Name the folder, zip archive or file of a CT series.")
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
    return DicomSeries(path, number, ordered(slices), problem)


def _grouped(slices: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    groups: dict[tuple[object, ...], list[list[SliceHeader]]] = {}
    for slice_ in slices:
        alike = groups.setdefault(_exact_key(slice_), [])
        for group in alike:
            if _close(slice_.orientation, group[0].orientation, SAME_DIRECTION) and _close(
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


def _close(a: tuple[float, ...] | None, b: tuple[float, ...] | None, tolerance: float) -> bool:
    """Whether numbers agree; one that is missing agrees with all, so that it spoils its series and is not set aside."""
    if a is None or b is None:
        return True
    return bool(np.abs(np.subtract(a, b)).max() <= tolerance)


def _plane(slice_: SliceHeader) -> str:
    normal = np.abs(normal_of(slice_))
    names = ("sagittal", "coronal", "axial")
    return names[int(normal.argmax())] if normal.max() >= _NAMED_PLANE else "oblique"
