"""Distance between two affines of one voxel lattice, measured at the corner voxels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PLAUSIBLE_SPACING_MM = (0.01, 100.0)
"""Range of accepted voxel spacings. Other values mean a wrong unit, or an image that is not of a patient."""

LATTICE_TOLERANCE = 0.1
"""Two affines describe the same lattice if no corner voxel differs by more than this share of the voxel spacing.

The share holds for every axis by itself. Programs round what they store: ITK and DICOM write direction cosines with a
few decimals, which moves far corners by some hundredths of a millimetre. Masks in DICOM allow the same share of the
slice distance.
"""


@dataclass(frozen=True)
class Deviation:
    """Largest distance between two places of the same corner voxel.

    Attributes:
        voxels: largest difference along an axis, in voxels.
        mm: largest distance in mm.
        corner: index of the corner voxel with the largest distance.
    """

    voxels: float
    mm: float
    corner: tuple[int, int, int]

    @property
    def is_rounding(self) -> bool:
        """Whether both affines describe the same lattice within ``LATTICE_TOLERANCE``."""
        return self.voxels <= LATTICE_TOLERANCE

    def __str__(self) -> str:
        return f"{self.mm:.3g} mm at the voxel {list(self.corner)}"


def deviation(a: NDArray[np.float64], b: NDArray[np.float64], shape: tuple[int, ...]) -> Deviation:
    """Return the largest distance between the places that two affines give to a corner voxel.

    Args:
        a: affine 4x4, voxel index to mm; must not be singular. Its voxels are the unit of :attr:`Deviation.voxels`.
        b: affine 4x4 of the same voxels.
        shape: voxels along x, y, z.
    """
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*((0.0, n - 1.0) for n in shape))])
    apart = (corners @ (b - a).T)[:, :3]
    distances = np.linalg.norm(apart, axis=1)
    x, y, z = (int(index) for index in corners[int(distances.argmax())][:3])
    in_voxels = np.linalg.solve(a[:3, :3], apart.T)
    return Deviation(float(np.abs(in_voxels).max()), float(distances.max()), (x, y, z))
