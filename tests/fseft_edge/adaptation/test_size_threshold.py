"""Thresholds that follow the expected size, on exact phantoms: the finest feature is the log odds of the organ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from doubles.features import MemoryFeatures
from numpy.typing import NDArray

from fseft_edge.adaptation.size_priors import SizePrior
from fseft_edge.adaptation.size_threshold import (
    MOST_LOG_ODDS,
    MovedThreshold,
    can_move_thresholds,
    expected_range,
    move_thresholds,
)
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.runtime.encoder.encoding import EncodedScan
from fseft_edge.runtime.encoder.feature_store import FeatureMap
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.scans.grid import Grid

SHAPE = (70, 50, 40)  # more than one block along x
VOXEL_MM3 = 27.0
CENTRE = (34.0, 24.0, 20.0)
BALL_ML = 4 / 3 * np.pi * 10**3 * VOXEL_MM3 / 1000
EXPECTED = SizePrior(0.9 * BALL_ML, 1.1 * BALL_ML)


def ball(radius: float, *, slope: float, centre: tuple[float, float, float] = CENTRE) -> NDArray[np.float32]:
    """Return log odds that are 0 on a sphere and fall by ``slope`` for each voxel outwards."""
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(SHAPE), centre, strict=True)))
    return np.asarray(slope * (radius - distance), np.float32)


def scan(log_odds: NDArray[np.float32]) -> EncodedScan:
    grid = SimpleNamespace(shape=SHAPE, voxel_volume_mm3=VOXEL_MM3)
    features = MemoryFeatures((torch.from_numpy(log_odds)[None],))
    return EncodedScan(cast("Grid", grid), cast("FeatureMap", features))


@pytest.fixture
def adapter() -> Adapter:
    """An adapter whose log odds are the feature."""
    adapter = Adapter(AdapterSettings("linear", "finest"), [FeatureLevel(1, 1)], 1)
    adapter.set_linear(torch.ones(1, 1), torch.zeros(1))
    return adapter.eval()


def moved(adapter: Adapter, log_odds: NDArray[np.float32], boxes: list[Box] | None = None) -> MovedThreshold:
    _, (organ,) = move_thresholds(adapter, scan(log_odds), [EXPECTED], boxes=boxes)
    assert organ is not None
    return organ


def volume_ml(adapter: Adapter, log_odds: NDArray[np.float32]) -> float:
    """Return the volume of the mask that an adapter gives at a probability of 0.5."""
    with torch.no_grad():
        logits = adapter.of_maps([torch.from_numpy(log_odds)[None, None]])
    return int((adapter.probabilities(logits) > 0.5).sum()) * VOXEL_MM3 / 1000


@pytest.mark.parametrize("radius", [9.0, 11.5])
def test_a_mask_of_a_wrong_size_gets_the_expected_size_by_the_least_move(adapter: Adapter, radius: float) -> None:
    log_odds = ball(radius, slope=0.8)
    changed, (organ,) = move_thresholds(adapter, scan(log_odds), [EXPECTED])
    assert organ is not None
    assert organ.before_ml == pytest.approx(volume_ml(adapter, log_odds))
    assert organ.after_ml == pytest.approx(volume_ml(changed, log_odds))
    assert EXPECTED.low_ml <= organ.after_ml <= EXPECTED.high_ml
    assert organ.flags == ()
    assert organ.changes_much
    # A smaller move, by one step of 0.05, is not enough.
    step = np.sign(organ.log_odds) * 0.05
    less = volume_ml(adapter, np.asarray(log_odds - organ.log_odds + step, np.float32))
    assert not EXPECTED.low_ml <= less <= EXPECTED.high_ml
    assert volume_ml(adapter, log_odds) == pytest.approx(organ.before_ml)  # the given adapter is unchanged


def test_a_mask_of_the_expected_size_is_not_changed(adapter: Adapter) -> None:
    changed, (organ,) = move_thresholds(adapter, scan(ball(10, slope=0.8)), [EXPECTED])
    assert changed is adapter
    assert organ is not None
    assert organ == MovedThreshold(organ.before_ml, organ.before_ml, 0.0, ())
    assert not organ.changes_much


def test_an_organ_without_a_range_keeps_its_threshold(adapter: Adapter) -> None:
    changed, organs = move_thresholds(adapter, scan(ball(14, slope=0.8)), [None])
    assert changed is adapter
    assert organs == (None,)


def test_an_organ_of_twice_the_size_with_steep_edges_is_not_pulled_to_the_expected_size(adapter: Adapter) -> None:
    log_odds = ball(10 * 2 ** (1 / 3), slope=20)
    organ = moved(adapter, log_odds)
    assert organ.log_odds == MOST_LOG_ODDS
    assert organ.after_ml > 0.95 * organ.before_ml > 1.8 * BALL_ML
    assert organ.flags == ("outside_prior",)
    assert not organ.changes_much


def test_an_organ_that_the_field_of_view_cuts_off_is_not_changed(adapter: Adapter) -> None:
    for centre in ((0.0, 24.0, 20.0), (34.0, 24.0, 39.0), (69.0, 49.0, 39.0)):
        log_odds = ball(10, slope=0.8, centre=centre)
        organ = moved(adapter, log_odds)
        assert organ == MovedThreshold(organ.before_ml, organ.before_ml, 0.0, ("cut_off",))
        assert organ.before_ml < 0.7 * BALL_ML


def test_a_removed_organ_is_not_brought_back(adapter: Adapter) -> None:
    nothing = moved(adapter, np.full(SHAPE, -1, np.float32))
    assert (nothing.before_ml, nothing.after_ml, nothing.flags) == (0, 0, ("absent",))
    speck = moved(adapter, ball(5, slope=0.1))  # an eighth of the organ; many voxels are nearly as probable
    assert speck.after_ml == speck.before_ml < 0.2 * BALL_ML
    assert speck.flags == ("absent",)


def test_only_the_given_boxes_count(adapter: Adapter) -> None:
    two = np.maximum(ball(10, slope=0.8, centre=(14, 24, 20)), ball(10, slope=0.8, centre=(50, 24, 20)))
    assert moved(adapter, two).before_ml == pytest.approx(2 * BALL_ML, rel=0.03)
    one = moved(adapter, two, [Box((2, 30), (10, 40), (5, 35))])
    assert one.before_ml == pytest.approx(BALL_ML, rel=0.03)
    assert one.log_odds == 0


def test_every_organ_has_its_own_threshold() -> None:
    adapter = Adapter(AdapterSettings("linear", "finest"), [FeatureLevel(1, 1)], 2)
    adapter.set_linear(torch.tensor([[1.0], [1.0]]), torch.tensor([0.0, -1.0]))
    changed, organs = move_thresholds(adapter.eval(), scan(ball(11.5, slope=0.8)), [EXPECTED, None])
    assert organs[1] is None
    assert organs[0] is not None
    assert changed.linear_bias().tolist() == pytest.approx([-organs[0].log_odds, -1])


def test_the_expected_range_comes_from_the_volumes_that_are_known() -> None:
    assert expected_range([20, 30, 0]) == SizePrior(18, 33)
    assert expected_range([0]) is None
    assert expected_range([]) is None


def test_organs_that_compete_have_no_threshold_of_their_own() -> None:
    levels = [FeatureLevel(1, 1)]
    assert can_move_thresholds(Adapter(AdapterSettings("linear", "finest"), levels, 1))
    assert not can_move_thresholds(Adapter(AdapterSettings("linear", "finest", activation="softmax"), levels, 1))
