"""CT series of invented patients: headers without pixel data, and label maps on the lattice of the series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, generate_uid

from fseft_edge.runtime.scans.volume import LabelMap

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
SAGITTAL = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0), (1.0, 0.0, 0.0))
DOWNWARDS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
_ANGLE = np.deg2rad(20)
OBLIQUE = (
    (float(np.cos(_ANGLE)), float(np.sin(_ANGLE)), 0.0),
    (float(-np.sin(_ANGLE)), float(np.cos(_ANGLE)), 0.0),
    (0.0, 0.0, 1.0),
)
TILTED = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.2, 1.0))
"""Gantry tilt: the stack direction is not perpendicular to the slices."""

LAYOUTS = {"axial": AXIAL, "sagittal": SAGITTAL, "downwards": DOWNWARDS, "oblique": OBLIQUE, "tilted": TILTED}


@dataclass(frozen=True)
class Series:
    """A series whose first slice has the position ``origin``.

    The directions are LPS+ unit vectors along rows, columns and slices.
    """

    directions: Any = AXIAL
    columns: int = 12
    rows: int = 10
    slices: int = 6
    spacing: tuple[float, float, float] = (0.8, 1.1, 3.0)
    """Distance in mm between columns, between rows and between slices."""
    origin: tuple[float, float, float] = (-31.0, 12.5, 140.0)

    @property
    def lps(self) -> NDArray[np.float64]:
        """Affine 4x4 from ``[column, row, slice]`` to LPS+ mm."""
        affine = np.eye(4)
        affine[:3, :3] = np.array(self.directions).T * self.spacing
        affine[:3, 3] = self.origin
        return affine

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.columns, self.rows, self.slices

    def headers(self) -> list[Dataset]:
        """Return one single-frame header for each slice."""
        found = []
        for number in range(self.slices):
            image = self._common()
            image.SOPClassUID = CTImageStorage
            image.SOPInstanceUID = generate_uid(entropy_srcs=["image", str(number)])
            image.InstanceNumber = number + 1
            self._place(image, number)
            found.append(image)
        return found

    def enhanced(self) -> Dataset:
        """Return the series as one multi-frame header, with its frames in random order."""
        image = self._common()
        image.SOPClassUID = EnhancedCTImageStorage
        image.SOPInstanceUID = generate_uid(entropy_srcs=["enhanced"])
        image.NumberOfFrames = self.slices
        shared, measures, orientation = Dataset(), Dataset(), Dataset()
        single = self.headers()
        measures.PixelSpacing, measures.SliceThickness = single[0].PixelSpacing, single[0].SliceThickness
        orientation.ImageOrientationPatient = single[0].ImageOrientationPatient
        shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
        image.SharedFunctionalGroupsSequence = [shared]
        frames = []
        for number in np.random.default_rng(3).permutation(self.slices):
            frame, position = Dataset(), Dataset()
            position.ImagePositionPatient = single[number].ImagePositionPatient
            frame.PlanePositionSequence = [position]
            frames.append(frame)
        image.PerFrameFunctionalGroupsSequence = frames
        return image

    def label_map(
        self, values: NDArray[np.unsignedinteger], axes: tuple[int, int, int] = (0, 1, 2), flips: int = 0
    ) -> LabelMap:
        """Return ``values[column, row, slice]`` with permuted axes; each bit of ``flips`` flips one axis."""
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.lps
        change = np.zeros((4, 4))
        change[3, 3] = 1
        values = np.transpose(values, axes)
        for new, old in enumerate(axes):
            backwards = bool(flips >> new & 1)
            change[old, new] = -1 if backwards else 1
            change[old, 3] = values.shape[new] - 1 if backwards else 0
            values = np.flip(values, new) if backwards else values
        return LabelMap(np.ascontiguousarray(values), affine @ change)

    def _common(self) -> Dataset:
        image = Dataset()
        image.SpecificCharacterSet = "ISO_IR 192"
        image.PatientName, image.PatientID = "Müller^Grün", "4711"
        image.PatientBirthDate, image.PatientSex = "19500102", "F"
        image.StudyInstanceUID, image.SeriesInstanceUID = (
            generate_uid(entropy_srcs=["study"]),
            generate_uid(entropy_srcs=["series"]),
        )
        image.FrameOfReferenceUID, image.PositionReferenceIndicator = generate_uid(entropy_srcs=["frame"]), ""
        image.StudyDate, image.StudyTime, image.StudyID = "20240229", "101112", "S1"
        image.SeriesDate, image.SeriesTime = "20240229", "101530"
        image.AccessionNumber, image.ReferringPhysicianName = "A99", "Doe^Jane"
        image.Modality = "CT"
        image.Rows, image.Columns = self.rows, self.columns
        return image

    def _place(self, image: Dataset, number: int) -> None:
        image.PixelSpacing = [f"{self.spacing[1]:.8g}", f"{self.spacing[0]:.8g}"]  # between rows, between columns
        image.ImageOrientationPatient = [f"{value:.10f}" for value in (*self.directions[0], *self.directions[1])]
        image.ImagePositionPatient = [f"{value:.8f}" for value in (self.lps @ [0, 0, number, 1])[:3]]
        image.SliceThickness = f"{self.spacing[2]:.8g}"
