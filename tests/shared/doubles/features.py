"""A small feature map in memory, for tests of code that reads features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fseft_edge.runtime.encoder.networks.base import FeatureLevel


@dataclass(frozen=True)
class MemoryFeatures:
    """A feature map in memory with the interface of a feature map of the store: one ``[C_l, X, Y, Z]`` per level."""

    tensors: tuple[Tensor, ...]

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        return tuple(FeatureLevel(2**index, tensor.shape[0]) for index, tensor in enumerate(self.tensors))

    @property
    def padded_shape(self) -> tuple[int, int, int]:
        x, y, z = self.tensors[0].shape[1:]
        return x, y, z

    def read(self, level: int, x: tuple[int, int], y: tuple[int, int], z: tuple[int, int]) -> Tensor:
        return self.tensors[level][:, slice(*x), slice(*y), slice(*z)]


def random_features(shape: tuple[int, int, int], channels: tuple[int, ...], seed: int = 0) -> MemoryFeatures:
    """Return a feature map of random noise; ``shape`` must be a multiple of the coarsest stride."""
    generator = torch.Generator().manual_seed(seed)
    return MemoryFeatures(
        tuple(
            torch.randn(count, *(size >> level for size in shape), generator=generator)
            for level, count in enumerate(channels)
        )
    )
