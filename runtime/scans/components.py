"""Connected components of a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """Return the smallest box around a non-empty mask ``[X, Y, Z]``."""
    box = [slice(0, size) for size in mask.shape]
    for axis in range(3):  # what is found along one axis need not be looked through along the next
        filled = np.flatnonzero(mask[tuple(box)].any(axis=tuple({0, 1, 2} - {axis})))
        box[axis] = slice(int(filled[0]), int(filled[-1]) + 1)
    x, y, z = box
    return x, y, z


def components(mask: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the 26-connected components of a non-empty mask.

    Returns:
        The component of every voxel ``[X, Y, Z]``, 0 outside the mask, and the voxels of components 1, 2, ...
    """
    part = np.pad(mask, 1)  # a box that is a line of voxels raises RuntimeError in cc3d 4.1.1
    try:
        import cc3d  # noqa: PLC0415 - scipy serves where its wheel is missing
    except ImportError:
        from scipy.ndimage import label  # noqa: PLC0415 - the fallback

        found: NDArray[Any] = label(part, np.ones((3, 3, 3)))[0]
    else:
        found = cc3d.connected_components(part, connectivity=26)
    # Plane by plane: counting the whole at once would need eight bytes a voxel.
    last = int(found.max())
    sizes = np.zeros(last + 1, np.int64)
    for plane in found:
        sizes += np.bincount(plane.ravel(), minlength=last + 1)
    return found[1:-1, 1:-1, 1:-1], sizes[1:]


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest 26-connected component of a non-empty mask; of equally large ones the first in memory."""
    found, sizes = components(mask)
    largest: NDArray[np.bool_] = found == 1 + int(sizes.argmax())
    return largest
