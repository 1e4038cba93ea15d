"""A small encoder session, and helpers for tests of streaming."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.encoder.streaming import FeatureSection, stream_features
from fseft_edge.runtime.encoder.windows import WindowLayout


class FakeSession:
    """An encoder session with one convolution per level, whose zero padding makes features depend on the window."""

    device = "cpu"
    window = (32, 16, 24)
    levels = (FeatureLevel(1, 3), FeatureLevel(2, 4), FeatureLevel(8, 5))

    def __init__(self, max_batch: int = 3) -> None:
        self.max_batch = max_batch
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self._convolutions = [
                nn.Conv3d(1, level.channels, 2 * level.stride + 1, level.stride, level.stride) for level in self.levels
            ]

    @torch.inference_mode()
    def encode(self, windows: Tensor) -> list[Tensor]:
        assert windows.shape[1:] == (1, *self.window)
        assert len(windows) <= self.max_batch
        return [torch.relu(convolution(windows)) for convolution in self._convolutions]


def scan(shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def padded(image: NDArray[np.float32], layout: WindowLayout) -> Tensor:
    result = torch.zeros(layout.padded_shape)
    result[tuple(slice(size) for size in image.shape)] = torch.from_numpy(image)
    return result


def streamed(image: NDArray[np.float32], layout: WindowLayout, session: Any, **how: Any) -> list[FeatureSection]:
    return list(stream_features(lambda z0, z1: image[:, :, z0:z1], layout, session, **how))


def joined(sections: list[FeatureSection]) -> list[Tensor]:
    return [torch.cat(pieces, dim=-1) for pieces in zip(*(section.levels for section in sections), strict=True)]
