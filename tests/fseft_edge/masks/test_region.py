"""Masks inside boxes: no mask is ever cut, and what is found equals the mask of the whole scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch
from doubles.features import MemoryFeatures
from numpy.typing import NDArray

from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.masks.memory_plan import LEAST
from fseft_edge.masks.prediction import decide_encoded
from fseft_edge.masks.region import decide_region, hull, read_by, separate
from fseft_edge.runtime.encoder.encoding import EncodedScan
from fseft_edge.runtime.encoder.feature_map import FeatureMap
from fseft_edge.runtime.scans.components import components
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import Volume

SHAPE = (48, 64, 56)
CUTS = ([*range(0, 48, 16), 48], [*range(0, 64, 16), 64], [*range(0, 56, 8), 56])
ORIENTATIONS = [
    ((0, 1, 2), (False, False, False)),
    ((2, 0, 1), (True, False, True)),
]


@dataclass(frozen=True)
class CountedFeatures(MemoryFeatures):
    """A feature map that notes which voxels of the finest level were read."""

    seen: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(SHAPE, np.bool_))

    def read(self, level: int, x: tuple[int, int], y: tuple[int, int], z: tuple[int, int]) -> torch.Tensor:
        if level == 0:
            self.seen[slice(*x), slice(*y), slice(*z)] = True
        return super().read(level, x, y, z)


def balls(*centres: tuple[int, int, int], radius: float = 5.0) -> NDArray[np.float32]:
    """Return a map that is positive inside balls and negative elsewhere."""
    distance = [
        np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(SHAPE), centre, strict=True))) for centre in centres
    ]
    return (radius - np.min(distance, axis=0)).astype(np.float32)


def encoded(organ: NDArray[np.float32], spacing: float = 2.0, orientation: int = 0) -> EncodedScan:
    """Return a scan whose first feature is the organ, and whose lattice has another spacing and orientation."""
    order, flips = ORIENTATIONS[orientation]
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (along, flipped) in enumerate(zip(order, flips, strict=True)):
        affine[along, axis] = -spacing if flipped else spacing
    shape = tuple(round(SHAPE[along] * 3.0 / spacing) for along in order)
    volume = Volume(np.zeros(cast("tuple[int, int, int]", shape), np.int16), affine)
    grid = Grid.of(volume, Preprocessing(spacing=(3.0, 3.0, 3.0)))
    assert grid.shape == SHAPE
    finest = torch.from_numpy(organ)[None]
    features = CountedFeatures((finest, torch.nn.functional.avg_pool3d(finest[None], 2)[0]))
    return EncodedScan(grid, cast("FeatureMap", features))


def adapter_of(activation: str = "sigmoid", method: str = "linear") -> Adapter:
    """Return an adapter whose logit is the first feature."""
    adapter = Adapter(
        AdapterSettings(method, "all", activation), MemoryFeatures((torch.zeros(1, 2, 2, 2),) * 2).levels, 1
    )  # type: ignore[arg-type]  # literals
    with torch.no_grad():
        for weights in adapter.classifiers():
            weights.zero_()
        adapter.direct.weight[-1] = 1.0
        adapter.direct.bias.zero_()
    return adapter.eval()


def seen(scan: EncodedScan) -> NDArray[np.bool_]:
    return cast("CountedFeatures", scan.features).seen


def around(centre: Sequence[int], reach: int) -> Box:
    return Box(*((c - reach, c + reach) for c in centre))


@pytest.mark.parametrize("orientation", [0, 1])
@pytest.mark.parametrize("spacing", [1.5, 2.0, 8.0])
def test_a_box_with_a_piece_of_an_organ_grows_until_the_mask_is_that_of_the_whole_scan(
    spacing: float, orientation: int
) -> None:
    organ = balls((20, 30, 20), (28, 30, 28), (34, 38, 34), radius=7)
    scan, adapter = encoded(organ, spacing, orientation), adapter_of()
    expected = decide_encoded(encoded(organ, spacing, orientation), [adapter]).labels
    region = decide_region(scan, [adapter], [around((17, 27, 17), 3)], cuts=CUTS)
    assert expected.any()
    assert region.rounds > 0
    np.testing.assert_array_equal(region.found.labels, expected)


def test_only_the_components_that_were_located_are_found_each_completely() -> None:
    organ = balls((10, 12, 12), (38, 50, 44))
    scan, adapter = encoded(organ), adapter_of()
    expected = decide_encoded(encoded(organ), [adapter]).labels
    numbered, sizes = components(expected > 0)
    assert len(sizes) == 2
    region = decide_region(scan, [adapter], [around((10, 12, 12), 8)], cuts=CUTS)
    np.testing.assert_array_equal(
        region.found.labels, np.where(numbered == numbered[tuple(np.argwhere(expected)[0])], expected, 0)
    )
    assert seen(scan).mean() < 0.1
    both = decide_region(encoded(organ), [adapter], [around((10, 12, 12), 3), around((38, 50, 44), 3)], cuts=CUTS)
    np.testing.assert_array_equal(both.found.labels, expected)


def test_false_voxels_that_only_the_growth_brought_into_sight_are_not_in_the_mask_and_let_nothing_grow() -> None:
    organ, false = balls((16, 16, 16), radius=7), balls((16, 33, 20), (18, 46, 30), radius=5)
    expected = decide_encoded(encoded(organ), [adapter_of()]).labels
    alone = decide_region(encoded(organ), [adapter_of()], [around((16, 16, 16), 2)], cuts=CUTS)
    both = decide_region(encoded(np.maximum(organ, false)), [adapter_of()], [around((16, 16, 16), 2)], cuts=CUTS)
    assert both.boxes == alone.boxes
    np.testing.assert_array_equal(both.found.labels, expected)
    (box,) = both.boxes
    assert 28 < box.y[1] < 38  # the first false ball lies across the edge of the grown box


def test_an_organ_at_the_border_of_the_scan_is_complete_without_growth() -> None:
    organ = balls((0, 2, 55), radius=6)
    scan, adapter = encoded(organ), adapter_of()
    region = decide_region(scan, [adapter], [Box((0, 12), (0, 14), (44, 56))], cuts=CUTS)
    assert region.rounds == 0
    np.testing.assert_array_equal(region.found.labels, decide_encoded(encoded(organ), [adapter]).labels)
    assert not seen(scan)[20:].any()


def test_an_organ_that_fills_the_scan_is_decided_in_the_whole_scan() -> None:
    organ = np.ones(SHAPE, np.float32)
    region = decide_region(encoded(organ), [adapter_of()], [around((24, 30, 28), 2)], cuts=CUTS)
    assert region.boxes == (Box(*((0, size) for size in SHAPE)),)
    assert (region.found.labels == 1).all()


@pytest.mark.parametrize("method", ["linear", "spatial"])
def test_softmax_and_context_give_the_mask_of_the_whole_scan_whatever_the_pieces(method: str) -> None:
    organ = balls((20, 30, 20), radius=8)
    adapter = adapter_of("softmax", method)
    expected = decide_encoded(encoded(organ), [adapter]).labels
    region = decide_region(encoded(organ), [adapter], [around((20, 30, 20), 4)], cuts=CUTS, plan=LEAST)
    assert expected.any()
    np.testing.assert_array_equal(region.found.labels, expected)


def test_what_is_read_is_announced_and_reaches_to_the_next_cut() -> None:
    organ = balls((20, 30, 20), radius=8)
    scan, announced = encoded(organ), []
    decide_region(scan, [adapter_of()], [around((20, 30, 20), 4)], cuts=CUTS, prepare=announced.append)
    allowed = np.zeros(SHAPE, np.bool_)
    for box in announced[-1]:
        allowed[tuple(slice(max(low, 0), high) for low, high in box.ranges)] = True
    assert not (seen(scan) & ~allowed).any()
    for axis, (low, high) in enumerate(announced[-1][0].ranges):
        assert {low, high} <= {place for cut in CUTS[axis] for place in range(cut - 2, cut + 3)}


def test_the_confidence_counts_only_what_was_found() -> None:
    organ = balls((10, 12, 12), (38, 50, 44)) + np.where(np.arange(SHAPE[0])[:, None, None] > 24, 5, 0)
    low = decide_region(encoded(organ), [adapter_of()], [around((10, 12, 12), 8)], cuts=CUTS).found.confidence[0]
    both = decide_encoded(encoded(organ), [adapter_of()]).confidence[0]
    assert low is not None
    assert both is not None
    assert low < both


def test_boxes_are_separate_and_contain_all_given_boxes() -> None:
    given = [Box((0, 4), (0, 4), (0, 4)), Box((4, 8), (0, 4), (0, 4)), Box((20, 22), (0, 4), (0, 4))]
    given.append(Box((9, 12), (3, 5), (0, 9)))
    apart = separate(given)
    assert apart == [Box((0, 8), (0, 4), (0, 4)), Box((9, 12), (3, 5), (0, 9)), Box((20, 22), (0, 4), (0, 4))] or all(
        hull([one]) == one for one in apart
    )
    for one, other in pairwise(apart):
        assert any(a >= d + 1 or c >= b + 1 for (a, b), (c, d) in zip(one.ranges, other.ranges, strict=True))


def test_the_box_that_adapters_read_contains_every_level() -> None:
    spatial = adapter_of(method="spatial")
    core = Box((8, 24), (8, 24), (8, 24))
    read = read_by([adapter_of(), spatial], core)
    coarse = spatial.boxes(core)[1]
    assert read.x == (2 * coarse.x[0], 2 * coarse.x[1])
