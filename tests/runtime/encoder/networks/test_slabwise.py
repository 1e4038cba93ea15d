"""Slab-wise computation of the compact encoder: comparison with the whole network."""

from __future__ import annotations

import pytest
import torch
from doubles.models import random_network

from fseft_edge.runtime.encoder.networks.slabwise import SlabwiseResidualUNet


@pytest.mark.parametrize(
    ("channels", "window"),
    [
        ((4, 8), (16, 12, 8)),
        ((4, 8), (2, 6, 4)),
        ((4, 6, 8), (12, 16, 20)),
        ((4, 8, 8, 8), (24, 16, 32)),
        ((3, 5, 7, 8, 9), (48, 16, 32)),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
@torch.no_grad()
def test_equals_the_whole_network(channels: tuple[int, ...], window: tuple[int, int, int], count: int) -> None:
    network = random_network(channels)
    windows = torch.rand(count, 1, *window).to(memory_format=torch.channels_last_3d)
    slabwise = SlabwiseResidualUNet(network.folded()).eval()
    assert slabwise.levels == network.levels
    for expected, features in zip(network(windows), slabwise(windows), strict=True):
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_features_of_a_window_do_not_depend_on_other_windows() -> None:
    slabwise = SlabwiseResidualUNet(random_network((4, 8, 8)).folded()).eval()
    windows = torch.rand(3, 1, 16, 16, 16)
    together = slabwise(windows)
    for number in range(3):
        for single, level in zip(slabwise(windows[number : number + 1]), together, strict=True):
            torch.testing.assert_close(level[number : number + 1], single)


@torch.no_grad()
def test_returned_features_are_not_overwritten_by_the_next_window() -> None:
    slabwise = SlabwiseResidualUNet(random_network((4, 8, 8)).folded()).eval()
    first = slabwise(torch.rand(1, 1, 16, 16, 16))
    copies = [level.clone() for level in first]
    slabwise(torch.rand(1, 1, 16, 16, 16))
    for level, copy in zip(first, copies, strict=True):
        assert torch.equal(level, copy)
