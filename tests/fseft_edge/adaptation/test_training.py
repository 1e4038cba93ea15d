"""Training on synthetic feature maps whose first channel is the organ, so that the correct mask is known."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from doubles.features import MemoryFeatures
from doubles.scans import SHAPE, ball, scan_with_organ

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adaptation.training import TrainingSettings, drawn_changes, train_adapter, untrained_adapter
from fseft_edge.adapters.blocks import Box, read_block
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.runtime.encoder.feature_store import FeatureMap

FAST = TrainingSettings(block=16, batch=4, epochs=12, linear_rate=0.02, residual_rate=0.02)
BRIEF = replace(FAST, epochs=2, linear_blocks=4)


@pytest.mark.parametrize("levels", ["finest", "all"])
@pytest.mark.parametrize("method", ["linear", "spatial"])
def test_training_finds_an_organ_that_the_features_contain(method: str, levels: str) -> None:
    settings = AdapterSettings(method, levels, width=4)  # type: ignore[arg-type]  # parametrised literals
    trained = train_adapter(settings, [scan_with_organ(1), scan_with_organ(2)], head_rows=[None], training=FAST)
    query = scan_with_organ(3)
    core = Box(*((0, size) for size in SHAPE))
    with torch.inference_mode():
        logits = trained.adapter(read_block(query.features, trained.adapter.boxes(core)), core)
    found, truth = logits[0, 0].numpy() > 0, query.occupancy.block(core)[0].numpy() > 0.5
    dsc = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dsc > 0.75
    if method == "linear":
        assert len(trained.losses) == 1
        assert trained.losses[0] < 0.5
    else:
        assert trained.losses[-1] < trained.losses[0]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("method", ["linear", "spatial"])
def test_equal_seeds_give_bit_identical_weights(method: str, activation: str) -> None:
    """The global random state has no influence on the training, and the training does not change it."""
    settings = AdapterSettings(method, "all", activation, width=4)  # type: ignore[arg-type]  # parametrised literals
    first = train_adapter(settings, [scan_with_organ(1)], head_rows=[None], training=BRIEF)
    torch.manual_seed(99)
    second = train_adapter(settings, [scan_with_organ(1)], head_rows=[None], training=BRIEF)
    drawn = torch.rand(1)
    torch.manual_seed(99)
    assert torch.equal(drawn, torch.rand(1))
    assert first.losses == second.losses
    for a, b in zip(first.adapter.state_dict().values(), second.adapter.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_another_seed_gives_other_weights() -> None:
    settings = AdapterSettings("linear", "finest")
    first, second = (
        train_adapter(settings, [scan_with_organ(1)], head_rows=[None], training=replace(BRIEF, seed=seed))
        for seed in (0, 5)
    )
    assert not torch.equal(first.adapter.direct.weight, second.adapter.direct.weight)


def test_the_normalisation_uses_mean_and_standard_deviation_of_the_support_set() -> None:
    features = MemoryFeatures((torch.full((2, 64, 64, 64), 3.0), torch.zeros(1, 32, 32, 32)))
    features.tensors[0][1] = torch.randn(64, 64, 64) * 5 + 7
    scan = SupportScan(
        cast("FeatureMap", features), (64, 64, 64), Occupancy([np.zeros((64, 64, 64))]), np.array([True]), (0.0,)
    )
    adapter = untrained_adapter(AdapterSettings("linear", "all"), [scan], head_rows=[None])
    assert float(adapter.mean(0)[0]) == pytest.approx(3)
    assert float(adapter.mean(0)[1]) == pytest.approx(7, abs=0.5)  # blocks at the border repeat edge voxels
    assert float(adapter.scale(0)[1]) == pytest.approx(5, rel=0.1)
    assert bool((adapter.scale(0) > 0).all())
    assert bool((adapter.scale(1) > 0).all())


def test_training_stops_early_if_the_averaged_loss_does_not_decrease() -> None:
    training = TrainingSettings(
        block=16, batch=4, epochs=60, linear_rate=1e-9, residual_rate=1e-9, smoothing=2, patience=3, least_gain=1e-3
    )
    trained = train_adapter(
        AdapterSettings("pointwise", "finest"), [scan_with_organ(1)], head_rows=[None], training=training
    )
    # An epoch has only 8 blocks, so `smoothing` and `patience` are extended by a factor of 4.
    assert 4 * (2 + 3) <= len(trained.losses) < 60


def test_the_anchor_holds_only_the_classifiers_of_known_organs() -> None:
    rows = [(torch.tensor([1.0, 0.0, 0.0]), 0.0), None]
    scan = replace(scan_with_organ(1), occupancy=Occupancy([ball(1)] * 2), annotated=np.array([True, True]))
    settings = AdapterSettings("spatial", "all", width=4)
    start = untrained_adapter(settings, [scan], head_rows=rows)
    before = start.linear_weight()
    moved = []
    for anchor in (0.0, 1e4):
        training = replace(FAST, anchor=anchor, linear_rate=0.01)
        after = train_adapter(settings, [scan], head_rows=rows, training=training).adapter.linear_weight()
        moved.append((after - before).abs().amax(1))
    (free_known, free_novel), (held_known, held_novel) = moved
    assert held_known < 0.1 * free_known
    assert held_novel > 0.5 * free_novel


def test_a_scan_without_annotation_has_no_influence() -> None:
    """The occupancy of an organ that is not annotated has no effect."""
    scan = scan_with_organ(7)
    unannotated = SupportScan(scan.features, SHAPE, scan.occupancy, np.array([False]), (0.0,))
    inverted = SupportScan(scan.features, SHAPE, Occupancy([1 - ball(7)]), np.array([False]), (0.0,))
    training = TrainingSettings(block=16, batch=1, epochs=1, blocks_per_epoch=4, linear_blocks=4)
    settings = AdapterSettings("linear", "finest")
    results = [train_adapter(settings, [one], head_rows=[None], training=training) for one in (unannotated, inverted)]
    assert results[0].losses == results[1].losses == (0.0,)


def test_the_number_of_epochs_depends_on_the_size_of_the_support_set_and_is_limited_to_that_of_the_paper() -> None:
    training = TrainingSettings()
    assert training.epochs_for(1, 1) == 200
    assert training.epochs_for(5, 5) == training.epochs_for(10, 10) == 80
    assert training.epochs_for(30, 30) == 40
    assert TrainingSettings(blocks=600).epochs_for(10, 10) == 10
    assert TrainingSettings(epochs=3).epochs_for(10, 10) == 3


def test_variations_make_an_epoch_longer_but_not_the_training() -> None:
    assert TrainingSettings(blocks=1200).epochs_for(1, 9) == round(1200 / (6 * 9))


def test_changes_keep_the_mean_of_channels_and_drop_channels_only_at_coarse_levels() -> None:
    scan = scan_with_organ(1)
    adapter = untrained_adapter(AdapterSettings("linear", "all"), [scan], head_rows=[None])
    generator = torch.Generator().manual_seed(0)
    training = TrainingSettings(feature_shift=0.5, channel_dropout=0.5)
    finest, coarse = drawn_changes(adapter, 400, training, generator)
    assert bool((finest.factor == 1).all())
    assert float(finest.offset.std()) == pytest.approx(0.5, rel=0.1)
    assert float(finest.offset.mean()) == pytest.approx(0, abs=0.05)
    dropped = coarse.factor == 0
    assert float(dropped.float().mean()) == pytest.approx(0.5, abs=0.1)
    assert bool((coarse.offset[dropped] == 0).all())
    assert bool((coarse.factor[~dropped] == 2).all())
    assert float(coarse.offset[~dropped].std()) == pytest.approx(1, rel=0.1)
    for unchanged in drawn_changes(adapter, 4, TrainingSettings(feature_shift=0, channel_dropout=0), generator):
        assert bool((unchanged.factor == 1).all())
        assert not bool(unchanged.offset.any())


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_linear_adapter_starts_from_zero_for_novel_organs(activation: str) -> None:
    settings = AdapterSettings("linear", "all", activation)  # type: ignore[arg-type]  # parametrised literal
    start = untrained_adapter(settings, [scan_with_organ(1)], head_rows=[None])
    assert not bool(start.linear_weight().any())
