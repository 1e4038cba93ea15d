"""What is added to a frozen weight while tuning, and folds into it afterwards, so that inference pays nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRankSum(nn.Module):
    """``W + B A`` with ``A`` ``[rank, columns]`` and ``B`` ``[rows, rank]``, which starts at zero (LoRA).

    Hu et al., ICLR 2022 (arXiv 2106.09685), without the factor ``alpha / r``. A convolution's weight is taken as a
    matrix with one row an output channel.

    Args:
        weight: ``W``, ``[rows, ...]``.
        rank: of the sum.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight[0].numel()))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum, of the weight's shape."""
        return weight + (self.up @ self.down).view_as(weight)


class CentreSum(nn.Module):
    """A 1x1x1 convolution beside a larger one of the same stride: a sum to its kernel's centre; starts at zero.

    Rebuffi et al., CVPR 2018 (arXiv 1803.10082), "parallel residual adapters".

    Args:
        weight: of the convolution, ``[outputs, inputs, n, n, n]`` with an odd ``n``.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(weight.shape[:2]))
        self._margin = weight.shape[-1] // 2

    def forward(self, weight: Tensor) -> Tensor:
        """Return the kernel with its centre changed."""
        beside = self.weight[..., None, None, None]
        return weight + nn.functional.pad(beside, 6 * [self._margin])


def add_sum(module: nn.Module, added: LowRankSum | CentreSum) -> None:
    """Let a module compute with the sum instead of its weight alone, which stays as it is underneath."""
    parametrize.register_parametrization(module, "weight", added)


def fold_sums(network: nn.Module) -> None:
    """Make every sum the weight itself, in place; the network computes the same."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
