"""Masks of organs: the boxes that contain them, and their connected components."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import cc3d
import numpy as np
from numpy.typing import NDArray

Slices: TypeAlias = tuple[slice, slice, slice]


@dataclass(frozen=True, eq=False)
class BoxedMask:
    """A mask of a scan, of which only the smallest box that contains it is in memory.

    Attributes:
        shape: shape of the scan.
        box: the box; its ranges are empty if the mask is.
        inside: the mask in the box.
    """

    shape: tuple[int, ...]
    box: Slices
    inside: NDArray[np.bool_]

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> BoxedMask:
        """Return a mask ``[X, Y, Z]`` of a whole scan as the box that contains it."""
        box = bounding_box(mask) if mask.any() else (slice(0, 0),) * 3
        return cls(mask.shape, box, mask[box])

    @cached_property
    def voxels(self) -> int:
        """Number of voxels of the mask."""
        return int(np.count_nonzero(self.inside))


def masks_of_labels(labels: NDArray[np.unsignedinteger[Any]], values: Sequence[int]) -> Iterator[BoxedMask]:
    """Yield the mask of each label value, in the order of the values; the label map is searched only once.

    Args:
        labels: label map ``[X, Y, Z]``.
        values: label values.
    """
    for value, box in zip(values, label_boxes(labels, values), strict=True):
        yield BoxedMask(labels.shape, box, labels[box] == value)


def label_boxes(labels: NDArray[np.unsignedinteger[Any]], values: Sequence[int]) -> list[Slices]:
    """Return the smallest box that contains each label value; the ranges are empty for a value without voxels.

    Args:
        labels: label map ``[X, Y, Z]``, all of whose values are at most the largest of the values.
        values: label values.
    """
    slowest_first = sorted(range(3), key=lambda axis: -labels.strides[axis])
    stored = labels.transpose(slowest_first)
    seen = [np.zeros((max(values, default=0) + 1, size), bool) for size in stored.shape]
    for index, plane in enumerate(stored):  # the work arrays of one plane at a time
        flat = plane.ravel()
        filled = np.flatnonzero(flat.view(bool) if flat.dtype.itemsize == 1 else flat > 0)
        label = flat[filled]
        row, column = np.divmod(filled, plane.shape[1])
        seen[0][label, index] = seen[1][label, row] = seen[2][label, column] = True
    by_axis = [seen[slowest_first.index(axis)] for axis in range(3)]
    return [(_range(x[value]), _range(y[value]), _range(z[value])) for value in values for x, y, z in [by_axis]]


def _range(filled: NDArray[np.bool_]) -> slice:
    """Return the smallest range that contains all true values."""
    where = np.flatnonzero(filled)
    return slice(int(where[0]), int(where[-1]) + 1) if where.size else slice(0, 0)


def bounding_box(mask: NDArray[np.bool_]) -> Slices:
    """Return the smallest box that contains a non-empty mask ``[X, Y, Z]``."""
    box = [slice(0, size) for size in mask.shape]
    for axis in range(3):  # each axis shrinks the part to search along the next axis
        filled = np.flatnonzero(mask[tuple(box)].any(axis=tuple({0, 1, 2} - {axis})))
        box[axis] = slice(int(filled[0]), int(filled[-1]) + 1)
    x, y, z = box
    return x, y, z


def components(mask: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the 26-connected components of a non-empty mask.

    The numbers depend on the order of the voxels in memory.

    Returns:
        The component number of every voxel ``[X, Y, Z]``, 0 outside the mask; and the number of voxels in each of the
        components 1, 2, ...
    """
    padded = np.pad(mask, 1)  # without padding, cc3d 4.1.1 raises RuntimeError for a mask of shape [1, Y, 1]
    found: NDArray[Any] = cc3d.connected_components(padded, connectivity=26)
    # Plane by plane, because np.bincount converts its input to eight bytes for each voxel. Only the planes along the
    # slowest axis are contiguous.
    last = int(found.max())
    sizes = np.zeros(last + 1, np.int64)
    slowest = int(np.argmax(found.strides))
    for plane, inside in zip(np.moveaxis(found, slowest, 0), np.moveaxis(padded, slowest, 0), strict=True):
        sizes += np.bincount(plane[inside], minlength=last + 1)
    return found[1:-1, 1:-1, 1:-1], sizes[1:]


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest 26-connected component of a non-empty mask; of equal ones, the first in C order."""
    found, sizes = components(np.ascontiguousarray(mask))
    largest: NDArray[np.bool_] = found == 1 + int(sizes.argmax())
    return largest
