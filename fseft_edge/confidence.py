"""How sure adapters are of what they found: the mean probability of an organ's voxels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


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
