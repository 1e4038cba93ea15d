"""Means and standard deviations of the channels of an encoder, with which adapters normalise features."""

from __future__ import annotations

import torch
from torch import Tensor

from fseft_edge.adapters.network import Adapter

_LEAST_SHARE = 1e-3


class FeatureStatistics:
    """Running sums of features, for the means and standard deviations of an adapter.

    Args:
        adapter: adapter whose normalisation is set by :meth:`apply`.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._sums = [torch.zeros(2, level.channels, dtype=torch.float64) for level in adapter.levels]
        self._counts = [0] * len(adapter.levels)

    def add(self, level: int, values: Tensor) -> None:
        """Add the features ``[C_l, n]`` of a level to the sums."""
        values = values.double()
        self._sums[level] += torch.stack([values.sum(1), values.square().sum(1)]).cpu()
        self._counts[level] += values.shape[1]

    def apply(self) -> None:
        """Set the means and the scales of the adapter. Each scale is at least 0.001 of the largest of its level."""
        for level, (total, squares) in enumerate(self._sums):
            mean = total / self._counts[level]
            deviation = (squares / self._counts[level] - mean.square()).clamp_min(0).sqrt()
            self._adapter.mean(level).copy_(mean)
            self._adapter.scale(level).copy_(deviation.clamp_min(_LEAST_SHARE * float(deviation.max().clamp_min(1e-6))))
