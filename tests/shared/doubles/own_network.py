"""A network of a user's own code, for exports that import this code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CALLS: list[int] = []
"""One entry for each call of the factory."""


class OwnNetwork(nn.Module):
    """A network of three levels, with names and layers that no architecture of the toolkit has."""

    def __init__(self, width: int, classes: int, *, pyramid: bool) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.stem = nn.Sequential(nn.Conv3d(1, width, 3, padding=1), nn.BatchNorm3d(width), nn.LeakyReLU())
        self.squeeze = nn.Sequential(nn.Conv3d(width, 2 * width, 2, 2), nn.GroupNorm(2, 2 * width), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv3d(2 * width, 3 * width, 2, 2), nn.InstanceNorm3d(3 * width, affine=True))
        self.middle = nn.Conv3d(5 * width, 2 * width, 1)
        self.last = nn.Conv3d(3 * width, width, 3, padding=1)
        self.score = nn.Conv3d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        fine = self.stem(x)
        half = self.squeeze(fine)
        deep = self.deep(half)
        middle = self.middle(torch.cat([half, F.interpolate(deep, scale_factor=2.0)], 1))
        last = self.last(torch.cat([fine, F.interpolate(middle, scale_factor=2.0)], 1))
        return [last, middle, deep] if self.pyramid else self.score(last)


def make_network(width: int = 4, classes: int = 2, pyramid: bool = False) -> nn.Module:
    CALLS.append(width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = OwnNetwork(width, classes, pyramid=pyramid)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.running_mean.normal_()
    return network


def make_nothing() -> str:
    return "no network"


class Undecided(nn.Module):
    """A network whose operations depend on values of the input, so that it cannot be exported as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.stem(x) if float(x.mean()) < 0.5 else -self.stem(x)]


def make_undecided() -> nn.Module:
    return Undecided()


def make_stubborn() -> nn.Module:
    raise ValueError("not today")
