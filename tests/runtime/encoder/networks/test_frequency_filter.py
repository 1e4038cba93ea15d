"""Frequency filter: comparison with a real gain on PyTorch's Fourier transform, for several sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fseft_edge.runtime.encoder.networks.frequency_filter import FrequencyFilter

SIZES = [(8, 8, 8), (7, 6, 5), (1, 2, 3), (1, 1, 1), (48, 24, 3)]


def random_filter(channels: int) -> FrequencyFilter:
    network = FrequencyFilter(channels)
    nn.init.normal_(network.gain)
    return network


def by_fft(gain: Tensor, x: Tensor) -> Tensor:
    """Apply the filter with complex numbers; PyTorch's trilinear interpolation gives the gain of each frequency."""
    x = x.double()
    places = [torch.fft.fftfreq(length, dtype=torch.float64).abs() * 4 - 1 for length in x.shape[2:]]  # -1 to 1
    grid = torch.stack(torch.meshgrid(*places[::1], indexing="ij"), dim=-1).flip(-1)  # grid_sample: last axis first
    gains = F.grid_sample(gain.detach().double()[None], grid[None], align_corners=True)
    return torch.fft.ifftn(torch.fft.fftn(x, dim=(2, 3, 4)) * gains, dim=(2, 3, 4)).real


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_the_filter_is_a_gain_on_the_fourier_transform(size: tuple[int, int, int]) -> None:
    network, x = random_filter(3), torch.rand(2, 3, *size)
    expected = by_fft(network.gain, x)
    torch.testing.assert_close(network(x).double(), expected, rtol=0, atol=2e-6 * max(expected.abs().max().item(), 1))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_the_initial_filter_is_the_identity(size: tuple[int, int, int]) -> None:
    x = torch.rand(1, 2, *size)
    torch.testing.assert_close(FrequencyFilter(2)(x), x, rtol=0, atol=2e-6)


@torch.no_grad()
def test_a_wave_is_multiplied_by_its_gain_in_windows_of_any_size() -> None:
    """The points of the grid are 1/6 cycles per voxel apart: the second is 1/6, the last is 1/2 cycles per voxel."""
    network = random_filter(1)
    for length in (12, 24, 36):
        along = torch.cos(2 * torch.pi * torch.arange(length) / 6)[None, None, None, :, None].expand(1, 1, 2, -1, 4)
        torch.testing.assert_close(network(along), along * network.gain[0, 0, 1, 0], rtol=0, atol=1e-5)
        fastest = torch.cos(torch.pi * torch.arange(length))[None, None, None, :, None].expand(1, 1, 2, -1, 4)
        torch.testing.assert_close(network(fastest), fastest * network.gain[0, 0, 3, 0], rtol=0, atol=1e-5)


def test_the_filter_computes_in_float32_inside_autocast() -> None:
    network, x = random_filter(2), torch.rand(1, 2, 16, 16, 16)
    expected = network(x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        filtered = network(x.bfloat16())
    assert filtered.dtype == torch.bfloat16
    assert torch.equal(filtered, expected.bfloat16())
    filtered.sum().backward()
    assert network.gain.grad is not None
    assert network.gain.grad.dtype == torch.float32
