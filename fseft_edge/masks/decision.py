"""From probabilities to labels: the organ of each voxel, and the confidence of each organ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adapters.network import Adapter

# The margin below 0.5 is larger than the rounding error of the interpolation of values near 0.5.
_NOT_DECISIVE = 0.5 - 1e-5


@dataclass(frozen=True, eq=False)
class Decided:
    """The labels of a piece of a scan, and the probability of the label of each voxel, with 0 in the background."""

    labels: NDArray[np.uint8] | NDArray[np.uint16]
    probabilities: NDArray[np.float32]


def least_decisive(adapters: Sequence[Adapter]) -> float:
    """Return the threshold up to which the probability of an organ has no effect on the result of :func:`decide`.

    With sigmoid, a voxel with a probability of at most 0.5 is not in a mask. With softmax, the probability of the
    background is the threshold, so that every probability can have an effect and the result is 0.
    """
    return 0.0 if any(adapter.backgrounds for adapter in adapters) else _NOT_DECISIVE


def decide(
    probabilities: NDArray[np.float32], adapters: Sequence[Adapter], dtype: np.dtype[np.uint8] | np.dtype[np.uint16]
) -> Decided:
    """Assign every voxel to the organ with the highest probability, or to the background.

    Args:
        probabilities: probabilities of all classes of all adapters, ``[Σ classes, X, Y, Z]``. With sigmoid, the
            probability of the organ must be above 0.5; with softmax, above the probability of the background.
        adapters: adapters in the order of the classes.
        dtype: type of the labels.
    """
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
            if not here.any():  # probabilities are not computed far from the organ
                continue
            wins = (here > threshold) & (here > best)
            labels[wins] = label
            best[wins] = here[wins]
    return Decided(labels, best)


class ConfidenceTally:
    """Running sums of the probabilities of the voxels of each organ, for the confidence.

    Args:
        organs: number of organs; labels are 1 to ``organs``, and 0 is the background, which is not counted.
    """

    def __init__(self, organs: int) -> None:
        self._voxels = np.zeros(organs + 1, np.int64)
        self._sums = np.zeros(organs + 1)

    def add(self, labels: NDArray[np.unsignedinteger[Any]], probabilities: NDArray[np.float32]) -> None:
        """Add a piece of the scan, plane by plane, so that only one plane needs additional memory.

        Args:
            labels: label of each voxel, ``[X, Y, Z]``.
            probabilities: probability of the label of each voxel, ``[X, Y, Z]``.
        """
        for plane, probability in zip(labels, probabilities, strict=True):
            in_organ = plane > 0
            if in_organ.any():
                label = plane[in_organ]
                self._voxels += np.bincount(label, minlength=self._voxels.size)
                self._sums += np.bincount(label, probability[in_organ], minlength=self._sums.size)

    def means(self) -> tuple[float | None, ...]:
        """Return the mean probability of the voxels of each organ; None for an organ without voxels."""
        counted = zip(self._sums[1:].tolist(), self._voxels[1:].tolist(), strict=True)
        return tuple(total / voxels if voxels else None for total, voxels in counted)
