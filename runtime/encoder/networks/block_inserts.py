"""Inserts for the blocks of a transformer: AdaptFormer and Compacter.

AdaptFormer: Chen et al., arXiv 2205.13535, as in FSEFT's released code (rank 16, scale 0.1). Compacter: Karimi Mahabadi
et al., arXiv 2106.04647; the transformer's layer normalisations are trained together with Compacter. Before training,
both inserts do not change the features.
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
_HYPERCOMPLEX = 4  # n in the Compacter paper
_REDUCTION = 32  # reduction factor of Compacter's bottleneck


class BlockPlace(NamedTuple):
    """Position of a block in a transformer: its stage and its index in the stage, both from 0."""

    stage: int
    position: int


class BlockInsert:
    """Insert that changes the outputs of attention and MLP in one transformer block; tokens are ``[..., C]``."""

    def attention_output(self, output: Tensor) -> Tensor:
        """Return the changed output of the attention."""
        return output

    @abstractmethod
    def mlp_output(self, tokens: Tensor, output: Tensor) -> Tensor:
        """Return the changed output of the MLP, where ``tokens`` are the tokens before normalisation and MLP."""


class BlockInserts(nn.Module):
    """Inserts of all blocks of a network; the network registers this module under the name ``name``.

    Args:
        widths: number of channels of each block.
    """

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, widths: Mapping[BlockPlace, int]) -> None:
        super().__init__()

    @abstractmethod
    def at(self, place: BlockPlace) -> BlockInsert:
        """Return the insert of one block."""


class AdaptFormer(BlockInserts):
    """AdaptFormer: a bottleneck parallel to every MLP, ``mlp(norm(x)) + s up(relu(down(x)))``."""

    name = "adaptformer"

    def __init__(self, widths: Mapping[BlockPlace, int]) -> None:
        super().__init__(widths)
        self.blocks = nn.ModuleDict({_key(place): _Bottleneck(width) for place, width in widths.items()})

    def at(self, place: BlockPlace) -> BlockInsert:
        """Return the insert of one block."""
        return cast(_Bottleneck, self.blocks[_key(place)])


class Compacter(BlockInserts):
    """Compacter: hypercomplex bottlenecks after every attention and MLP, ``y + up(gelu(down(y)))``.

    The matrices of ``down`` and ``up`` are sums of Kronecker products ``A_i x s_i t_i^T``. All bottlenecks of the
    network share the matrices A_i, called ``rule``.
    """

    name = "compacter"

    def __init__(self, widths: Mapping[BlockPlace, int]) -> None:
        super().__init__(widths)
        # Together with Glorot initialisation of s and t, the down-projections start with about Glorot's variance.
        self.rule = nn.Parameter(torch.randn(_HYPERCOMPLEX, _HYPERCOMPLEX, _HYPERCOMPLEX) / _HYPERCOMPLEX)
        self.attention = nn.ModuleDict({_key(place): _Hypercomplex(width) for place, width in widths.items()})
        self.perceptron = nn.ModuleDict({_key(place): _Hypercomplex(width) for place, width in widths.items()})

    def at(self, place: BlockPlace) -> BlockInsert:
        """Return the insert of one block."""
        adapters = (cast(_Hypercomplex, parts[_key(place)]) for parts in (self.attention, self.perceptron))
        return _CompacterInBlock(self.rule, *adapters)


def block_inserts(network: nn.Module) -> BlockInserts | None:
    """Return the inserts in a network's blocks, or None."""
    inserted = (getattr(network, kind.name, None) for kind in (AdaptFormer, Compacter))
    return next((inserts for inserts in inserted if inserts is not None), None)


def _key(place: BlockPlace) -> str:
    return f"{place.stage}_{place.position}"


class _Bottleneck(nn.Module, BlockInsert):
    """Insert of AdaptFormer in one block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, _RANK), nn.Linear(_RANK, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for values in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(values)

    def mlp_output(self, tokens: Tensor, output: Tensor) -> Tensor:
        parallel: Tensor = self.up(torch.relu(self.down(tokens)))
        return output + _SCALE * parallel


class _CompacterInBlock(BlockInsert):
    """Insert of Compacter in one block, with the shared rule."""

    def __init__(self, rule: Tensor, attention: _Hypercomplex, perceptron: _Hypercomplex) -> None:
        self._rule, self._attention, self._perceptron = rule, attention, perceptron

    def attention_output(self, output: Tensor) -> Tensor:
        return self._attention.adapted(output, self._rule)

    def mlp_output(self, tokens: Tensor, output: Tensor) -> Tensor:  # noqa: ARG002 - Compacter only uses the output
        return self._perceptron.adapted(output, self._rule)


class _Hypercomplex(nn.Module):
    """A bottleneck with a residual connection: ``y + up(gelu(down(y)))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        bottleneck = max(width // _REDUCTION // _HYPERCOMPLEX, 1) * _HYPERCOMPLEX
        self.down, self.up = HypercomplexLinear(width, bottleneck), HypercomplexLinear(bottleneck, width)
        # A zero factor makes the product zero. The other factor is not zero, so that the zero factor has a gradient.
        nn.init.zeros_(self.up.right)

    def adapted(self, y: Tensor, rule: Tensor) -> Tensor:
        change: Tensor = self.up(F.gelu(self.down(y, rule)), rule)
        return y + change


class HypercomplexLinear(nn.Module):
    """A linear map with the matrix ``sum_i A_i x s_i t_i^T``, where x is the Kronecker product.

    Args:
        inputs: number of input channels, a multiple of n = 4.
        outputs: number of output channels, a multiple of n = 4.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(_HYPERCOMPLEX, inputs // _HYPERCOMPLEX))
        self.right = nn.Parameter(torch.empty(_HYPERCOMPLEX, outputs // _HYPERCOMPLEX))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for factor in (self.left, self.right):
            bound = math.sqrt(6 / (factor.shape[1] + 1))  # Glorot's bound for a matrix with one column
            nn.init.uniform_(factor, -bound, bound)

    def matrix(self, rule: Tensor) -> Tensor:
        """Return the matrix ``[inputs, outputs]``; ``rule`` contains the matrices A_i, ``[n, n, n]``."""
        # Products and a sum are used, because some engines do not support an einsum of three factors.
        factors = self.left[:, :, None] * self.right[:, None, :]
        products = rule[:, :, None, :, None] * factors[:, None, :, None, :]
        return products.sum(0).reshape(-1, self.bias.shape[0])

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        """Return the mapped tokens ``[..., outputs]`` of ``x`` ``[..., inputs]``."""
        return x @ self.matrix(rule) + self.bias
