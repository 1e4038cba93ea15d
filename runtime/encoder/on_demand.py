"""Features on demand: a feature map whose windows are encoded when a box that needs them is read.

The blend ``F = Σ w f / Σ w`` of a voxel is final as soon as all windows over the voxel are encoded. Therefore what is
read is bit for bit what the map of the whole scan contains.

The padded grid is cut along each axis at all origins and ends of windows. A *cell* lies between neighbouring cuts along
each axis; the same windows lie over all of its voxels, so a cell is final or not as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import EncodedScan, encode_scan, layout_of
from fseft_edge.runtime.encoder.feature_frames import StorageType
from fseft_edge.runtime.encoder.feature_map import FeatureMap, FeatureMapMeta, Ranges
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.memory import AS_MUCH_AS_IS_FREE, Budget
from fseft_edge.runtime.system.progress import ProgressTask


class FeaturesOnDemand:
    """A feature map that encodes windows when they are needed; created by :func:`encode_on_demand`.

    All boxes are ranges ``(x, y, z)`` in voxels of level 0, half-open; what lies outside the padded grid is ignored.

    Attributes:
        meta: metadata of the map, equal to those of the map of the whole scan.
    """

    def __init__(self, meta: FeatureMapMeta, layout: WindowLayout, build: Callable[[], FeatureMap]) -> None:
        self.meta = meta
        self._layout = layout
        self._build = build
        self._whole: FeatureMap | None = None
        self._lock = threading.RLock()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the encoded grid, in voxels."""
        return self.meta.grid_shape

    @property
    def padded_shape(self) -> tuple[int, int, int]:
        """Shape of the padded grid, which level 0 covers, in voxels."""
        return self.meta.padded_shape

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        """Levels of the feature pyramid, finest first."""
        return self.meta.levels

    @property
    def windows(self) -> int:
        """Number of windows of the whole scan."""
        return self._layout.windows

    @property
    def encoded(self) -> int:
        """Number of windows whose features were computed so far, now or earlier (windows of air and of the store)."""
        return self.windows if self._whole is not None else 0

    @property
    def edges(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Cuts between the cells along x, y and z, in voxels, from 0 to the end of the padded grid."""
        x, y, z = (
            tuple(sorted({*origins, *(origin + size for origin in origins)}))
            for origins, size in zip(self._layout.origins, self._layout.window, strict=True)
        )
        return x, y, z

    def read(self, level: int, x: tuple[int, int], y: tuple[int, int], z: tuple[int, int]) -> torch.Tensor:
        """Return the features of a box as :meth:`FeatureMap.read` does, after encoding the windows that are missing."""
        stride = self.levels[level].stride
        self.encode([((x[0] * stride, x[1] * stride), (y[0] * stride, y[1] * stride), (z[0] * stride, z[1] * stride))])
        assert self._whole is not None  # noqa: S101 - set by encode()
        return self._whole.read(level, x, y, z)

    def need(self, box: Ranges) -> int:
        """Return the number of windows that reading a box would encode (at most, as windows of air are not known)."""
        return 0 if self.is_final(box) else self.windows

    def is_final(self, box: Ranges) -> bool:  # noqa: ARG002 - this first version encodes the whole scan at once
        """Return whether a box can be read without encoding a window."""
        return self._whole is not None

    def final(self) -> NDArray[np.bool_]:
        """Return which cells are final, bool ``[number of cells along x, y, z]``."""
        return np.full([len(cuts) - 1 for cuts in self.edges], self._whole is not None)

    def grown(self, box: Ranges) -> Ranges:
        """Return the smallest box of whole cells that contains a box; the box must overlap the padded grid."""
        x, y, z = (
            (max(cut for cut in cuts if cut <= max(low, 0)), min(cut for cut in cuts if cut >= min(high, cuts[-1])))
            for (low, high), cuts in zip(box, self.edges, strict=True)
        )
        return x, y, z

    def encode(self, boxes: Sequence[Ranges], progress: ProgressTask | None = None) -> None:
        """Encode all windows over the boxes that are not encoded yet.

        Args:
            boxes: the boxes.
            progress: receives one step for each of the windows (:meth:`need`).
        """
        with self._lock:
            if boxes and self._whole is None:
                self._whole = self._build()
                if progress is not None:
                    progress.advance(self.windows)

    def release(self) -> None:
        """Delete the temporary files with the features of windows that unfinished cells need.

        If a later box needs such a window, the window is encoded again, with the same result.
        """


def encode_on_demand(
    volume: Volume,
    *,
    bundle: EncoderBundle,
    session: EncoderSession,
    store: FeatureStore,
    storage: StorageType = "float16",
    grid: Grid | None = None,
    budget: Budget = AS_MUCH_AS_IS_FREE,
) -> EncodedScan:
    """Return the features of a scan on demand (arguments and errors as for :func:`encode_scan`).

    The session must be open whenever windows are encoded. A map that the store already contains is used as it is.
    """
    grid = grid or Grid.of(volume, bundle.preprocessing)
    layout = layout_of(grid, bundle)
    meta = FeatureMapMeta(
        grid_shape=grid.shape,
        padded_shape=layout.padded_shape,
        levels=bundle.levels,
        dtype=storage,
        encoder_id=bundle.encoder_id,
    )

    def build() -> FeatureMap:
        encoded = encode_scan(
            volume, bundle=bundle, session=session, store=store, storage=storage, grid=grid, budget=budget
        )
        assert isinstance(encoded.features, FeatureMap)  # noqa: S101 - from encode_scan
        return encoded.features

    return EncodedScan(grid, FeaturesOnDemand(meta, layout, build))
