"""Encode a CT and store its feature map in the cache; combines grid, windows, session and store."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.chunks import kept_after_chunks
from fseft_edge.runtime.encoder.encoding_plan import FIRST_USE, EncodingPlan, kept_after_windows, plan_encoding
from fseft_edge.runtime.encoder.feature_map import FeatureMapMeta, Features
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.encoder.streaming import FeatureSection, stream_features
from fseft_edge.runtime.encoder.whole_scan import WholeScanPlan, plan_whole_scan, stream_whole_scan
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.memory import AS_MUCH_AS_IS_FREE, GB, Budget, memory_explained

_log = logging.getLogger(__name__)

OVERLAP = 0.25


@dataclass(frozen=True, eq=False)
class EncodedScan:
    """The grid of a scan and its feature map.

    Attributes:
        grid: grid of the scan, which is the lattice of level 0.
        features: feature map; ``read`` reads a box of a level.
    """

    grid: Grid
    features: Features

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        """Levels of the feature map, finest first: number of channels and stride of each level."""
        return self.features.levels

    def array(self, level: int = 0) -> NDArray[np.floating[Any]]:
        """Return all features of a level, ``[C, X, Y, Z]`` in the stored number format.

        The voxels cover the grid, without the padding of the feature map. The axes have the anatomical directions that
        the encoder's preprocessing names. A whole level of a large scan can take gigabytes.

        Raises:
            IndexError: there is no such level.
        """
        stride = self.levels[level].stride
        x, y, z = ((0, -(-length // stride)) for length in self.grid.shape)
        features: NDArray[np.floating[Any]] = self.features.read(level, x, y, z).numpy()
        return features

    def affine(self, level: int = 0) -> NDArray[np.float64]:
        """Return the affine of a level, float64 4x4, from the voxel index of :meth:`array` to RAS+ mm.

        A voxel of a level with stride ``s`` covers ``s`` grid voxels along each axis. The affine gives their centre.

        Raises:
            IndexError: there is no such level.
        """
        stride = self.levels[level].stride
        to_grid = np.diag([stride, stride, stride, 1.0])
        to_grid[:3, 3] = (stride - 1) / 2
        affine: NDArray[np.float64] = self.grid.affine @ to_grid
        return affine


def layout_of(grid: Grid, bundle: EncoderBundle) -> WindowLayout:
    """Return the layout of the encoder's windows on a grid."""
    coarsest = max(level.stride for level in bundle.levels)
    return WindowLayout.plan(grid.shape, bundle.window, coarsest, OVERLAP)


def planned_encoding(
    grid: Grid,
    bundle: EncoderBundle,
    session: EncoderSession,
    budget: Budget,
    storage: Literal["float16", "float32"] = "float16",
) -> EncodingPlan | WholeScanPlan:
    """Return the fastest plan within a memory budget for encoding the scan of a grid.

    Args:
        grid: grid of the scan.
        bundle: encoder bundle.
        session: open session of the same encoder.
        budget: memory that may be used.
        storage: number format on disk.

    Raises:
        OutOfMemoryError: the budget is too small; the message contains the smallest sufficient budget.
    """
    stored_bytes = np.dtype(storage).itemsize
    if bundle.whole_scan is not None:
        return plan_whole_scan(grid.shape, session, budget, stored_bytes=stored_bytes)
    return plan_encoding(layout_of(grid, bundle), bundle, session, budget, stored_bytes=stored_bytes)


def held_after_encoding(grid: Grid, bundle: EncoderBundle, session: EncoderSession) -> int:
    """Return the predicted memory of the process after encoding a scan, with the session still open, in bytes.

    Args:
        grid: grid of the scan.
        bundle: encoder bundle.
        session: open session of the same encoder.
    """
    if bundle.whole_scan is not None:
        return session.held_before + FIRST_USE + kept_after_chunks(session, grid.shape)
    return session.held_before + FIRST_USE + kept_after_windows(bundle, session)


def _sections(
    volume: Volume, grid: Grid, bundle: EncoderBundle, session: EncoderSession, plan: EncodingPlan | WholeScanPlan
) -> Iterator[FeatureSection]:
    """Return the features of a scan, section by section."""

    def read(start: int, stop: int) -> NDArray[np.float32]:
        return grid.section(volume, start, stop)

    predicted = plan.footprint.ram / GB
    if isinstance(plan, WholeScanPlan):
        place = ""
        if session.rolling is not None:
            place = f", with planes in {'temporary files' if plan.on_disk else 'memory'}"
        _log.info("encoding the whole scan in one pass%s, predicted memory: %.2f GB", place, predicted)
        return stream_whole_scan(read, grid.shape, session, plan)
    _log.info(
        "encoding %d window%s at a time, place of the sums: %s, predicted memory: %.2f GB",
        plan.batch,
        "s" if plan.batch > 1 else "",
        plan.place,
        predicted,
    )
    layout = layout_of(grid, bundle)
    return stream_features(
        read, layout, session, batch=plan.batch, place=plan.place, section_slices=plan.section_slices
    )


def encode_scan(
    volume: Volume,
    *,
    bundle: EncoderBundle,
    session: EncoderSession,
    store: FeatureStore,
    storage: Literal["float16", "float32"] = "float16",
    grid: Grid | None = None,
    budget: Budget = AS_MUCH_AS_IS_FREE,
) -> EncodedScan:
    """Return the feature map of a scan, from the store if the store contains it.

    Args:
        volume: the CT.
        bundle: encoder bundle.
        session: open session of the same encoder.
        store: cache of feature maps.
        storage: number format on disk.
        grid: grid of the scan; ``None`` computes the grid.
        budget: memory that may be used.

    Raises:
        OutOfMemoryError: the budget is too small, or memory ran out even with the smallest batches and sections.
        OutOfSpaceError: the feature cache or a temporary file cannot be written.
    """
    grid = grid or Grid.of(volume, bundle.preprocessing)
    key = store.key(volume, bundle.preprocessing, bundle.encoder_id, OVERLAP, storage, precision=session.precision)
    features: Features | None = store.get(key)
    if features is None:
        if bundle.whole_scan is not None and not store.is_empty():
            before = bundle.id_with_windows
            if store.contains(
                store.key(volume, bundle.preprocessing, before, OVERLAP, storage, precision=session.precision)
            ):
                _log.warning(
                    "the cached features of this scan are from windows, which this encoder does not use: the scan is "
                    "encoded again, in one pass"
                )
        plan = planned_encoding(grid, bundle, session, budget, storage)
        padded_shape = grid.shape if isinstance(plan, WholeScanPlan) else layout_of(grid, bundle).padded_shape
        meta = FeatureMapMeta(
            grid_shape=grid.shape,
            padded_shape=padded_shape,
            levels=bundle.levels,
            dtype=storage,
            encoder_id=bundle.encoder_id,
        )
        sections = _sections(volume, grid, bundle, session, plan)
        with memory_explained(
            "Memory ran out while the features of a scan were stored.",
            remedy="Give a smaller --memory, so that the scan is processed in smaller pieces, or close other programs.",
        ):
            features = store.build(key, meta, sections)
    return EncodedScan(grid, features)
