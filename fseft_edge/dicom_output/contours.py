"""The outline of a mask in one plane as closed polygons. Holes are part of a polygon, so no fill rule is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def closed_contours(mask: NDArray[np.bool_]) -> Iterator[NDArray[np.float64]]:
    """Yield one closed polygon for each 4-connected component of the mask in one plane.

    The polygon follows the edges of the pixels, so every pixel centre is strictly inside or outside, and the area is
    that of the pixels: another program gets the volume of the mask. A hole is joined to the outline by a channel of
    zero width through pixels of the mask, the "keyhole" of PS3.3 section C.8.8.6.3.

    Args:
        mask: boolean array ``[rows, columns]``.

    Yields:
        float64 ``[n, 2]``, column and row of each vertex in pixels; pixel centres have integer coordinates. The first
        vertex is not repeated at the end.
    """
    from contourpy import FillType, contour_generator  # noqa: PLC0415 - only needed for contours

    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return
    top, left = int(rows[0]), int(columns[0])
    piece = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    # A margin of one pixel closes the outline of components at the border of the image.
    filled = contour_generator(z=np.pad(piece, 1).astype(np.float64), fill_type=FillType.OuterOffset).filled(0.5, 2.0)
    for points, offsets in zip(*filled, strict=True):
        rings = [points[start : stop - 1] for start, stop in pairwise(offsets)]
        path = _along_pixel_edges(_joined_to_holes(rings[0], rings[1:]))
        yield _without_straight_vertices(path) + np.array([left - 1, top - 1])


def _joined_to_holes(outline: NDArray[np.float64], holes: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Join the holes of a component to its outline.

    The leftmost vertex of a hole is between two pixels of a row. To the left in this row there are only pixels of the
    mask, up to a vertex of the outline or of a hole that is further left and was joined before.
    """
    path = outline
    for hole in sorted(holes, key=lambda ring: float(ring[:, 0].min())):
        start = int(hole[:, 0].argmin())
        column, row = hole[start]
        facing = np.flatnonzero((path[:, 1] == row) & (path[:, 0] < column))
        anchor = int(facing[path[facing, 0].argmax()])
        path = np.concatenate([path[: anchor + 1], hole[start:], hole[: start + 1], path[anchor:]])
    return path


def _along_pixel_edges(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add the corners of pixels that marching squares cuts: between two vertices in the middle of adjacent edges.

    Of such a pair, one vertex has a column and the other a row that ends with one half; together they are the corner.
    """
    following = np.roll(path, -1, axis=0)
    corners = np.where(path % 1 == 0, following, path)  # the halves of both
    is_cut = (np.abs(following - path) == 0.5).all(axis=1)
    return np.insert(path, np.flatnonzero(is_cut) + 1, corners[is_cut], axis=0)


def _without_straight_vertices(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """Remove vertices at which the path continues in a straight line; keep vertices at which it reverses."""
    arriving = path - np.roll(path, 1, axis=0)
    leaving = np.roll(path, -1, axis=0) - path
    turn = arriving[:, 0] * leaving[:, 1] - arriving[:, 1] * leaving[:, 0]
    onward = (arriving * leaving).sum(axis=1) > 0
    kept: NDArray[np.float64] = path[(turn != 0) | ~onward]
    return kept
