"""One patient: everything about the anatomy that a seed decides, whatever the lattice or the site."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Patient:
    """Size, pose and findings of one patient, in the trunk's own frame.

    The trunk's frame is millimetres, x to the patient's right, y to the front, z to the head, with its origin in the
    middle of the trunk at the level of the first lumbar vertebra; a patient of average size has scale 1.

    Attributes:
        seed: what everything else follows from.
        rotation: trunk frame to world, `[3, 3]`.
        translation: the trunk's origin in world mm, `[3]`.
        scale: the patient's size against the average along x, y and z, `[3]`.
        bend_mm: amplitude of the spine's curve along x (scoliosis) and y, `[2]`.
        bend_phase: where along z the two curves bend, radians, `[2]`.
        cavity: half widths of the trunk's cavity along x and y, mm, `[2]`.
        fat_mm: thickness of subcutaneous fat at the flanks.
        wall_mm: thickness of the muscle wall.
        dome_mm: height of the diaphragm's dome.
        vertebra_shift: where the vertebrae lie along z, mm.
        enhancement: how strongly contrast shows in this patient, 1 on average.
        large_spleen, liver_lesions, kidney_cyst, effusion, arms_down, oral_contrast: findings and circumstances.
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
        """The patient that a seed stands for."""
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
        """The structure's own random numbers, so that no structure depends on what is drawn before it."""
        return np.random.default_rng([self.seed, 1 + zlib.crc32(structure.encode())])


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotations about x, then y, then z, by `angles` in radians, as one matrix `[3, 3]`."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x, dtype=np.float64)
