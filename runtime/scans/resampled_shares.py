"""Shares of voxels on another lattice, by volume of overlap."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.scans.lattice import LATTICE_TOLERANCE
from fseft_edge.runtime.scans.structures import BoxedShare, Lattice

_POINTS = 4
"""Points along each axis of a voxel at which shares on a turned lattice are read."""


def resampled(shares: NDArray[np.float32], affine: NDArray[np.float64], lattice: Lattice) -> BoxedShare:
    """Return shares on the lattice of a CT. The volume is kept, except for voxels outside the CT.

    If the axes of both lattices are parallel, the share of a voxel is the exact volume that it has in common with the
    filled voxels. On a turned lattice, it is the mean at 64 points of the voxel.

    Args:
        shares: shares of the voxels of a lattice ``[i, j, k]``.
        affine: float64 4x4, voxel index ``[i, j, k]`` to RAS+ mm.
        lattice: the lattice of the CT.
    """
    to_ct = np.linalg.inv(lattice.affine) @ affine
    corners = np.array(list(product(*((-0.5, size - 0.5) for size in shares.shape))))
    reached = corners @ to_ct[:3, :3].T + to_ct[:3, 3]
    low = np.clip(np.floor(reached.min(axis=0) + 0.5), 0, lattice.shape).astype(int)
    high = np.clip(np.ceil(reached.max(axis=0) + 0.5), 0, lattice.shape).astype(int)
    at = (int(low[0]), int(low[1]), int(low[2]))
    size = np.maximum(high - low, 0)
    if not size.all():
        return BoxedShare.of_slices({}, (0, 1, 2), lattice.shape)
    to_ct[:3, 3] -= low
    order = np.abs(to_ct[:3, :3]).argmax(axis=1)
    aligned = np.zeros((3, 3))
    if len(set(order.tolist())) == 3:
        aligned[range(3), order] = to_ct[range(3), order]
    off = np.abs(to_ct[:3, :3] - aligned) @ np.array(shares.shape)
    if off.max() <= LATTICE_TOLERANCE:
        found = shares.transpose(order).astype(np.float64)
        for axis in range(3):
            weights = _overlap(found.shape[axis], to_ct[axis, order[axis]], to_ct[axis, 3], int(size[axis]))
            found = np.moveaxis(np.tensordot(weights, found, axes=(1, axis)), 0, axis)
    else:
        from_ct = np.linalg.inv(to_ct).astype(np.float64)
        found = _sampled(shares, from_ct, (int(size[0]), int(size[1]), int(size[2])))
    return BoxedShare.of(found, at, lattice.shape)


def _overlap(count: int, step: float, first: float, size: int) -> NDArray[np.float64]:
    """Return the length that each of ``size`` voxels has in common with each of ``count`` intervals.

    Interval ``i`` has its centre at ``first + step * i`` and the length ``abs(step)``, in voxels.
    """
    centre, half = first + step * np.arange(count), abs(step) / 2
    voxel = np.arange(size)[:, None]
    low, high = np.maximum(centre - half, voxel - 0.5), np.minimum(centre + half, voxel + 0.5)
    length: NDArray[np.float64] = np.maximum(high - low, 0)
    return length


def _sampled(
    shares: NDArray[np.float32], from_ct: NDArray[np.float64], size: tuple[int, int, int]
) -> NDArray[np.float64]:
    """Return the mean share at points of each voxel; outside the array, shares are 0."""
    from scipy import ndimage  # noqa: PLC0415 - only needed for turned lattices

    places = (np.arange(_POINTS) + 0.5) / _POINTS - 0.5
    found = np.zeros(size)
    for point in product(places, repeat=3):
        offset = from_ct[:3, 3] + from_ct[:3, :3] @ np.array(point)
        found += ndimage.affine_transform(shares, from_ct[:3, :3], offset.tolist(), size, order=0, mode="grid-constant")
    return found / _POINTS**3
