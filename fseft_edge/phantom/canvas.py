"""A lattice in the coordinates of the patient's trunk, and the shapes that are painted on this lattice.

A shape is an array with the distance in mm from every voxel centre to the surface of the shape, negative inside. The
distances are approximate, but accurate near the surface. Therefore an edge is blurred over one voxel only (partial
volume effect).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fseft_edge.phantom.appearance import AIR_HU
from fseft_edge.phantom.patient import Patient

Field = NDArray[np.float32]
Box = tuple[slice, slice, slice]

_DEFORMATION_MM = 5.0  # largest displacement by the smooth deformation along an axis
_DEFORMATION_WAVES_MM = (260.0, 170.0)
_BEND_PERIOD_MM = 420.0  # along the spine


@dataclass(frozen=True)
class Region:
    """A box of a canvas: the trunk coordinates (mm) of its voxel centres, and its position in the canvas."""

    x: Field
    y: Field
    z: Field
    box: Box


class Canvas:
    """The ideal CT in HU and the label map, both `[X, Y, Z]`, on which structures are painted one after another.

    Args:
        shape: number of voxels along each axis of the lattice.
        affine: matrix from voxel to world coordinates, 4x4, RAS+ mm.
        patient: the patient whose trunk coordinates are used.
    """

    def __init__(self, shape: tuple[int, int, int], affine: NDArray[np.float64], patient: Patient) -> None:
        self.patient = patient
        self.spacing = np.linalg.norm(affine[:3, :3], axis=0)
        self.edge_mm = float(self.spacing.mean())
        self.hu: Field = np.full(shape, AIR_HU, dtype=np.float32)
        self.labels: NDArray[np.uint8] = np.zeros(shape, dtype=np.uint8)
        self._to_voxel = np.linalg.inv(affine)
        to_trunk = patient.rotation.T / patient.scale[:, None]
        matrix = to_trunk @ affine[:3, :3]
        offset = to_trunk @ (affine[:3, 3] - patient.translation)
        i, j, k = (np.arange(n, dtype=np.float64) for n in shape)
        x, y, z = (
            ((row[0] * i)[:, None, None] + (row[1] * j)[None, :, None] + (row[2] * k + start)[None, None, :]).astype(
                np.float32
            )
            for row, start in zip(matrix, offset, strict=True)
        )
        self._deform(x, y, z)
        self.whole = Region(x, y, z, (slice(None), slice(None), slice(None)))

    def _deform(self, x: Field, y: Field, z: Field) -> None:
        """Bend the axis of the spine, and move every point smoothly by at most `_DEFORMATION_MM`, in place."""
        rng = self.patient.rng("deformation")
        moves = [
            sum(plane_wave(x, y, z, rng, wave) for wave in _DEFORMATION_WAVES_MM)
            * np.float32(_DEFORMATION_MM / len(_DEFORMATION_WAVES_MM))
            for _ in range(3)
        ]
        along = z * np.float32(2 * np.pi / _BEND_PERIOD_MM)
        bend_x, bend_y = (
            np.float32(amplitude) * np.sin(along + np.float32(phase))
            for amplitude, phase in zip(self.patient.bend_mm, self.patient.bend_phase, strict=True)
        )
        x += moves[0] + bend_x
        y += moves[1] + bend_y
        z += moves[2]

    def region(self, lower: ArrayLike, upper: ArrayLike, margin: float = 4.0) -> Region:
        """Return the voxels that contain the box `lower` to `upper` in trunk coordinates (mm), with a margin.

        The region is empty if the box is outside the lattice.
        """
        reach = margin + self.edge_mm + _DEFORMATION_MM + np.array([*np.abs(self.patient.bend_mm), 0.0])
        ends = np.stack([np.asarray(lower, dtype=np.float64) - reach, np.asarray(upper, dtype=np.float64) + reach])
        corners = np.stack(np.meshgrid(*ends.T, indexing="ij"), axis=-1).reshape(-1, 3)
        world = (corners * self.patient.scale) @ self.patient.rotation.T + self.patient.translation
        voxels = world @ self._to_voxel[:3, :3].T + self._to_voxel[:3, 3]
        first = np.clip(np.floor(voxels.min(axis=0)), 0, self.hu.shape).astype(int)
        last = np.clip(np.ceil(voxels.max(axis=0)) + 1, first, self.hu.shape).astype(int)
        box = (slice(first[0], last[0]), slice(first[1], last[1]), slice(first[2], last[2]))
        return Region(self.whole.x[box], self.whole.y[box], self.whole.z[box], box)

    def paint(
        self,
        region: Region,
        distance: NDArray[np.floating],
        hu: float | NDArray[np.floating],
        *,
        label: int | None = 0,
        within: int | None = None,
    ) -> None:
        """Paint a shape over the present content.

        Args:
            region: region in which the distance was computed.
            distance: distance in mm to the surface of the shape, negative inside.
            hu: value of the shape, one value or one value per voxel of the region.
            label: label value of the shape's voxels; None does not change the label map.
            within: paint only voxels with this label value; None paints all voxels.
        """
        coverage = np.clip(np.float32(0.5) - distance / np.float32(self.edge_mm), 0, 1)
        inside = distance < 0
        labels = self.labels[region.box]
        if within is not None:
            allowed = labels == within
            coverage *= allowed
            inside &= allowed
        image = self.hu[region.box]
        image += coverage * (hu - image)
        if label is not None:
            labels[inside] = label


def ellipsoid(
    region: Region, centre: ArrayLike, radii: ArrayLike, rotation: NDArray[np.float64] | None = None
) -> Field:
    """Return the distance to an ellipsoid whose axes are the rows of `rotation`; None means the axes of the trunk."""
    middle, half = np.asarray(centre, dtype=np.float32), np.asarray(radii, dtype=np.float32)
    x, y, z = region.x - middle[0], region.y - middle[1], region.z - middle[2]
    if rotation is not None:
        x, y, z = (row[0] * x + row[1] * y + row[2] * z for row in rotation.astype(np.float32))
    length = np.sqrt(x * x + y * y + z * z) + np.float32(1e-3)
    x, y, z = x / half[0], y / half[1], z / half[2]
    level = np.sqrt(x * x + y * y + z * z)
    distance: Field = length - length / np.maximum(level, np.float32(1e-3))
    return distance


def tube(region: Region, points: NDArray[np.float64], radii: ArrayLike) -> Field:
    """Return the distance to a chain of straight tubes through `points` `[n, 3]` with linearly interpolated radii."""
    width = np.asarray(radii, dtype=np.float32)
    nearest = np.full(region.x.shape, np.inf, dtype=np.float32)
    for start, end, r0, r1 in zip(points[:-1], points[1:], width[:-1], width[1:], strict=True):
        (ax, ay, az), (bx, by, bz) = start.astype(np.float32), (end - start).astype(np.float32)
        px, py, pz = region.x - ax, region.y - ay, region.z - az
        along = np.clip((px * bx + py * by + pz * bz) / max(bx * bx + by * by + bz * bz, np.float32(1e-3)), 0, 1)
        gap = np.sqrt(np.square(px - along * bx) + np.square(py - along * by) + np.square(pz - along * bz))
        np.minimum(nearest, gap - (r0 + along * (r1 - r0)), out=nearest)
    return nearest


def smooth_path(points: ArrayLike, steps: int = 4) -> NDArray[np.float64]:
    """Return a Catmull-Rom curve through the points, `[n, 3]`, with `steps` points between two given points."""
    knots = np.asarray(points, dtype=np.float64)
    padded = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    spans = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(padded[:-3], padded[1:-2], padded[2:-1], padded[3:], strict=True)
    ]
    return np.concatenate([*spans, knots[-1:]])


def waves(region: Region, rng: np.random.Generator, wavelength_mm: float, count: int = 4) -> Field:
    """Return a smooth random field of amplitude about 1: a sum of `count` plane waves in random directions."""
    total = np.zeros(region.x.shape, dtype=np.float32)
    for _ in range(count):
        total += plane_wave(region.x, region.y, region.z, rng, wavelength_mm * rng.uniform(0.75, 1.5))
    return total / np.float32(np.sqrt(count))


def plane_wave(x: Field, y: Field, z: Field, rng: np.random.Generator, wavelength_mm: float) -> Field:
    """Return a plane wave of amplitude 1 with random direction and random phase."""
    direction = rng.normal(size=3)
    direction *= 2 * np.pi / wavelength_mm / np.linalg.norm(direction)
    a, b, c = (np.float32(v) for v in direction)
    wave: Field = np.sin(a * x + b * y + c * z + np.float32(rng.uniform(0, 2 * np.pi)))
    return wave
