"""Percentiles of the HU within the mask of an organ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from pydantic import ConfigDict

from fseft_edge.runtime.scans.components import BoxedMask
from fseft_edge.runtime.scans.volume import Volume

_LOWEST, _HIGHEST = -2048, 8191
_SHARES: Final = (0.01, 0.5, 0.99)


@dataclass(frozen=True)
class HuPercentiles:
    """1st, 50th and 99th percentile of the HU of an organ, in whole HU."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True)  # this class is part of the adapter file

    low: int
    median: int
    high: int


def hu_percentiles(volume: Volume, mask: BoxedMask) -> HuPercentiles | None:
    """Return the percentiles of the HU within a mask on the lattice of the scan; None for an empty mask.

    HU are rounded and clipped to the range from -2048 to 8191. Only the slices that contain the organ are read, one at
    a time.
    """
    if not mask.voxels:
        return None
    counts = np.zeros(_HIGHEST - _LOWEST + 1, np.int64)
    x, y, z = mask.box
    for index in range(z.start, z.stop):
        # Transposed, because files store x fastest; the order of the voxels has no effect.
        stored = volume.array[x, y, index].T[mask.inside[:, :, index - z.start].T]
        hu = np.clip(np.rint(volume.in_hu(stored)), _LOWEST, _HIGHEST)
        counts += np.bincount(hu.astype(np.int64) - _LOWEST, minlength=counts.size)
    volume.release()
    below = np.cumsum(counts)
    low, median, high = (int(np.searchsorted(below, share * below[-1])) + _LOWEST for share in _SHARES)
    return HuPercentiles(low, median, high)
