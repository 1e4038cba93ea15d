"""Encode a CT and store its feature map in the cache; combines grid, windows, session and store."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding_plan import plan_encoding
from fseft_edge.runtime.encoder.feature_map import FeatureMap, FeatureMapMeta
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.streaming import stream_features
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.memory import AS_MUCH_AS_IS_FREE, GB, Budget, memory_explained

_log = logging.getLogger(__name__)

OVERLAP = 0.25


@dataclass(frozen=True, eq=False)
class EncodedScan:
    """A scan's grid and its feature map."""

    grid: Grid
    features: FeatureMap


def layout_of(grid: Grid, bundle: EncoderBundle) -> WindowLayout:
    """Return the layout of the encoder's windows on a grid."""
    coarsest = max(level.stride for level in bundle.levels)
    return WindowLayout.plan(grid.shape, bundle.window, coarsest, OVERLAP)


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
    features = store.get(key)
    if features is None:
        layout = layout_of(grid, bundle)
        meta = FeatureMapMeta(
            grid_shape=grid.shape,
            padded_shape=layout.padded_shape,
            levels=bundle.levels,
            dtype=storage,
            encoder_id=bundle.encoder_id,
        )
        plan = plan_encoding(layout, bundle, session, budget, stored_bytes=np.dtype(storage).itemsize)
        _log.info(
            "encoding %d window%s at a time, place of the sums: %s, predicted memory: %.2f GB",
            plan.batch,
            "s" if plan.batch > 1 else "",
            plan.place,
            plan.footprint.ram / GB,
        )
        sections = stream_features(
            lambda start, stop: grid.section(volume, start, stop),
            layout,
            session,
            batch=plan.batch,
            place=plan.place,
            section_slices=plan.section_slices,
        )
        with memory_explained(
            "Memory ran out while the features of a scan were stored.",
            remedy="Give a smaller --memory, so that the scan is processed in smaller pieces, or close other programs.",
        ):
            features = store.build(key, meta, sections)
    return EncodedScan(grid, features)
