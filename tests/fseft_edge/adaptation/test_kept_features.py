"""Features that are kept in memory are those of the map, and each is read once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles.scans import scan_with_organ

from fseft_edge.adaptation import kept_features
from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.kept_features import KeptFeatures, kept_in_memory
from fseft_edge.runtime.encoder.feature_map import FeatureMap, FeatureMapMeta, write_feature_map
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.encoder.streaming import FeatureSection

SHAPE = (40, 24, 36)
LEVELS = (FeatureLevel(1, 3), FeatureLevel(2, 5), FeatureLevel(4, 2))
BYTES = [2 * level.channels * 40 * 24 * 36 // level.stride**3 for level in LEVELS]


@pytest.fixture
def stored(tmp_path: Path) -> FeatureMap:
    """A feature map of two sections with random features."""
    generator = torch.Generator().manual_seed(0)
    levels = [
        torch.randn(level.channels, *(size // level.stride for size in SHAPE), generator=generator) for level in LEVELS
    ]
    meta = FeatureMapMeta(grid_shape=SHAPE, padded_shape=SHAPE, levels=LEVELS, encoder_id="encoder")
    parts = [
        FeatureSection(
            z0,
            z1,
            [
                values[..., z0 // level.stride : z1 // level.stride]
                for level, values in zip(LEVELS, levels, strict=True)
            ],
        )
        for z0, z1 in ((0, 20), (20, 36))
    ]
    write_feature_map(tmp_path, "key", meta, parts)
    return FeatureMap.open(tmp_path, "key")


def scan_of(features: FeatureMap) -> SupportScan:
    return replace(scan_with_organ(1), features=features, shape=SHAPE)


def test_every_box_is_that_of_the_map_and_is_read_once(stored: FeatureMap, monkeypatch: pytest.MonkeyPatch) -> None:
    (scan,) = kept_in_memory([scan_of(stored)])
    kept = scan.features
    assert isinstance(kept, KeptFeatures)
    assert (kept.meta, kept.shape, kept.padded_shape, kept.levels) == (stored.meta, SHAPE, SHAPE, LEVELS)
    random = np.random.default_rng(0)
    boxes = []
    for level in (*range(3), *range(3)) * 8:
        low, high = np.sort([random.integers(0, np.add(stored.meta.level_shape(level), 1)) for _ in range(2)], axis=0)
        if (high > low).all():
            boxes.append((level, [(int(a), int(b)) for a, b in zip(low, high, strict=True)]))
    expected = [stored.read(level, *box) for level, box in boxes]
    for (level, box), values in zip(boxes, expected, strict=True):
        assert torch.equal(kept.read(level, *box), values)
    monkeypatch.setattr(FeatureMap, "read", lambda *_: pytest.fail("a box was read again"))
    for (level, box), values in zip(boxes, expected, strict=True):
        assert torch.equal(kept.read(level, *box), values)


def test_coarse_levels_are_kept_first_and_the_size_is_limited(
    stored: FeatureMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, kept in (
        (BYTES[1] + BYTES[2], [1, 2]),
        (sum(BYTES) - 1, [1, 2]),
        (BYTES[2], [2]),
        (sum(BYTES), [0, 1, 2]),
    ):
        monkeypatch.setattr(kept_features, "_KEPT_BYTES", limit)
        (scan,) = kept_in_memory([scan_of(stored)])
        assert isinstance(scan.features, KeptFeatures)
        assert sorted(scan.features.kept) == kept
    monkeypatch.setattr(kept_features, "_KEPT_BYTES", BYTES[2] - 1)
    (scan,) = kept_in_memory([scan_of(stored)])
    assert scan.features is stored
    monkeypatch.setattr(kept_features, "_KEPT_BYTES", 1 << 30)
    monkeypatch.setattr(kept_features, "free_ram", lambda: 0)
    (scan,) = kept_in_memory([scan_of(stored)])
    assert scan.features is stored


def test_variations_are_kept_too_and_kept_scans_stay(stored: FeatureMap) -> None:
    scan = replace(scan_of(stored), variations=(scan_of(stored), scan_with_organ(2)))
    (kept,) = kept_in_memory([scan])
    assert isinstance(kept.variations[0].features, KeptFeatures)
    assert kept.variations[1] is scan.variations[1]
    (again,) = kept_in_memory([kept])
    assert again is kept
