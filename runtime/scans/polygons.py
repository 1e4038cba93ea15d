"""The region that closed polygons enclose in a plane: its exact area, and the exact share that it fills of each pixel.

Edges are cut at every vertex, at every row border and where they cross one another. Between two such levels no edge
begins, ends or crosses another one, so the edges from left to right say exactly where the region is, and the area left
of an edge within a pixel is a polynomial.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import GeometryError

_CROSSED = 1e-9
"""Two edges cross if their order changes by more than this, in pixels."""
_MOST_ROUNDS, _MOST_PIECES = 32, 2_000_000
_NOTHING = 1e-9
"""Smaller shares are rounding errors."""


@dataclass(frozen=True, eq=False)
class Region:
    """The region that closed polygons enclose.

    A point is inside a polygon if a ray from it crosses the polygon an odd number of times (even-odd rule). It is
    inside a group of polygons if it is inside at least one of them, and in the region if it is inside an odd number of
    groups. A channel of zero width encloses nothing.

    Its methods raise :class:`GeometryError` if polygons of some thousand vertices cross all over, which would need too
    much memory. The outlines of organs are far from this limit.

    Attributes:
        polygons: float64 ``[n, 2]`` each, in pixels; the last vertex is joined to the first.
        groups: number of the group of each polygon.
    """

    polygons: tuple[NDArray[np.float64], ...]
    groups: tuple[int, ...]

    @classmethod
    def excluding(cls, *polygons: NDArray[np.float64]) -> Region:
        """Return the exclusive or of polygons."""
        return cls(polygons, tuple(range(len(polygons))))

    @property
    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lowest and highest coordinates of all vertices."""
        vertices = np.concatenate(self.polygons)
        return vertices.min(axis=0), vertices.max(axis=0)

    def moved(self, offset: NDArray[np.float64], scale: NDArray[np.float64]) -> Region:
        """Return the region with the vertices ``(vertex - offset) * scale``."""
        return Region(tuple((polygon - offset) * scale for polygon in self.polygons), self.groups)

    def area(self) -> float:
        """Return the area in pixels."""
        pieces = _cut(self, np.empty(0))
        return float(-(pieces.sign * pieces.height * (pieces.x0 + pieces.x1)).sum() / 2)

    def shares(self, shape: tuple[int, int]) -> tuple[NDArray[np.float64], tuple[int, int]]:
        """Return the share of each pixel that the region fills.

        Args:
            shape: number of pixels along the first and the second coordinate. Pixel ``i`` lies between ``i - 0.5`` and
                ``i + 0.5``. The part of the region outside all pixels counts for nothing.

        Returns:
            Shares from 0 to 1, float64 ``[first, second]``, of a box that contains the region within the pixels; and
            the pixel at which the box begins.
        """
        low, high = self.bounds
        limit = np.array(shape)
        start = np.clip(np.floor(low + 0.5), 0, limit).astype(int)
        size = np.maximum(np.clip(np.floor(high + 0.5) + 1, 0, limit).astype(int) - start, 0)
        at = (int(start[0]), int(start[1]))
        if not size.all():
            return np.zeros((0, 0)), at
        inside = self.moved(start - 0.5, np.ones(2))
        levels = np.concatenate([np.arange(size[1] + 1.0), *(_crossings(inside, x) for x in (0.0, float(size[0])))])
        return _painted(_cut(inside, levels), int(size[0]), int(size[1])), at


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Pieces of edges, each between two neighbouring levels ``y0 < y1``.

    ``sign`` is 1 where the region begins at the right side of a piece, -1 where it ends, and 0 where neither is true.
    """

    x0: NDArray[np.float64]
    x1: NDArray[np.float64]
    y0: NDArray[np.float64]
    y1: NDArray[np.float64]
    sign: NDArray[np.int8]

    @property
    def height(self) -> NDArray[np.float64]:
        return self.y1 - self.y0


@dataclass(frozen=True, eq=False)
class _Edges:
    """Edges from ``(ax, ay)`` up to ``(bx, by)``, ``ay < by``, and the polygon of each one."""

    ax: NDArray[np.float64]
    ay: NDArray[np.float64]
    bx: NDArray[np.float64]
    by: NDArray[np.float64]
    owner: NDArray[np.intp]

    @classmethod
    def of(cls, region: Region) -> _Edges:
        """Return the edges of a region. Horizontal ones are left out, because no area lies beside them."""
        first = np.concatenate(region.polygons)
        second = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in region.polygons])
        owner = np.repeat(np.arange(len(region.polygons)), [len(polygon) for polygon in region.polygons])
        slanted = first[:, 1] != second[:, 1]
        first, second, owner = first[slanted], second[slanted], owner[slanted]
        upwards = (first[:, 1] < second[:, 1])[:, None]
        lower, upper = np.where(upwards, first, second), np.where(upwards, second, first)
        return cls(lower[:, 0], lower[:, 1], upper[:, 0], upper[:, 1], owner)

    def at(self, edge: NDArray[np.intp], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the place of edges at levels."""
        ax, ay, bx, by = self.ax[edge], self.ay[edge], self.bx[edge], self.by[edge]
        x: NDArray[np.float64] = np.where(y == by, bx, ax + (bx - ax) * ((y - ay) / (by - ay)))
        return x


def _crossings(region: Region, x: float) -> NDArray[np.float64]:
    """Return the levels at which edges cross a vertical line."""
    edges = _Edges.of(region)
    crossing = (edges.ax < x) != (edges.bx < x)
    ax, ay, bx, by = edges.ax[crossing], edges.ay[crossing], edges.bx[crossing], edges.by[crossing]
    levels: NDArray[np.float64] = ay + (x - ax) / (bx - ax) * (by - ay)
    return levels


def _cut(region: Region, levels: NDArray[np.float64]) -> _Pieces:
    edges = _Edges.of(region)
    if not edges.ay.size:
        nothing = np.zeros(0)
        return _Pieces(nothing, nothing, nothing, nothing, np.zeros(0, np.int8))
    within = levels[(levels > edges.ay.min()) & (levels < edges.by.max())]
    levels = np.unique(np.concatenate([edges.ay, edges.by, within]))
    for _ in range(_MOST_ROUNDS):
        first = np.searchsorted(levels, edges.ay)
        count = np.searchsorted(levels, edges.by) - first
        if count.sum() > _MOST_PIECES:
            raise GeometryError(
                "The contours on one plane of a structure cross themselves or one another far too often.",
                remedy="Draw these contours again, or leave this structure out.",
            )
        edge = np.repeat(np.arange(len(count)), count)
        strip = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        x0, x1 = edges.at(edge, levels[strip]), edges.at(edge, levels[strip + 1])
        order = np.lexsort((x0 + x1, strip))
        edge, strip, x0, x1 = edge[order], strip[order], x0[order], x1[order]
        before, after = np.diff(x0), np.diff(x1)
        crossed = np.flatnonzero((np.diff(strip) == 0) & (np.minimum(before, after) < -_CROSSED))
        if not crossed.size:
            break
        part = before[crossed] / (before[crossed] - after[crossed])
        low, high = levels[strip[crossed]], levels[strip[crossed] + 1]
        longer = np.union1d(levels, np.clip(low + part * (high - low), low, high))
        if len(longer) == len(levels):
            break
        levels = longer
    return _Pieces(x0, x1, levels[strip], levels[strip + 1], _signs(region, edges.owner[edge]))


def _signs(region: Region, owner: NDArray[np.intp]) -> NDArray[np.int8]:
    """Return where the region begins (1) and ends (-1), for pieces in the order of their strips from left to right.

    A closed polygon crosses each strip an even number of times, so counts need not begin anew with each strip.
    """
    groups = np.array(region.groups)
    inside = np.zeros(len(owner), bool)
    alone = np.isin(groups, [group for group in set(region.groups) if region.groups.count(group) == 1])
    inside ^= np.cumsum(alone[owner]) % 2 == 1
    for group in set(region.groups):
        members = np.flatnonzero(groups == group)
        if len(members) > 1:
            inside ^= np.any([np.cumsum(owner == member) % 2 == 1 for member in members], axis=0)
    signs = inside.astype(np.int8)
    signs[1:] -= inside[:-1].astype(np.int8)
    return signs


def _painted(pieces: _Pieces, columns: int, rows: int) -> NDArray[np.float64]:
    """Return the share of each pixel ``[column, row]`` to the right of the pieces; pixel ``i`` is ``i`` to ``i + 1``.

    With ``G(c)`` the integral of ``max(0, c - x)`` along a piece, the area to its right in column ``c`` is
    ``G(c + 1) - G(c)``. It changes from column to column only near the piece, so its changes are added up, then summed
    along the row.
    """
    middle = (pieces.y0 + pieces.y1) / 2
    used = (pieces.sign != 0) & (middle > 0) & (middle < rows)
    row, height = middle[used].astype(np.intp), pieces.height[used] * pieces.sign[used]
    x0, x1 = np.clip(pieces.x0[used], 0, columns), np.clip(pieces.x1[used], 0, columns)
    left, right = np.minimum(x0, x1), np.maximum(x0, x1)
    first = np.floor(left).astype(np.intp)
    count = np.floor(right).astype(np.intp) - first + 2
    piece = np.repeat(np.arange(len(count)), count)
    column = np.arange(len(piece)) - np.repeat(np.cumsum(count) - count, count) + first[piece]
    left, right, height = left[piece], right[piece], height[piece]
    wide = right > left
    width = np.where(wide, right - left, 1.0)

    def integral(at: NDArray[np.intp]) -> NDArray[np.float64]:
        crossed = np.where(wide, (np.clip(at, left, right) - left) ** 2 / (2 * width), 0.0)
        whole: NDArray[np.float64] = crossed + np.maximum(at - right, 0)
        return whole

    change = height * (integral(column + 1) - 2 * integral(column) + integral(column - 1))
    line = columns + 2
    changes = np.bincount(row[piece] * line + column, change, minlength=rows * line).reshape(rows, line)
    shares: NDArray[np.float64] = np.clip(np.cumsum(changes, axis=1)[:, :columns].T, 0, 1)
    shares[shares < _NOTHING] = 0
    return shares
