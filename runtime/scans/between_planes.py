"""A structure on a slice between two contoured slices, interpolated by signed distance.

Source: G. T. Herman, J. Zheng, C. A. Bucholtz, "Shape-based interpolation", IEEE Computer Graphics and Applications
12(3), 1992. A point is inside if the weighted mean of its distances to both outlines, positive inside them, is
positive. Two things are added. If each slice shows one component, both are first moved along the line between their
centroids, so that a tilted tube keeps its cross-section. And the outline is taken at the distance at which the area is
that of a smooth curve through the areas of all contoured slices, because the mean of distances makes a sphere a
polyhedron: on every second slice, it loses 2 % of the volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.scans.polygons import Region

_FINE_PIXELS, _MOST_FINER = 250_000, 4
"""The lattice of the distances has pixels of a quarter of the smaller pixel spacing, but at most this number of them
unless the pixels themselves are more."""
_CERTAIN = 1e-3
_HALVINGS = 40


def interpolated(
    regions: tuple[Region, Region],
    parts: Sequence[float],
    areas: Sequence[float],
    spacing: tuple[float, float],
    shape: tuple[int, int],
) -> list[tuple[NDArray[np.float64], tuple[int, int]]]:
    """Return the share of each pixel that a structure fills on slices between two contoured slices.

    Args:
        regions: the structure on both slices, in pixels.
        parts: place of each wanted slice on the way from the first to the second region, between 0 and 1.
        areas: area of each wanted slice in pixels.
        spacing: pixel spacing along the first and second coordinate in mm.
        shape: number of pixels along the first and second coordinate.

    Returns:
        For each part: shares from 0 to 1, float64 ``[first, second]``, of a box, and the pixel at which it begins.
    """
    bounds = [region.bounds for region in regions]
    low = np.clip(np.floor(np.min([first for first, _ in bounds], axis=0)) - 1, 0, shape).astype(int)
    high = np.clip(np.ceil(np.max([last for _, last in bounds], axis=0)) + 2, 0, shape).astype(int)
    size = np.maximum(high - low, 0)
    start = (int(low[0]), int(low[1]))
    if not size.all():
        return [(np.zeros((0, 0)), start) for _ in parts]
    finer = _finer(size, spacing)
    first, second = (_Outline.of(region, low, size, finer, spacing) for region in regions)
    way = second.centre - first.centre if first.components == second.components == 1 else np.zeros(2)
    found = []
    for part, area in zip(parts, areas, strict=True):
        fine = _mean_outline(first, second, part, way, area * finer[0] * finer[1])
        found.append((fine.reshape(size[0], finer[0], size[1], finer[1]).mean(axis=(1, 3)), start))
    return found


def _finer(size: NDArray[np.intp], spacing: tuple[float, float]) -> tuple[int, int]:
    """Return into how many parts a pixel is divided along each coordinate."""
    smaller = min(spacing)
    for parts in range(_MOST_FINER, 0, -1):
        first, second = (max(1, round(parts * step / smaller)) for step in spacing)
        if size[0] * first * size[1] * second <= _FINE_PIXELS:
            return first, second
    return 1, 1


def _mean_outline(
    first: _Outline, second: _Outline, part: float, way: NDArray[np.float64], area: float
) -> NDArray[np.float64]:
    """Return the share of each fine pixel that lies within the mean of two outlines, with a given area in pixels."""
    to_first, to_second = part * way, (part - 1) * way
    shares = [first.moved(to_first), second.moved(to_second)]
    share: NDArray[np.float64] = (shares[0] > 0.5).astype(np.float64)  # right wherever both outlines agree
    unclear = np.nonzero((np.minimum(*shares) < 1 - _CERTAIN) & (np.maximum(*shares) > _CERTAIN))
    places = np.stack(unclear, axis=1) * first.pitch
    distance = (1 - part) * first.distance(places - to_first, shares[0][unclear])
    distance += part * second.distance(places - to_second, shares[1][unclear])
    in_pixels = 0.5 + distance / np.sqrt(first.pitch.prod())
    share[unclear] = 0
    share[unclear] = _with_sum(in_pixels, area - float(share.sum()))
    return share


def _with_sum(values: NDArray[np.float64], wanted: float) -> NDArray[np.float64]:
    """Return values minus a common number, limited to 0 and 1, with a sum as near to ``wanted`` as it can be."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.zeros_like(values)
    low, high = float(finite.min()) - 1, float(finite.max())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if np.clip(finite - middle, 0, 1).sum() > wanted:
            low = middle
        else:
            high = middle
    return np.clip(values - (low + high) / 2, 0, 1)


@dataclass(frozen=True, eq=False)
class _Outline:
    """The outline of a region on a fine lattice.

    Attributes:
        shares: share of each fine pixel that the region fills.
        pitch: distance between fine pixels in mm, float64 ``[2]``.
    """

    shares: NDArray[np.float64]
    pitch: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        region: Region,
        low: NDArray[np.intp],
        size: NDArray[np.intp],
        finer: tuple[int, int],
        spacing: tuple[float, float],
    ) -> _Outline:
        """Return the outline of a region in a box of pixels that begins at ``low``."""
        scale = np.array(finer, float)
        whole = (int(size[0]) * finer[0], int(size[1]) * finer[1])
        part, (u, v) = region.moved(low - 0.5 + 0.5 / scale, scale).shares(whole)
        shares = np.zeros(whole)
        shares[u : u + part.shape[0], v : v + part.shape[1]] = part
        return cls(shares, np.array(spacing) / scale)

    @cached_property
    def centre(self) -> NDArray[np.float64]:
        """Centroid in mm."""
        u, v = (np.arange(count) for count in self.shares.shape)
        total = max(float(self.shares.sum()), 1e-300)
        return np.array([self.shares.sum(axis=1) @ u, self.shares.sum(axis=0) @ v]) / total * self.pitch

    @cached_property
    def components(self) -> int:
        """Number of connected components."""
        from scipy import ndimage  # noqa: PLC0415 - only needed for interpolation

        return int(ndimage.label(self.shares > 0.5)[1])

    def moved(self, way: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the shares after a shift in mm."""
        from scipy import ndimage  # noqa: PLC0415 - only needed for interpolation

        if not way.any():
            return self.shares
        moved: NDArray[np.float64] = ndimage.shift(self.shares, way / self.pitch, order=1, prefilter=False)
        return moved

    def distance(self, places: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return distances to the outline in mm, positive inside it.

        Args:
            places: points in mm, float64 ``[n, 2]``.
            shares: share of the pixel around each point that the region fills.
        """
        from scipy.spatial import cKDTree  # noqa: PLC0415 - only needed for interpolation

        starts, ends, before = self._segments
        if not len(starts):
            return np.full(len(places), -np.inf)
        nearest = cKDTree(starts).query(places)[1]
        beside = [_distance(places, starts[index], ends[index]) for index in (nearest, before[nearest])]
        distance: NDArray[np.float64] = np.where(shares > 0.5, 1.0, -1.0) * np.minimum(*beside)
        return distance

    @cached_property
    def _segments(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
        """Start and end of each segment in mm, and the number of the segment before it."""
        from contourpy import contour_generator  # noqa: PLC0415 - only needed for interpolation

        lines = contour_generator(z=np.pad(self.shares, 1)).lines(0.5)
        if not lines:
            return np.empty((0, 2)), np.empty((0, 2)), np.empty(0, np.intp)
        # contourpy gives column and row; a closed line repeats its first vertex.
        placed = [(np.asarray(line)[:, ::-1] - 1) * self.pitch for line in lines]
        first = np.cumsum([0, *(len(line) - 1 for line in placed)])
        before = [np.roll(np.arange(a, b), 1) for a, b in pairwise(first.tolist())]
        return (
            np.concatenate([line[:-1] for line in placed]),
            np.concatenate([line[1:] for line in placed]),
            np.concatenate(before),
        )


def _distance(
    places: NDArray[np.float64], starts: NDArray[np.float64], ends: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the distance of each point to its segment."""
    along, to_place = ends - starts, places - starts
    length = np.maximum((along**2).sum(axis=1), 1e-300)
    part = np.clip((along * to_place).sum(axis=1) / length, 0, 1)
    distance: NDArray[np.float64] = np.linalg.norm(to_place - part[:, None] * along, axis=1)
    return distance
