"""Synthetic CT series as DICOM files, written with pydicom."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
PATIENT = "Secretname^Ada"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

Change = Callable[[Dataset, int], None]


@dataclass(frozen=True)
class Series:
    """A series to write, with its geometry in the LPS+ coordinates of DICOM.

    Attributes:
        hu: HU ``[columns, rows, slices]``, whole numbers.
        spacing: distance in mm between columns, rows and slices.
        orientation: direction cosines of a row, then of a column.
        origin: centre of the first voxel in mm, LPS+.
        intercept: HU of a stored zero.
        signed: store signed values.
        stored: number of stored bits.
        uid: SeriesInstanceUID.
        study: StudyInstanceUID.
        frame_of_reference: FrameOfReferenceUID.
    """

    hu: NDArray[np.int16]
    spacing: tuple[float, float, float] = (0.75, 0.5, 2.5)
    orientation: tuple[float, ...] = AXIAL
    origin: tuple[float, float, float] = (-120.5, -90.25, 33.0)
    intercept: int = -1024
    signed: bool = True
    stored: int = 16
    uid: str = field(default_factory=generate_uid)
    study: str = field(default_factory=generate_uid)
    frame_of_reference: str = field(default_factory=generate_uid)

    @property
    def normal(self) -> NDArray[np.float64]:
        """Slice normal: cross product of row and column direction."""
        return np.cross(self.orientation[:3], self.orientation[3:])

    def position(self, place: float) -> NDArray[np.float64]:
        """Return ImagePositionPatient of a slice."""
        return np.asarray(self.origin) + place * self.spacing[2] * self.normal

    def world(self) -> NDArray[np.float64]:
        """Return RAS+ coordinates in mm of every voxel, ``[columns, rows, slices, 3]`` (PS3.3 equation C.7.6.2.1-1)."""
        column, row, place = np.indices(self.hu.shape).astype(float)
        x, y = np.array(self.orientation[:3]), np.array(self.orientation[3:])
        lps = column[..., None] * x * self.spacing[0] + row[..., None] * y * self.spacing[1]
        lps = lps + place[..., None] * self.normal * self.spacing[2] + np.asarray(self.origin)
        return lps * (-1.0, -1.0, 1.0)

    def pixels(self, place: int) -> bytes:
        """Return the stored bytes of one slice."""
        values = self.hu[:, :, place].T.astype(np.int32) - self.intercept
        return (values & ((1 << self.stored) - 1)).astype("<u2").tobytes()

    def datasets(self) -> list[FileDataset]:
        """Return one single-frame CT image for each slice, in slice order."""
        return [self._single(place) for place in range(self.hu.shape[2])]

    def write(self, folder: Path, change: Change | None = None, names: Sequence[str] | None = None) -> Path:
        """Write one file for each slice after ``change`` modified its data set; default names are ``IM000``, ..."""
        for place, dataset in enumerate(self.datasets()):
            if change is not None:
                change(dataset, place)
            save(dataset, folder / (names[place] if names else f"IM{place:03d}"))
        return folder

    def enhanced(self, order: Sequence[int] | None = None) -> FileDataset:
        """Return all slices as one enhanced CT image, with its frames in the given order."""
        order = list(range(self.hu.shape[2])) if order is None else list(order)
        dataset = self._common(ENHANCED_CT)
        dataset.NumberOfFrames = len(order)
        dataset.PixelData = b"".join(self.pixels(place) for place in order)
        shared, measures, plane, transformation = Dataset(), Dataset(), Dataset(), Dataset()
        measures.PixelSpacing = [self.spacing[1], self.spacing[0]]
        plane.ImageOrientationPatient = list(self.orientation)
        transformation.RescaleSlope, transformation.RescaleIntercept = 1, self.intercept
        transformation.RescaleType = "HU"
        shared.PixelMeasuresSequence = Items([measures])
        shared.PlaneOrientationSequence = Items([plane])
        shared.PixelValueTransformationSequence = Items([transformation])
        dataset.SharedFunctionalGroupsSequence = Items([shared])
        frames = []
        for place in order:
            group, where = Dataset(), Dataset()
            where.ImagePositionPatient = [float(value) for value in self.position(place)]
            group.PlanePositionSequence = Items([where])
            frames.append(group)
        dataset.PerFrameFunctionalGroupsSequence = Items(frames)
        return dataset

    def _single(self, place: int) -> FileDataset:
        dataset = self._common(CT_IMAGE)
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.InstanceNumber = 1 + (place * 7) % 11  # unrelated to the slice order
        dataset.PixelSpacing = [self.spacing[1], self.spacing[0]]
        dataset.ImageOrientationPatient = [_decimal(value) for value in self.orientation]
        dataset.ImagePositionPatient = [_decimal(value) for value in self.position(place)]
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, self.intercept, "HU"
        dataset.ConvolutionKernel = "B30f"
        dataset.PixelData = self.pixels(place)
        return dataset

    def _common(self, sop_class: str) -> FileDataset:
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = sop_class
        meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = self.uid, self.study
        dataset.FrameOfReferenceUID = self.frame_of_reference
        dataset.Modality, dataset.PatientName, dataset.PatientID = "CT", PATIENT, "id-4711"
        dataset.SeriesDescription = f"Thorax of {PATIENT}"
        dataset.Columns, dataset.Rows = self.hu.shape[:2]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, self.stored, self.stored - 1
        dataset.PixelRepresentation = int(self.signed)
        return dataset


def save(dataset: FileDataset, path: Path) -> Path:
    """Write a data set unchanged as a DICOM file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def zipped(folder: Path, archive: Path) -> Path:
    """Pack all files of a folder into a zip archive."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                packed.write(path, path.relative_to(folder).as_posix())
    return archive


def some_hu(shape: tuple[int, int, int] = (7, 6, 5), seed: int = 3) -> NDArray[np.int16]:
    """Return random HU that include air and tissue."""
    hu = np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)
    hu[0, 0], hu[1, 0] = -1000, 60
    return hu


def _decimal(value: float) -> str:
    """Return the most exact decimal string of at most 16 characters (PS3.5 6.2)."""
    for digits in range(16, 0, -1):
        text = f"{value:.{digits}g}"
        if len(text) <= 16:
            return text
    raise ValueError(value)
