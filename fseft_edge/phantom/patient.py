"""A patient: the anatomical properties that depend only on the seed, not on the lattice or the site."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Patient:
    """Size, pose and findings of a patient, in trunk coordinates.

    Trunk coordinates are in mm: x to the patient's right, y to the front, z to the head. Their origin is in the middle
    of the trunk at the level of the first lumbar vertebra.

    Attributes:
        seed: number that determines all other attributes.
        rotation: rotation from trunk to world coordinates, `[3, 3]`.
        translation: origin of the trunk in world coordinates, mm, `[3]`.
        scale: size of the patient along x, y and z, relative to the average, `[3]`.
        bend_mm: amplitude of the curvature of the spine along x (scoliosis) and y, mm, `[2]`.
        bend_phase: phase of the two curvatures along z, radians, `[2]`.
        cavity: half widths of the trunk's cavity along x and y, mm, `[2]`.
        fat_mm: thickness of the subcutaneous fat at the flanks.
        wall_mm: thickness of the muscle wall.
        dome_mm: height of the dome of the diaphragm.
        vertebra_shift: position of the vertebrae along z, mm.
        enhancement: strength of the contrast enhancement, 1 on average.
        large_spleen: True for an enlarged spleen.
        liver_lesions: number of lesions in the liver.
        kidney_cyst: True if kidneys may have a cyst.
        effusion: True for a pleural effusion.
        arms_down: True for arms beside the trunk.
        oral_contrast: True for oral contrast in stomach and bowel.
    """

    seed: int
    rotation: NDArray[np.float64]
    translation: NDArray[np.float64]
    scale: NDArray[np.float64]
    bend_mm: NDArray[np.float64]
    bend_phase: NDArray[np.float64]
    cavity: tuple[float, float]
    fat_mm: float
    wall_mm: float
    dome_mm: float
    vertebra_shift: float
    enhancement: float
    large_spleen: bool
    liver_lesions: int
    kidney_cyst: bool
    effusion: bool
    arms_down: bool
    oral_contrast: bool

    @classmethod
    def of(cls, seed: int) -> Patient:
        """Return the patient with a seed."""
        rng = np.random.default_rng([seed, 0])
        size = float(np.clip(rng.normal(1.0, 0.045), 0.91, 1.09))
        angles = np.radians(np.clip(rng.normal(0.0, (2.0, 2.5, 4.0)), (-5, -6, -9), (5, 6, 9)))
        return cls(
            seed=seed,
            rotation=_rotation(angles),
            translation=np.clip(rng.normal(0.0, 6.0, 3), -12, 12),
            scale=size * rng.uniform(0.97, 1.03, 3),
            bend_mm=np.clip(rng.normal(0.0, (5.0, 4.0)), -12, 12),
            bend_phase=rng.uniform(0.0, 2 * np.pi, 2),
            cavity=(float(rng.uniform(134, 150)), float(rng.uniform(84, 102))),
            fat_mm=float(np.clip(rng.gamma(3.0, 5.5), 5, 38)),
            wall_mm=float(rng.uniform(10, 15)),
            dome_mm=float(rng.uniform(38, 62)),
            vertebra_shift=float(rng.uniform(-14, 14)),
            enhancement=float(rng.uniform(0.82, 1.18)),
            large_spleen=bool(rng.random() < 0.15),
            liver_lesions=int(rng.choice([0, 0, 0, 1, 2, 4])),
            kidney_cyst=bool(rng.random() < 0.3),
            effusion=bool(rng.random() < 0.15),
            arms_down=bool(rng.random() < 0.12),
            oral_contrast=bool(rng.random() < 0.5),
        )

    def rng(self, structure: str) -> np.random.Generator:
        """Return the random generator of a structure; each structure has its own, so structures are independent."""
        return np.random.default_rng([self.seed, 1 + zlib.crc32(structure.encode())])


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the matrix `[3, 3]` of a rotation about x, then y, then z, by `angles` in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x, dtype=np.float64)
