"""Training on a synthetic feature map whose first channel is the organ, so that success has a closed form."""

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
from fseft_edge.adaptation.training import TrainingSettings, perturbed, train_adapter, untrained_adapter
from fseft_edge.adapters.blocks import Box, read_block
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.runtime.encoder.feature_store import FeatureMap

FAST = TrainingSettings(block=16, batch=4, epochs=12, linear_rate=0.02, residual_rate=0.02)


@pytest.mark.parametrize("levels", ["finest", "all"])
@pytest.mark.parametrize("method", ["linear", "spatial"])
def test_training_finds_an_organ_that_the_features_show(method: str, levels: str) -> None:
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
def test_the_same_seed_gives_the_same_weights_to_the_bit(method: str, activation: str) -> None:
    """Whatever random numbers were drawn elsewhere, and without disturbing those."""
    settings = AdapterSettings(method, "all", activation, width=4)  # type: ignore[arg-type]  # parametrised literals
    first = train_adapter(settings, [scan_with_organ(1)], head_rows=[None], training=FAST)
    torch.manual_seed(99)
    second = train_adapter(settings, [scan_with_organ(1)], head_rows=[None], training=FAST)
    drawn = torch.rand(1)
    torch.manual_seed(99)
    assert torch.equal(drawn, torch.rand(1))
    assert first.losses == second.losses
    for a, b in zip(first.adapter.state_dict().values(), second.adapter.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_another_seed_gives_other_weights() -> None:
    settings = AdapterSettings("linear", "finest")
    first = train_adapter(settings, [scan_with_organ(1)], head_rows=[None], training=FAST)
    second = train_adapter(
        settings,
        [scan_with_organ(1)],
        head_rows=[None],
        training=TrainingSettings(seed=5, block=16, epochs=12, linear_rate=0.05, residual_rate=0.05),
    )
    assert not torch.equal(first.adapter.direct.weight, second.adapter.direct.weight)


def test_normalisation_is_the_supports_mean_and_deviation() -> None:
    features = MemoryFeatures((torch.full((2, 64, 64, 64), 3.0), torch.zeros(1, 32, 32, 32)))
    features.tensors[0][1] = torch.randn(64, 64, 64) * 5 + 7
    scan = SupportScan(
        cast("FeatureMap", features), (64, 64, 64), Occupancy([np.zeros((64, 64, 64))]), np.array([True]), (0.0,)
    )
    adapter = untrained_adapter(AdapterSettings("linear", "all"), [scan], head_rows=[None])
    assert float(adapter.mean(0)[0]) == pytest.approx(3)
    assert float(adapter.mean(0)[1]) == pytest.approx(7, abs=0.5)  # blocks at the border repeat its voxels
    assert float(adapter.scale(0)[1]) == pytest.approx(5, rel=0.1)
    assert bool((adapter.scale(0) > 0).all())
    assert bool((adapter.scale(1) > 0).all())


def test_training_ends_early_once_the_smoothed_loss_stands_still() -> None:
    training = TrainingSettings(
        block=16, batch=4, epochs=60, linear_rate=1e-9, residual_rate=1e-9, smoothing=2, patience=3, least_gain=1e-3
    )
    trained = train_adapter(
        AdapterSettings("pointwise", "finest"), [scan_with_organ(1)], head_rows=[None], training=training
    )
    # An epoch of 8 blocks tells little: 2 and 3 epochs stand for four times as many.
    assert 4 * (2 + 3) <= len(trained.losses) < 60


def test_an_anchor_holds_the_classifiers_of_known_organs_only() -> None:
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


def test_an_organ_without_annotation_in_a_scan_teaches_nothing_there() -> None:
    """A scan that is annotated for no organ has no influence at all, whatever its contours hold."""
    silent = scan_with_organ(7)
    silent = SupportScan(silent.features, SHAPE, silent.occupancy, np.array([False]), (0.0,))
    inverted = SupportScan(silent.features, SHAPE, Occupancy([1 - ball(7)]), np.array([False]), (0.0,))
    training = TrainingSettings(block=16, batch=1, epochs=1, blocks_per_epoch=4)
    kinds = AdapterSettings("linear", "finest")
    results = [train_adapter(kinds, [scan], head_rows=[None], training=training) for scan in (silent, inverted)]
    assert results[0].losses == results[1].losses == (0.0,)


def test_epochs_follow_the_size_of_the_support_set_up_to_the_papers_number() -> None:
    training = TrainingSettings()
    assert training.epochs_for(1, 1) == 200
    assert training.epochs_for(5, 5) == training.epochs_for(10, 10) == 80
    assert training.epochs_for(30, 30) == 40
    assert TrainingSettings(blocks=600).epochs_for(10, 10) == 10
    assert TrainingSettings(epochs=3).epochs_for(10, 10) == 3


def test_variations_lengthen_an_epoch_and_not_the_training() -> None:
    assert TrainingSettings(blocks=1200).epochs_for(1, 9) == round(1200 / (6 * 9))


def test_perturbed_features_keep_their_mean_and_are_dropped_at_coarse_levels_only() -> None:
    scan = scan_with_organ(1)
    adapter = untrained_adapter(AdapterSettings("linear", "all"), [scan], head_rows=[None])
    features = [torch.full((200, level.channels, 1, 1, 1), 5.0) for level in adapter.levels]
    generator = torch.Generator().manual_seed(0)
    training = TrainingSettings(feature_shift=0.5, channel_dropout=0.5)
    finest, coarse = perturbed(features, adapter, training, generator)
    for level, changed in enumerate((finest, coarse)):
        offset = (changed - 5.0).flatten(1) / adapter.scale(level)
        if level == 0:
            assert float(offset.std()) == pytest.approx(0.5, rel=0.1)
            assert float(offset.mean()) == pytest.approx(0, abs=0.1)
    left_out = (coarse.flatten(1) == adapter.mean(1)).float().mean()
    assert float(left_out) == pytest.approx(0.5, abs=0.1)
    assert not bool((finest.flatten(1) == adapter.mean(0)).any())
    still = perturbed(features, adapter, TrainingSettings(feature_shift=0, channel_dropout=0), generator)
    for before, after in zip(features, still, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_linear_adapter_is_held_to_zero_where_nothing_is_known(activation: str) -> None:
    settings = AdapterSettings("linear", "all", activation)  # type: ignore[arg-type]  # parametrised literal
    start = untrained_adapter(settings, [scan_with_organ(1)], head_rows=[None])
    assert not bool(start.linear_weight().any())
