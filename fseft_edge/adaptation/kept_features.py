"""Features in memory: what a training has read of the feature maps of a support set is read only once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fseft_edge.adaptation.block_sampling import SupportScan, with_variations
from fseft_edge.runtime.encoder.feature_map import FeatureMap, FeatureMapMeta, Range
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.system.memory import free_ram

# Largest size of the features that are kept in memory, and their largest share of the free memory.
_KEPT_BYTES: Final = 1 << 30
_SHARE_OF_FREE: Final = 0.25

# Features are read in cubes of this edge length, because frames are compressed in blocks of 4 or 8 voxels.
_EDGE: Final = 8


class KeptFeatures:
    """Features of a map with some of its levels in memory, each cube from its first read.

    Args:
        features: the map.
        kept: numbers of the levels that are kept.

    Attributes:
        kept: the same numbers.
    """

    def __init__(self, features: FeatureMap, kept: Sequence[int]) -> None:
        self.kept = tuple(kept)
        self._features = features
        self._levels = {level: _KeptLevel(features, level) for level in kept}

    @property
    def meta(self) -> FeatureMapMeta:
        """Metadata of the map."""
        return self._features.meta

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the encoded grid, in voxels."""
        return self._features.shape

    @property
    def padded_shape(self) -> tuple[int, int, int]:
        """Shape of the padded grid, which level 0 covers, in voxels."""
        return self._features.padded_shape

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        """Levels of the feature pyramid, finest first."""
        return self._features.levels

    def read(self, level: int, x: Range, y: Range, z: Range) -> torch.Tensor:
        """Do the same as :meth:`FeatureMap.read`."""
        kept = self._levels.get(level)
        return self._features.read(level, x, y, z) if kept is None else kept.read((x, y, z))


class _KeptLevel:
    def __init__(self, features: FeatureMap, level: int) -> None:
        self._features, self._level = features, level
        shape = features.meta.level_shape(level)
        channels = features.levels[level].channels
        # The operating system provides the memory of a page when the page is first written.
        self._values: NDArray[np.floating] = np.empty((channels, *shape), dtype=features.meta.dtype)
        self._is_read = np.zeros([-(-size // _EDGE) for size in shape], bool)

    def read(self, box: tuple[Range, Range, Range]) -> torch.Tensor:
        cubes = tuple(slice(low // _EDGE, -(-high // _EDGE)) for low, high in box)
        missing = ~self._is_read[cubes]
        if missing.any():
            ranges = []
            for axis, (part, size) in enumerate(zip(cubes, self._values.shape[1:], strict=True)):
                others = tuple(other for other in range(3) if other != axis)
                found = np.flatnonzero(missing.any(axis=others)) + part.start
                ranges.append((int(found[0]) * _EDGE, min((int(found[-1]) + 1) * _EDGE, size)))
            inside = tuple(slice(*extent) for extent in ranges)
            self._values[:, *inside] = self._features.read(self._level, *ranges).numpy()
            self._is_read[cubes] = True
        return torch.from_numpy(self._values[:, *(slice(*extent) for extent in box)]).contiguous()


def kept_in_memory(support: Sequence[SupportScan]) -> list[SupportScan]:
    """Return support scans whose features are read from the disk only once, as far as memory allows.

    At most 1 GiB and a quarter of the free memory are used. Coarse levels come first: a block needs about as much of
    each level, but complete coarse levels are small. Features that are encoded on demand are not kept.

    Args:
        support: scans of a support set, with their variations.
    """
    scans = with_variations(support)
    left = min(_KEPT_BYTES, int(_SHARE_OF_FREE * free_ram()))
    kept: list[list[int]] = [[] for _ in scans]
    for level in reversed(range(len(scans[0].features.levels))):
        for scan, levels in zip(scans, kept, strict=True):
            if isinstance(scan.features, FeatureMap):
                meta = scan.features.meta
                size = math.prod(meta.level_shape(level)) * meta.levels[level].channels * np.dtype(meta.dtype).itemsize
                if size <= left:
                    left -= size
                    levels.append(level)
    of_variations = iter(zip(scans[len(support) :], kept[len(support) :], strict=True))
    result = []
    for scan, levels in zip(support, kept, strict=False):
        variations = tuple(_kept(*next(of_variations)) for _ in scan.variations)
        changed = any(new is not old for new, old in zip(variations, scan.variations, strict=True))
        result.append(_kept(replace(scan, variations=variations) if changed else scan, levels))
    return result


def _kept(scan: SupportScan, levels: Sequence[int]) -> SupportScan:
    if isinstance(scan.features, FeatureMap) and levels:
        return replace(scan, features=KeptFeatures(scan.features, levels))
    return scan
