"""From probabilities to labels: which organ each voxel is given to, and how sure the adapters were of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adapters.network import Adapter

# Below one half by more than what rounding adds where values near it are interpolated.
_NOT_DECISIVE = 0.5 - 1e-5


@dataclass(frozen=True, eq=False)
class Decided:
    """Labels of a piece of a scan, and the probability of each voxel's label, 0 in the background."""

    labels: NDArray[np.uint8] | NDArray[np.uint16]
    probabilities: NDArray[np.float32]


def least_decisive(adapters: Sequence[Adapter]) -> float:
    """Return the probability up to which an organ's probability cannot matter to :func:`decide`.

    With sigmoid, what does not exceed one half is in no mask. With softmax the background decides: anything matters.
    """
    return 0.0 if any(adapter.backgrounds for adapter in adapters) else _NOT_DECISIVE


def decide(
    probabilities: NDArray[np.float32], adapters: Sequence[Adapter], dtype: np.dtype[np.uint8] | np.dtype[np.uint16]
) -> Decided:
    """Give every voxel to its most probable organ: above 1/2 (sigmoid), or above the background (softmax)."""
    labels = np.zeros(probabilities.shape[1:], dtype)
    best = np.zeros(probabilities.shape[1:], np.float32)
    channel, label = 0, 0
    for adapter in adapters:
        threshold: NDArray[np.float32] | float = 0.5
        if adapter.backgrounds:
            threshold = probabilities[channel]
            channel += 1
        for _ in range(adapter.classes - adapter.backgrounds):
            label += 1
            here = probabilities[channel]
            channel += 1
            if not here.any():  # far from the organ nothing was computed
                continue
            wins = (here > threshold) & (here > best)
            labels[wins] = label
            best[wins] = here[wins]
    return Decided(labels, best)


class ConfidenceTally:
    """Sums up, piece by piece, the probabilities with which voxels were given to organs.

    Args:
        organs: labels are 1 to ``organs``; 0 is background and does not count.
    """

    def __init__(self, organs: int) -> None:
        self._voxels = np.zeros(organs + 1, np.int64)
        self._sums = np.zeros(organs + 1)

    def add(self, labels: NDArray[np.unsignedinteger[Any]], probabilities: NDArray[np.float32]) -> None:
        """Take in a piece ``[X, Y, Z]``: the label of each voxel, and the probability of that label.

        It goes plane by plane, so that what has to be held beside the piece is small even where organs fill it.
        """
        for plane, probability in zip(labels, probabilities, strict=True):
            found = plane > 0
            if found.any():
                label = plane[found]
                self._voxels += np.bincount(label, minlength=self._voxels.size)
                self._sums += np.bincount(label, probability[found], minlength=self._sums.size)

    def means(self) -> tuple[float | None, ...]:
        """Return each organ's mean probability; None of one that has no voxel."""
        counted = zip(self._sums[1:].tolist(), self._voxels[1:].tolist(), strict=True)
        return tuple(total / voxels if voxels else None for total, voxels in counted)
