"""What can be inserted into the blocks of a transformer: AdaptFormer and Compacter.

AdaptFormer: Chen et al., arXiv 2205.13535, as in FSEFT's released code (rank 16, scale 0.1). Compacter: Karimi Mahabadi
et al., arXiv 2106.04647; the transformer's layer normalisations are meant to be trained along with it. Both start as
the identity.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_RANK, _SCALE = 16, 0.1  # of AdaptFormer
_HYPERCOMPLEX = 4  # n of the Compacter paper
_REDUCTION = 32  # of Compacter's bottleneck


class BlockPlace(NamedTuple):
    """Which block of a transformer: its stage and its position there, both from 0."""

    stage: int
    position: int


class BlockInsert:
    """What changes one transformer block; tokens are ``[..., C]``."""

    def attended(self, attended: Tensor) -> Tensor:
        """Return what is added to the tokens in place of the attention's output."""
        return attended

    @abstractmethod
    def perceived(self, x: Tensor, perceived: Tensor) -> Tensor:
        """Return what is added to the tokens ``x`` in place of the perceptron's output."""


class BlockInserts(nn.Module):
    """What is inserted into all blocks of a network, registered there under its ``name``.

    Args:
        widths: channels of each block.
    """

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, widths: Mapping[BlockPlace, int]) -> None:
        super().__init__()

    @abstractmethod
    def at(self, place: BlockPlace) -> BlockInsert:
        """Return what is inserted into one block."""


class AdaptFormer(BlockInserts):
    """A bottleneck beside every perceptron: ``mlp(norm(x)) + s up(relu(down(x)))``."""

    name = "adaptformer"

    def __init__(self, widths: Mapping[BlockPlace, int]) -> None:
        super().__init__(widths)
        self.blocks = nn.ModuleDict({_key(place): _Bottleneck(width) for place, width in widths.items()})

    def at(self, place: BlockPlace) -> BlockInsert:
        """Return what is inserted into one block."""
        return cast(_Bottleneck, self.blocks[_key(place)])


class Compacter(BlockInserts):
    """Hypercomplex bottlenecks behind every attention and perceptron.

    ``y + up(gelu(down(y)))``, whose two matrices are sums of Kronecker products ``A_i x s_i t_i^T``; the matrices A_i,
    the ``rule``, are the same throughout the network.
    """

    name = "compacter"

    def __init__(self, widths: Mapping[BlockPlace, int]) -> None:
        super().__init__(widths)
        # With Glorot's s and t, down-projections start at about Glorot's variance.
        self.rule = nn.Parameter(torch.randn(_HYPERCOMPLEX, _HYPERCOMPLEX, _HYPERCOMPLEX) / _HYPERCOMPLEX)
        self.attention = nn.ModuleDict({_key(place): _Hypercomplex(width) for place, width in widths.items()})
        self.perceptron = nn.ModuleDict({_key(place): _Hypercomplex(width) for place, width in widths.items()})

    def at(self, place: BlockPlace) -> BlockInsert:
        """Return what is inserted into one block."""
        adapters = (cast(_Hypercomplex, parts[_key(place)]) for parts in (self.attention, self.perceptron))
        return _CompacterInBlock(self.rule, *adapters)


def block_inserts(network: nn.Module) -> BlockInserts | None:
    """Return what was inserted into a network's blocks."""
    inserted = (getattr(network, kind.name, None) for kind in (AdaptFormer, Compacter))
    return next((inserts for inserts in inserted if inserts is not None), None)


def _key(place: BlockPlace) -> str:
    return f"{place.stage}_{place.position}"


class _Bottleneck(nn.Module, BlockInsert):
    """AdaptFormer's part in one block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, _RANK), nn.Linear(_RANK, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for values in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(values)

    def perceived(self, x: Tensor, perceived: Tensor) -> Tensor:
        beside: Tensor = self.up(torch.relu(self.down(x)))
        return perceived + _SCALE * beside


class _CompacterInBlock(BlockInsert):
    """Compacter's part in one block, with the rule that all share."""

    def __init__(self, rule: Tensor, attention: _Hypercomplex, perceptron: _Hypercomplex) -> None:
        self._rule, self._attention, self._perceptron = rule, attention, perceptron

    def attended(self, attended: Tensor) -> Tensor:
        return self._attention.adapted(attended, self._rule)

    def perceived(self, x: Tensor, perceived: Tensor) -> Tensor:  # noqa: ARG002 - Compacter reads the output alone
        return self._perceptron.adapted(perceived, self._rule)


class _Hypercomplex(nn.Module):
    """A bottleneck with a residual: ``y + up(gelu(down(y)))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        bottleneck = max(width // _REDUCTION // _HYPERCOMPLEX, 1) * _HYPERCOMPLEX
        self.down, self.up = HypercomplexLinear(width, bottleneck), HypercomplexLinear(bottleneck, width)
        # One factor at zero makes the product zero; the other stays, so that this one has a gradient.
        nn.init.zeros_(self.up.right)

    def adapted(self, y: Tensor, rule: Tensor) -> Tensor:
        change: Tensor = self.up(F.gelu(self.down(y, rule)), rule)
        return y + change


class HypercomplexLinear(nn.Module):
    """A linear map whose matrix is ``sum_i A_i x s_i t_i^T``, with Kronecker products; low rank, hypercomplex.

    Args:
        inputs: channels, a multiple of n = 4.
        outputs: channels, a multiple of n.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(_HYPERCOMPLEX, inputs // _HYPERCOMPLEX))
        self.right = nn.Parameter(torch.empty(_HYPERCOMPLEX, outputs // _HYPERCOMPLEX))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for factor in (self.left, self.right):
            bound = math.sqrt(6 / (factor.shape[1] + 1))  # Glorot's, of a column
            nn.init.uniform_(factor, -bound, bound)

    def matrix(self, rule: Tensor) -> Tensor:
        """Return the matrix ``[inputs, outputs]``; ``rule`` is A, ``[n, n, n]``."""
        # Plain products and a sum, because not every engine has an einsum of three factors.
        factors = self.left[:, :, None] * self.right[:, None, :]
        products = rule[:, :, None, :, None] * factors[:, None, :, None, :]
        return products.sum(0).reshape(-1, self.bias.shape[0])

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        """Return ``[..., outputs]`` of ``x`` ``[..., inputs]``."""
        return x @ self.matrix(rule) + self.bias
