"""From probabilities to labels: the organ of each voxel, and the confidence of each organ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adapters.network import Adapter
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.source_pieces import Decisive, SourcePart, SourcePiece

_ROUNDING = 1e-5
"""This margin is larger than the rounding error of the interpolation of probabilities."""


def decisive_in(adapters: Sequence[Adapter]) -> Decisive:
    """Return the function that tells in which voxels of the grid a probability can have an effect on the labels.

    An interpolated value lies between those of its neighbours. With sigmoid, a voxel of the scan can belong to an organ
    only if the probability of the organ is above 0.5 in a neighbour on the grid; with softmax, only if it is above that
    of the background there. A voxel of the background class has an effect where one of an organ has.
    """

    def decisive(section: NDArray[np.float32]) -> list[NDArray[np.bool_] | None]:
        found: list[NDArray[np.bool_] | None] = []
        for adapter in adapters:
            first = len(found)
            classes = section[first : first + adapter.classes]
            if adapter.backgrounds:
                organs = classes[1:] > np.maximum(classes[0] - np.float32(_ROUNDING), 0.0)
                found += [organs.any(axis=0), *organs]
            else:
                least = np.float32(0.5 - _ROUNDING)
                found += [organ > least if organ.max() > least else None for organ in classes]
        return found

    return decisive


class Decision:
    """The labels of a scan and the confidence of its organs, decided piece by piece.

    Every voxel belongs to the organ with the highest probability, or to the background. With sigmoid, the probability
    of the organ must be above 0.5; with softmax, above the probability of the background. The first of two organs with
    the same probability has the voxel.

    Args:
        grid: grid of the scan.
        adapters: adapters in the order of the classes.
    """

    def __init__(self, grid: Grid, adapters: Sequence[Adapter]) -> None:
        # The labels are stored slice by slice, so that a slice is contiguous in memory.
        x, y, z = (axis.source_length for axis in grid.axes)
        self._order = grid.stored_order
        self._activations = [(adapter.classes, adapter.backgrounds) for adapter in adapters]
        organs = sum(classes - backgrounds for classes, backgrounds in self._activations)
        self._stacked = np.zeros((z, y, x), np.uint8 if organs < 256 else np.uint16)
        self._best = np.empty((y, x), np.float32)
        self._tally = ConfidenceTally(organs)

    @property
    def labels(self) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """Label of each voxel ``[X, Y, Z]`` on the lattice of the scan, 1..K, 0 for the background."""
        return self._stacked.transpose(self._order)

    def confidence(self) -> tuple[float | None, ...]:
        """Return the mean probability of the voxels of each organ; None for an organ without voxels."""
        return self._tally.means()

    def add(self, piece: SourcePiece) -> None:
        """Decide the voxels of a piece. A piece must be added only once."""
        for index, labels in enumerate(self._stacked[piece.start : piece.stop]):
            parts = {part.channel: part for part in piece.parts if part.index == index}
            if parts:
                self._decide(labels, parts)

    def _decide(self, labels: NDArray[np.unsignedinteger[Any]], parts: dict[int, SourcePart]) -> None:
        y = slice(min(part.y.start for part in parts.values()), max(part.y.stop for part in parts.values()))
        x = slice(min(part.x.start for part in parts.values()), max(part.x.stop for part in parts.values()))
        self._best[y, x] = 0.0
        channel, label = 0, 0
        for classes, backgrounds in self._activations:
            background = parts.get(channel) if backgrounds else None
            for organ in range(channel + backgrounds, channel + classes):
                label += 1
                part = parts.get(organ)
                if part is None:
                    continue
                threshold: NDArray[np.float32] | float = 0.5
                if background is not None:
                    inside_y = slice(part.y.start - background.y.start, part.y.stop - background.y.start)
                    inside_x = slice(part.x.start - background.x.start, part.x.stop - background.x.start)
                    threshold = background.probabilities[inside_y, inside_x]
                best = self._best[part.y, part.x]
                wins = part.probabilities > threshold
                wins &= part.probabilities > best
                np.copyto(labels[part.y, part.x], label, where=wins)
                np.copyto(best, part.probabilities, where=wins)
            channel += classes
        self._tally.add(labels[y, x], self._best[y, x])


class ConfidenceTally:
    """Running sums of the probabilities of the voxels of each organ, for the confidence.

    Args:
        organs: number of organs; labels are 1 to ``organs``, and 0 is the background, which is not counted.
    """

    def __init__(self, organs: int) -> None:
        self._voxels = np.zeros(organs + 1, np.int64)
        self._sums = np.zeros(organs + 1)

    def add(self, labels: NDArray[np.unsignedinteger[Any]], probabilities: NDArray[np.float32]) -> None:
        """Add voxels of the scan.

        Args:
            labels: label of each voxel.
            probabilities: probability of the label of each voxel, in the shape of the labels.
        """
        in_organ = np.flatnonzero(labels)
        label = labels.ravel()[in_organ]
        self._voxels += np.bincount(label, minlength=self._voxels.size)
        self._sums += np.bincount(label, probabilities.ravel()[in_organ], minlength=self._sums.size)

    def means(self) -> tuple[float | None, ...]:
        """Return the mean probability of the voxels of each organ; None for an organ without voxels."""
        counted = zip(self._sums[1:].tolist(), self._voxels[1:].tolist(), strict=True)
        return tuple(total / voxels if voxels else None for total, voxels in counted)
