"""The outline of a mask in one plane, as closed polygons that need no rule for holes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def closed_contours(mask: NDArray[np.bool_]) -> Iterator[NDArray[np.float64]]:
    """Yield one closed polygon for each connected piece (4 neighbours) of a plane's mask.

    Vertices lie half-way between a pixel of the mask and its neighbour outside it (marching squares at one half), so
    every pixel centre is strictly inside or outside. Corners are cut: a piece loses half a pixel of area against its
    pixels, and gains half a pixel for each hole. A hole is joined to the outline by a channel of no width, the
    "keyhole" of PS3.3 C.8.8.6.3, which runs through pixels of the mask.

    Args:
        mask: ``[rows, columns]``.

    Yields:
        float64 ``[n, 2]``, column and row of each vertex, in pixels with centres at whole numbers; the first vertex is
        not repeated at the end.
    """
    from contourpy import FillType, contour_generator  # noqa: PLC0415 - only where contours are drawn

    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return
    top, left = int(rows[0]), int(columns[0])
    piece = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    # A margin closes the outline of what reaches the edge of the image.
    filled = contour_generator(z=np.pad(piece, 1).astype(np.float64), fill_type=FillType.OuterOffset).filled(0.5, 2.0)
    for points, offsets in zip(*filled, strict=True):
        rings = [points[start : stop - 1] for start, stop in pairwise(offsets)]
        yield _without_straight_vertices(_keyholed(rings[0], rings[1:])) + np.array([left - 1, top - 1])


def _keyholed(outline: NDArray[np.float64], holes: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Join holes to their outline.

    A hole's leftmost vertex lies between two pixels of a row. The same row, followed to the left through pixels of the
    mask, meets the outline, or a hole further left and joined before, at a vertex of it.
    """
    path = outline
    for hole in sorted(holes, key=lambda ring: float(ring[:, 0].min())):
        start = int(hole[:, 0].argmin())
        column, row = hole[start]
        facing = np.flatnonzero((path[:, 1] == row) & (path[:, 0] < column))
        anchor = int(facing[path[facing, 0].argmax()])
        path = np.concatenate([path[: anchor + 1], hole[start:], hole[: start + 1], path[anchor:]])
    return path


def _without_straight_vertices(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """Drop vertices at which the path goes straight on; those at which it turns back stay."""
    arriving = path - np.roll(path, 1, axis=0)
    leaving = np.roll(path, -1, axis=0) - path
    turn = arriving[:, 0] * leaving[:, 1] - arriving[:, 1] * leaving[:, 0]
    onward = (arriving * leaving).sum(axis=1) > 0
    kept: NDArray[np.float64] = path[(turn != 0) | ~onward]
    return kept
