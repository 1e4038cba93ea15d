"""Gradient checkpointing changes what is kept in memory, and nothing that is computed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from doubles.storages import LiveStorage
from torch import Tensor

from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork

NETWORKS = {"residual_unet": {"channels": (4, 8, 8)}, "swin_unetr": {"feature_size": 12}}


@dataclass(frozen=True)
class Pass:
    """A network after one forward and backward pass, and the most bytes that were alive in between."""

    network: FeatureNetwork
    pyramid: list[Tensor]
    peak: int


def trained_once(network: FeatureNetwork, windows: Tensor) -> Pass:
    with LiveStorage() as live:
        pyramid = network(windows)
        sum(level.square().mean() for level in pyramid).backward()
    return Pass(network, [level.detach() for level in pyramid], live.peak)


@pytest.mark.parametrize("architecture", NETWORKS)
def test_the_same_features_gradients_and_statistics_in_less_memory(architecture: str) -> None:
    plain = build_network(architecture, **NETWORKS[architecture])
    frugal = copy.deepcopy(plain)
    frugal.gradient_checkpointing = True
    windows = torch.rand(2, 1, 64, 32, 32)
    one, two = trained_once(plain, windows), trained_once(frugal, windows)
    for a, b in zip(one.pyramid, two.pyramid, strict=True):
        assert torch.equal(a, b)
    gradients = dict(two.network.named_parameters())
    for name, parameter in one.network.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name
    statistics = dict(two.network.named_buffers())
    for name, buffer in one.network.named_buffers():
        assert torch.equal(buffer, statistics[name]), name
    assert two.peak < 0.75 * one.peak


def test_statistics_go_on_changing_after_a_pass() -> None:
    network = build_network("residual_unet", channels=(4, 8, 8))
    network.gradient_checkpointing = True
    for _ in range(2):
        trained_once(network, torch.rand(1, 1, 16, 16, 16))
    batches = [buffer for name, buffer in network.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in batches} == {2}


def test_held_statistics_are_used_and_stay() -> None:
    plain = build_network("residual_unet", channels=(4, 8, 8)).eval()
    frugal = copy.deepcopy(plain)
    frugal.gradient_checkpointing = True
    windows = torch.rand(1, 1, 16, 16, 16)
    one, two = trained_once(plain, windows), trained_once(frugal, windows)
    assert torch.equal(one.pyramid[0], two.pyramid[0])
    before = dict(plain.named_buffers())
    assert all(torch.equal(before[name], buffer) for name, buffer in frugal.named_buffers())
