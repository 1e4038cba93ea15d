"""Terms that are added to frozen weights during fine-tuning, and folded into the weights afterwards.

After folding, inference is as fast as without these terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRankSum(nn.Module):
    """LoRA: the sum ``W + B A`` with ``A`` ``[rank, columns]`` and ``B`` ``[rows, rank]``; ``B`` starts at zero.

    Source: Hu et al., ICLR 2022 (arXiv 2106.09685), here without the factor ``alpha / r``. The weight of a convolution
    is treated as a matrix with one row per output channel.

    Args:
        weight: the frozen weight ``W``, ``[rows, ...]``.
        rank: rank of ``B A``.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight[0].numel()))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum, in the shape of the weight."""
        return weight + (self.up @ self.down).view_as(weight)


class CentreSum(nn.Module):
    """A 1x1x1 convolution parallel to a larger convolution of equal stride; it starts at zero.

    The 1x1x1 kernel is added to the centre of the larger kernel. Source: Rebuffi et al., CVPR 2018 (arXiv 1803.10082),
    "parallel residual adapters".

    Args:
        weight: weight of the larger convolution, ``[outputs, inputs, n, n, n]`` with an odd ``n``.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(weight.shape[:2]))
        self._margin = weight.shape[-1] // 2

    def forward(self, weight: Tensor) -> Tensor:
        """Return the larger kernel with the 1x1x1 kernel added to its centre."""
        beside = self.weight[..., None, None, None]
        return weight + nn.functional.pad(beside, 6 * [self._margin])


def add_sum(module: nn.Module, added: LowRankSum | CentreSum) -> None:
    """Replace the weight of a module by the sum of the weight and the added term; the weight itself is unchanged."""
    parametrize.register_parametrization(module, "weight", added)


def fold_sums(network: nn.Module) -> None:
    """Replace every sum by a plain weight of equal value, in place; the network's output does not change."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
