"""Prediction: from cached features to probabilities on the grid, and to labels on the lattice of the scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fseft_edge.adapters.blocks import Box, read_block, tiles
from fseft_edge.adapters.network import Adapter
from fseft_edge.masks.decision import Decision, decisive_in
from fseft_edge.masks.memory_plan import AMPLE, MemoryPlan
from fseft_edge.runtime.encoder.encoding import EncodedScan
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.source_pieces import SourcePiece


@dataclass(frozen=True, eq=False)
class DecidedScan:
    """The labels of all voxels of a scan, and the confidence of each organ.

    Attributes:
        labels: labels ``[X, Y, Z]`` on the lattice of the scan, 1..K in the order of the adapters and their organs.
        confidence: mean probability of the voxels of each organ; None for an organ without voxels.
    """

    labels: NDArray[np.uint8] | NDArray[np.uint16]
    confidence: tuple[float | None, ...]


def segment_encoded(
    encoded: EncodedScan, adapters: Sequence[Adapter], plan: MemoryPlan = AMPLE
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return the labels ``[X, Y, Z]`` of an encoded scan on its lattice, 1..K in the order of the adapters' organs."""
    return decide_encoded(encoded, adapters, plan).labels


def decide_encoded(
    encoded: EncodedScan,
    adapters: Sequence[Adapter],
    plan: MemoryPlan = AMPLE,
    keep: Callable[[SourcePiece], None] | None = None,
) -> DecidedScan:
    """Return the labels of an encoded scan on its lattice, and the confidence of each organ.

    Args:
        encoded: encoded scan.
        adapters: adapters that segment the scan.
        plan: sizes of the pieces in which the mask is computed.
        keep: receives every piece of the scan with all its probabilities. None computes probabilities only where they
            can have an effect on the labels.
    """
    return decide_sections(encoded.grid, predict_sections(encoded, adapters, plan), adapters, keep)


def decide_sections(
    grid: Grid,
    sections: Iterator[tuple[int, NDArray[np.float32]]],
    adapters: Sequence[Adapter],
    keep: Callable[[SourcePiece], None] | None = None,
) -> DecidedScan:
    """Return the labels of a scan from the probabilities on its grid, as :func:`decide_encoded` does.

    Args:
        grid: grid of the scan.
        sections: probabilities on the grid, as :func:`predict_sections` yields them.
        adapters: adapters in the order of the classes.
        keep: receives every piece of the scan with all its probabilities.
    """
    decision = Decision(grid, adapters)
    for piece in grid.to_source(sections, decisive_in(adapters), complete=keep is not None):
        if keep is not None:
            keep(piece)
        decision.add(piece)
    return DecidedScan(decision.labels, decision.confidence())


def predict_sections(
    encoded: EncodedScan, adapters: Sequence[Adapter], plan: MemoryPlan = AMPLE
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the probabilities on the grid, slab by slab.

    Yields:
        The first slice of the slab, and its probabilities, float32 ``[Σ classes, X, Y, n]``, with the classes in the
        order of the adapters.
    """
    classes = [adapter.classes for adapter in adapters]
    x, y, z = encoded.grid.shape
    for start in range(0, z, plan.slab):
        depth = min(plan.slab, z - start)
        slab = np.empty((sum(classes), x, y, depth), np.float32)
        for tile in tiles((x, y, depth), (plan.tile, plan.tile, plan.slab)):
            core = Box(tile.x, tile.y, (start, start + depth))
            first = 0
            for adapter, count in zip(adapters, classes, strict=True):
                probabilities = predict_block(adapter, encoded, core)
                slab[first : first + count, slice(*tile.x), slice(*tile.y)] = probabilities
                first += count
        yield start, slab


def predict_block(adapter: Adapter, encoded: EncodedScan, core: Box) -> NDArray[np.float32]:
    """Return the probabilities of an adapter in a box of the grid, float32 ``[classes, *core.shape]``."""
    with torch.inference_mode():
        features = read_block(encoded.features, adapter.boxes(core), adapter.device)
        probabilities: NDArray[np.float32] = adapter.probabilities(adapter(features, core))[0].cpu().numpy()
    return probabilities
