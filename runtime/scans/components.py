"""Connected components of a mask."""

from __future__ import annotations

from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray


def bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """Return the smallest box that contains a non-empty mask ``[X, Y, Z]``."""
    box = [slice(0, size) for size in mask.shape]
    for axis in range(3):  # each axis shrinks the part to search along the next axis
        filled = np.flatnonzero(mask[tuple(box)].any(axis=tuple({0, 1, 2} - {axis})))
        box[axis] = slice(int(filled[0]), int(filled[-1]) + 1)
    x, y, z = box
    return x, y, z


def components(mask: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the 26-connected components of a non-empty mask.

    Returns:
        The component number of every voxel ``[X, Y, Z]``, 0 outside the mask; and the number of voxels in each of the
        components 1, 2, ...
    """
    padded = np.pad(mask, 1)  # without padding, cc3d 4.1.1 raises RuntimeError for a mask of shape [1, Y, 1]
    found: NDArray[Any] = cc3d.connected_components(padded, connectivity=26)
    # Plane by plane, because np.bincount converts its input to eight bytes for each voxel.
    last = int(found.max())
    sizes = np.zeros(last + 1, np.int64)
    for plane in found:
        sizes += np.bincount(plane.ravel(), minlength=last + 1)
    return found[1:-1, 1:-1, 1:-1], sizes[1:]


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest 26-connected component of a non-empty mask; for equal sizes, the lowest number."""
    found, sizes = components(mask)
    largest: NDArray[np.bool_] = found == 1 + int(sizes.argmax())
    return largest
