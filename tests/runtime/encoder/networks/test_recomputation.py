"""Gradient checkpointing: less memory, and the same features, gradients and statistics."""

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
    """A network after one forward and backward pass, its features, and the peak bytes of all tensors."""

    network: FeatureNetwork
    pyramid: list[Tensor]
    peak: int


def trained_once(network: FeatureNetwork, windows: Tensor) -> Pass:
    with LiveStorage() as live:
        pyramid = network(windows)
        sum(level.square().mean() for level in pyramid).backward()
    return Pass(network, [level.detach() for level in pyramid], live.peak)


@pytest.mark.parametrize("architecture", NETWORKS)
def test_checkpointing_gives_equal_features_gradients_and_statistics_in_less_memory(architecture: str) -> None:
    plain = build_network(architecture, **NETWORKS[architecture])
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing = True
    windows = torch.rand(1, 1, 64, 32, 32)
    one, two = trained_once(plain, windows), trained_once(checkpointed, windows)
    for a, b in zip(one.pyramid, two.pyramid, strict=True):
        assert torch.equal(a, b)
    gradients = dict(two.network.named_parameters())
    for name, parameter in one.network.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name
    statistics = dict(two.network.named_buffers())
    for name, buffer in one.network.named_buffers():
        assert torch.equal(buffer, statistics[name]), name
    assert two.peak < 0.75 * one.peak, (two.peak, one.peak)


def test_statistics_change_in_every_pass() -> None:
    network = build_network("residual_unet", channels=(4, 8, 8))
    network.gradient_checkpointing = True
    for _ in range(2):
        trained_once(network, torch.rand(1, 1, 16, 16, 16))
    batches = [buffer for name, buffer in network.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in batches} == {2}


def test_fixed_statistics_are_used_and_not_changed() -> None:
    plain = build_network("residual_unet", channels=(4, 8, 8)).eval()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing = True
    windows = torch.rand(1, 1, 16, 16, 16)
    one, two = trained_once(plain, windows), trained_once(checkpointed, windows)
    assert torch.equal(one.pyramid[0], two.pyramid[0])
    before = dict(plain.named_buffers())
    assert all(torch.equal(before[name], buffer) for name, buffer in checkpointed.named_buffers())
