"""Adapter networks: blocks and complete scans, start from the encoder's head, folding, and published formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from doubles.features import MemoryFeatures, random_features
from torch import Tensor, nn

from fseft_edge.adapters.blocks import Box, read_block, tiles
from fseft_edge.adapters.network import Adapter, AdapterSettings

SHAPE = (32, 24, 40)
KINDS = [
    AdapterSettings(method, levels, activation, width=6)
    for method, levels, activation in itertools.product(
        ("linear", "pointwise", "spatial"), ("finest", "all"), ("sigmoid", "softmax")
    )
]


def _features() -> MemoryFeatures:
    return random_features(SHAPE, (4, 6, 8, 10))


def _random_adapter(settings: AdapterSettings, features: MemoryFeatures, organs: int = 2) -> Adapter:
    torch.manual_seed(1)
    adapter = Adapter(settings, features.levels, organs)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.2)
    for level in range(len(adapter.levels)):
        adapter.mean(level).normal_()
        adapter.scale(level).uniform_(0.5, 2)
    return adapter.eval()


def _apply(adapter: Adapter, features: MemoryFeatures, core: Box) -> Tensor:
    with torch.inference_mode():
        return adapter(read_block(features, adapter.boxes(core)), core)[0]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_scan_in_blocks_gives_the_result_of_the_complete_scan(settings: AdapterSettings) -> None:
    features = _features()
    adapter = _random_adapter(settings, features)
    whole = _apply(adapter, features, Box(*((0, size) for size in SHAPE)))
    for box in tiles(SHAPE, (13, 24, 9)):
        part = _apply(adapter, features, box)
        wanted = whole[:, slice(*box.x), slice(*box.y), slice(*box.z)]
        torch.testing.assert_close(part, wanted, rtol=0, atol=3e-6 * float(whole.abs().max()))


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_an_untrained_adapter_is_the_zero_shot_classifier_of_known_organs(settings: AdapterSettings) -> None:
    features = _features()
    adapter = Adapter(settings, features.levels, 2)
    for level in range(len(adapter.levels)):
        adapter.mean(level).normal_()
        adapter.scale(level).uniform_(0.5, 2)
    weight, bias = torch.randn(4), 0.7
    adapter.start_from_head([(weight, bias), None])
    core = Box((0, 8), (0, 8), (0, 8))
    logits = _apply(adapter.eval(), features, core)
    known = 1 if settings.activation == "softmax" else 0
    expected = torch.einsum("c,cxyz->xyz", weight, features.tensors[0][:, :8, :8, :8]) + bias
    torch.testing.assert_close(logits[known], expected, rtol=0, atol=1e-5)


def test_the_spatial_adapter_on_the_finest_level_is_the_formula_of_the_paper() -> None:
    """The formula is ``V(x + C3(ReLU(C3(x))))``, computed by convolutions far from the border of the map."""
    features = random_features((16, 16, 16), (4,))
    adapter = _random_adapter(AdapterSettings("spatial", "finest"), features)
    x = (features.tensors[0][None] - adapter.mean(0)[:, None, None, None]) / adapter.scale(0)[:, None, None, None]
    step = adapter.steps[0]
    residual = nn.functional.conv3d(x, step.first.weight, padding=1).relu()
    residual = nn.functional.conv3d(residual, step.second.weight, padding=1)
    expected = adapter.direct(x + residual)[0, :, 4:12, 4:12, 4:12]
    core = Box((4, 12), (4, 12), (4, 12))
    torch.testing.assert_close(_apply(adapter, features, core), expected, rtol=0, atol=1e-5)


def test_parameter_counts_on_48_channels_are_the_published_ones() -> None:
    """The released code has 124,416 parameters in the spatial adapter and 49 in the classifier of one organ."""
    features = random_features((8, 8, 8), (48,))
    spatial = Adapter(AdapterSettings("spatial", "finest"), features.levels, 1)
    linear = Adapter(AdapterSettings("linear", "finest"), features.levels, 1)
    assert sum(p.numel() for p in linear.parameters()) == 49
    assert sum(p.numel() for p in spatial.parameters()) == 124_416 + 49


def test_probabilities_sum_to_one_with_softmax_only() -> None:
    features = _features()
    logits = torch.randn(1, 3, 4, 4, 4)
    softmax = Adapter(AdapterSettings("linear", "finest", "softmax"), features.levels, 2)
    sigmoid = Adapter(AdapterSettings("linear", "finest", "sigmoid"), features.levels, 3)
    torch.testing.assert_close(softmax.probabilities(logits).sum(1), torch.ones(1, 4, 4, 4))
    torch.testing.assert_close(sigmoid.probabilities(logits), torch.sigmoid(logits))


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_logits_are_linear_in_the_input_of_the_classifiers(settings: AdapterSettings) -> None:
    features = _features()
    adapter = _random_adapter(settings, features)
    core = Box((8, 16), (8, 16), (8, 24))
    with torch.inference_mode():
        inputs = adapter.penultimate(read_block(features, adapter.boxes(core)), core)[0].flatten(1)
        logits = adapter.linear_weight() @ inputs + adapter.linear_bias()[:, None]
    expected = _apply(adapter, features, core)
    assert float((logits.view(expected.shape) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
