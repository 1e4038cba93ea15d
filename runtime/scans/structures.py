"""Structures: the named regions of an annotation file, such as a ROI of a structure set or a segment, as shares.

A reader of such files returns :class:`StructureFile` objects. What a structure is on the lattice of its CT is a
:class:`BoxedShare`: contours and segmentations of another lattice fill a voxel only in part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.scans.components import BoxedMask, Slices, bounding_box
from fseft_edge.runtime.scans.volume import Volume

ROUNDING = 1e-3
"""A share this much below one half still counts as half, and one this close to 0 or 1 is 0 or 1: contours from masks
follow pixels exactly, but for the rounding of their coordinates in the file."""


@dataclass(frozen=True, eq=False)
class Lattice:
    """The lattice of a CT.

    Attributes:
        shape: voxels along x, y, z.
        affine: float64 4x4, voxel index to RAS+ world coordinates in mm.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @classmethod
    def of(cls, volume: Volume) -> Lattice:
        """Return the lattice of a CT."""
        return cls(volume.shape, volume.affine)

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))


@dataclass(frozen=True, eq=False)
class BoxedShare:
    """The share of each voxel of a scan that a structure fills, of which only the smallest box is in memory.

    Attributes:
        shape: shape of the scan.
        box: the smallest box that contains all shares above 0; its ranges are empty if there are none.
        inside: the shares in the box, float32 from 0 to 1.
    """

    shape: tuple[int, int, int]
    box: Slices
    inside: NDArray[np.float32]

    @classmethod
    def of(cls, shares: NDArray[np.floating], start: tuple[int, int, int], shape: tuple[int, int, int]) -> BoxedShare:
        """Return the shares of a part of a scan.

        Args:
            shares: shares from 0 to 1 ``[x, y, z]``.
            start: voxel of the scan at which ``shares`` begins.
            shape: shape of the scan.
        """
        if not (shares > 0).any():
            return cls(shape, (slice(0, 0),) * 3, np.zeros((0, 0, 0), np.float32))
        inner = bounding_box(shares > 0)
        x, y, z = (slice(part.start + first, part.stop + first) for part, first in zip(inner, start, strict=True))
        return cls(shape, (x, y, z), np.clip(shares[inner], 0, 1).astype(np.float32))

    @classmethod
    def of_slices(
        cls,
        slices: Mapping[int, tuple[NDArray[np.floating], tuple[int, int]]],
        axes: tuple[int, int, int],
        shape: tuple[int, int, int],
    ) -> BoxedShare:
        """Return the shares of some slices as shares of a scan.

        Args:
            slices: for each slice, shares ``[first, second]`` of a box of pixels within the slice, and the pixel at
                which the box begins.
            axes: the two axes of the scan within a slice in ascending order, then the slice axis.
            shape: shape of the scan.
        """
        filled = {index: (_snapped(shares), at) for index, (shares, at) in slices.items() if shares.size}
        if not filled:
            return cls.of(np.zeros((0, 0, 0)), (0, 0, 0), shape)
        low = [min(at[axis] for _, at in filled.values()) for axis in (0, 1)]
        high = [max(at[axis] + shares.shape[axis] for shares, at in filled.values()) for axis in (0, 1)]
        first, last = min(filled), max(filled)
        stacked = np.zeros((last - first + 1, high[0] - low[0], high[1] - low[1]), np.float32)
        for index, (shares, at) in filled.items():
            u, v = at[0] - low[0], at[1] - low[1]
            stacked[index - first, u : u + shares.shape[0], v : v + shares.shape[1]] = shares
        start = dict(zip(axes, (*low, first), strict=True))
        return cls.of(np.moveaxis(stacked, 0, axes[2]), (start[0], start[1], start[2]), shape)

    @property
    def voxels(self) -> float:
        """Sum of the shares: the volume of the structure in voxels."""
        return float(self.inside.sum(dtype=np.float64))

    def mask(self) -> BoxedMask:
        """Return the voxels that the structure fills by at least half, but for the rounding of coordinates."""
        filled = self.inside >= np.float32(0.5 - ROUNDING)
        if not filled.any():
            return BoxedMask(self.shape, (slice(0, 0),) * 3, np.zeros((0, 0, 0), bool))
        inner = bounding_box(filled)
        x, y, z = (
            slice(part.start + outer.start, part.stop + outer.start)
            for part, outer in zip(inner, self.box, strict=True)
        )
        return BoxedMask(self.shape, (x, y, z), filled[inner])

    def whole(self) -> NDArray[np.float32]:
        """Return the shares of all voxels of the scan, float32 ``[X, Y, Z]``."""
        shares = np.zeros(self.shape, np.float32, order="F")
        shares[self.box] = self.inside
        return shares


def _snapped(shares: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return shares of which those nearly 0 or 1 are 0 or 1: coordinates in files are rounded, often to 0.001 mm."""
    return np.where(shares < ROUNDING, 0, np.where(shares > 1 - ROUNDING, 1, shares))


@dataclass(frozen=True)
class StructureSummary:
    """What an annotation file says of a structure without the CT.

    Attributes:
        contours: number of contours; 0 for a segment.
        planes: number of planes with contours, or of slices with voxels.
        volume_ml: volume in ml; for contours the area on all planes times the smallest distance between two of them;
            None if there is no such distance.
        forms: geometric types of the contours, or the type of the segmentation.
        warnings: what will be left out, corrected or assumed, as whole sentences without names.
    """

    contours: int
    planes: int
    volume_ml: float | None
    forms: tuple[str, ...]
    warnings: tuple[str, ...]


class Structure(Protocol):
    """One named region of an annotation file."""

    @property
    def name(self) -> str:
        """Name in the file. It may contain a patient's name: no message prints it unless the user asks for names."""

    @property
    def number(self) -> int:
        """ROI number, segment number or label value in the file."""

    @property
    def frame_of_reference(self) -> str:
        """FrameOfReferenceUID of a structure in DICOM; empty if the file states none."""

    @property
    def is_empty(self) -> bool:
        """Whether the file names the structure but contains nothing of it, so that it counts as not annotated."""

    def summary(self) -> StructureSummary:
        """Return number of contours and planes, volume and warnings, as far as the file tells without the CT.

        Raises:
            InputError: the structure is damaged.
        """

    def share(self, lattice: Lattice) -> tuple[BoxedShare, tuple[str, ...]]:
        """Return the share of each voxel of a CT, and warnings as whole sentences without names.

        Raises:
            InputError: the structure is not on this lattice, or cannot be converted without a guess.
        """


@runtime_checkable
class StructureFile(Protocol):
    """An annotation file that names its structures."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def structures(self) -> Sequence[Structure]:
        """All structures, in the order of the file."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Everything that the reader left out, corrected or assumed, as whole sentences without names."""
