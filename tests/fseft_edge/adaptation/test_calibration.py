"""Calibrated thresholds on exact phantoms: the finest feature is the log odds of the organ, 0 on a sphere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from doubles.errors import refused
from doubles.features import MemoryFeatures, random_features

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.calibration import calibrate
from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adaptation.training import TrainingSettings, train_adapter
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Activation, Adapter, AdapterSettings
from fseft_edge.runtime.encoder.feature_store import FeatureMap
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.errors import UsageError

SHAPE = (48, 40, 44)
SLOPE = 0.8


def annotated_ball(
    radius: float, predicted: float, centre: Sequence[float] = (24, 20, 22), *, annotated: bool = True
) -> SupportScan:
    """Return a scan with an annotated ball, whose features predict a ball of another radius."""
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(SHAPE), centre, strict=True)))
    features = MemoryFeatures((torch.from_numpy(SLOPE * (predicted - distance)).float()[None],))
    occupancy = Occupancy([(distance < radius).astype(np.float32)])
    known = np.array([annotated])
    return SupportScan(cast("FeatureMap", features), SHAPE, occupancy, known, (1.0 if annotated else 0.0,))


def moved_by(support: Sequence[SupportScan], share: float = 1.0) -> float:
    adapter = Adapter(AdapterSettings("linear", "finest"), [FeatureLevel(1, 1)], 1)
    adapter.set_linear(torch.ones(1, 1), torch.zeros(1))
    calibrate(adapter.eval(), support, share)
    assert adapter.linear_weight().item() == 1
    return -adapter.linear_bias().item()


@pytest.mark.parametrize(("predicted", "move"), [(10, 0), (13, 2.4), (8, -1.6)])
def test_the_masks_of_the_support_get_the_volumes_of_their_annotations(predicted: float, move: float) -> None:
    # On the sphere of radius 10, the log odds are 0.8 (predicted - 10).
    assert moved_by([annotated_ball(10, predicted)]) == pytest.approx(move, abs=0.15)


def test_a_share_of_the_move_is_made() -> None:
    whole = moved_by([annotated_ball(10, 13)])
    assert moved_by([annotated_ball(10, 13)], 0.5) == pytest.approx(whole / 2)
    assert moved_by([annotated_ball(10, 13)], 0) == 0


def test_the_volumes_of_all_scans_count_together_and_only_where_the_organ_is_annotated() -> None:
    both = moved_by([annotated_ball(10, 13), annotated_ball(10, 10, (18, 20, 20))])
    assert 0.8 < both < 1.6
    with_partial = moved_by([annotated_ball(10, 13), annotated_ball(10, 4, annotated=False)])
    assert with_partial == moved_by([annotated_ball(10, 13)])


def test_what_is_far_from_the_annotated_organs_does_not_count() -> None:
    scan = annotated_ball(6, 8, (10, 10, 10))
    assert isinstance(scan.features, MemoryFeatures)
    (finest,) = scan.features.tensors
    finest[:, 40:, 30:, 36:] = 9
    assert moved_by([scan]) == pytest.approx(moved_by([annotated_ball(6, 8, (10, 10, 10))]))


def test_air_between_two_parts_of_an_organ_does_not_count() -> None:
    def two_balls(between: float) -> SupportScan:
        scan = annotated_ball(5, 7, (8, 8, 8))
        other = annotated_ball(5, 7, (40, 32, 36))
        assert isinstance(scan.features, MemoryFeatures)
        assert isinstance(other.features, MemoryFeatures)
        finest = torch.maximum(scan.features.tensors[0], other.features.tensors[0])
        finest[:, 24, 20, 22] = between
        whole = Box(*((0, length) for length in SHAPE))
        shares = scan.occupancy.block(whole)[0] + other.occupancy.block(whole)[0]
        features = cast("FeatureMap", MemoryFeatures((finest,)))
        return replace(scan, features=features, occupancy=Occupancy([shares.numpy()]))

    assert moved_by([two_balls(9)]) == moved_by([two_balls(-9)])


def test_an_organ_that_the_adapter_hardly_finds_is_not_changed() -> None:
    assert moved_by([annotated_ball(10, 0)]) == 0


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with refused(UsageError, "calibration", share):
        TrainingSettings(calibration=share)


def test_an_organ_that_no_scan_shows_is_not_changed() -> None:
    empty = replace(annotated_ball(10, 13), occupancy=Occupancy([np.zeros(SHAPE, np.float32)]))
    assert moved_by([empty]) == 0
    assert moved_by([annotated_ball(10, 13, annotated=False)]) == 0


@pytest.mark.parametrize(("activation", "changes"), [("sigmoid", True), ("softmax", False)])
def test_training_ends_with_the_calibration_of_organs_that_have_a_threshold(
    activation: Activation, changes: bool
) -> None:
    features = random_features(SHAPE, (3, 4))
    scan = replace(annotated_ball(10, 10), features=cast("FeatureMap", features))
    settings = AdapterSettings("pointwise", activation=activation, width=4)
    training = TrainingSettings(block=16, batch=2, epochs=3, calibration=1.0)
    trained, plain = (
        train_adapter(settings, [scan], head_rows=[None], training=one).adapter
        for one in (training, replace(training, calibration=0.0))
    )
    assert torch.equal(trained.linear_weight(), plain.linear_weight())
    assert torch.equal(trained.linear_bias(), plain.linear_bias()) is not changes
    if changes:
        with torch.no_grad():
            levels = [level[None] for level in features.tensors]
            box = (slice(6, 42), slice(2, 38), slice(4, 40))  # the organ and a margin of 8 voxels
            volume = int((trained.of_maps(levels)[0, 0][box] > 0).sum())
        assert volume == pytest.approx(len(scan.occupancy.positions(0)), rel=0.1)
