"""How large an adapter finds the organs of a query, and the voxels on which that depends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fseft_edge.adapters.blocks import Box, read_block, tiles
from fseft_edge.adapters.network import Adapter
from fseft_edge.runtime.encoder.encoding import EncodedScan

_BLOCK = (64, 64, 32)
_MM3_PER_ML = 1000.0
_FOUND = 0.5


@dataclass(frozen=True)
class Survey:
    """An adapter's probabilities of a whole query, in numbers.

    Attributes:
        sizes: sum of each organ's probabilities as a volume in ml, ``[K]``.
        masks: volume in ml in which each organ's probability exceeds one half, ``[K]``.
        at_border: whether that mask touches the border of the field of view, bool ``[K]``.
        peaks: each organ's greatest probability in every block, ``[blocks, K]``.
    """

    sizes: Tensor
    masks: Tensor
    at_border: Tensor
    peaks: Tensor


def survey_of(adapter: Adapter, query: EncodedScan) -> Survey:
    """Return what an adapter finds in a query, gone through block by block."""
    sums, masks, borders, peaks = [], [], [], []
    with torch.inference_mode():
        for core in _cores(query):
            features = read_block(query.features, adapter.boxes(core), adapter.device)
            probabilities = adapter.probabilities(adapter(features, core))[0, adapter.backgrounds :].cpu()
            found = probabilities > _FOUND
            sums.append(probabilities.sum((1, 2, 3)))
            masks.append(found.sum((1, 2, 3)))
            borders.append(_touches_border(found, core, query.grid.shape))
            peaks.append(probabilities.amax((1, 2, 3)))
    ml = query.grid.voxel_volume_mm3 / _MM3_PER_ML
    return Survey(
        torch.stack(sums).sum(0) * ml,
        torch.stack(masks).sum(0) * ml,
        torch.stack(borders).any(0),
        torch.stack(peaks),
    )


@dataclass(frozen=True)
class VisibleVoxels:
    """The voxels of a query in which some of the organs are visible.

    Attributes:
        organs: which, bool ``[K]``; ``F`` of them.
        features: what the classifiers see there, ``[N, D]``.
        ml: the volume that each stands for.
        rest: those organs' sizes in all other voxels, in ml, ``[F]``.
    """

    organs: Tensor
    features: Tensor
    ml: float
    rest: Tensor

    def rows(self, adapter: Adapter) -> Tensor:
        """Return which classifiers are those of the organs, bool ``[classes]``; the background's is too."""
        return torch.cat([torch.ones(adapter.backgrounds, dtype=torch.bool), self.organs])

    def classifiers(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """Return weight and bias of those classifiers."""
        return adapter.linear_weight()[self.rows(adapter)], adapter.linear_bias()[self.rows(adapter)]

    def sizes(self, adapter: Adapter, weight: Tensor, bias: Tensor) -> Tensor:
        """Return ``Ŝ`` in ml, ``[F]``, by such classifiers; outside these voxels it is what it was."""
        probabilities = adapter.probabilities(self.features @ weight.T + bias)[:, adapter.backgrounds :]
        return self.rest + probabilities.sum(0) * self.ml


def visible_voxels(
    adapter: Adapter, query: EncodedScan, survey: Survey, organs: Tensor, *, visible: float, most: int, seed: int
) -> VisibleVoxels:
    """Gather the voxels in which some of the organs are visible.

    Args:
        adapter: decides what is visible, and what its classifiers see.
        query: the scan.
        survey: of the two.
        organs: which, bool ``[K]``.
        visible: the probability from which one is.
        most: of more voxels as many are drawn at random.
        seed: of that.
    """
    kept, drawn, count = torch.empty(0, len(adapter.linear_weight()[0])), torch.empty(0), 0
    generator = torch.Generator().manual_seed(seed)
    weight, bias = adapter.linear_weight().to(adapter.device), adapter.linear_bias().to(adapter.device)
    organs_there = organs.to(adapter.device)
    with torch.no_grad():
        for core, peaks in zip(_cores(query), survey.peaks, strict=True):
            if float(peaks[organs].amax()) < visible:
                continue
            features = read_block(query.features, adapter.boxes(core), adapter.device)
            here = adapter.penultimate(features, core)[0].flatten(1).T
            probabilities = adapter.probabilities(here @ weight.T + bias)[:, adapter.backgrounds :]
            here = here[probabilities[:, organs_there].amax(1) >= visible].cpu()
            count += len(here)
            kept = torch.cat([kept, here])
            drawn = torch.cat([drawn, torch.rand(len(here), generator=generator)])
            if (
                len(kept) > most
            ):  # those of the lowest numbers stay: a fair sample, and never more than a block too many
                drawn, lowest = drawn.topk(most, largest=False)
                kept = kept[lowest]
    ml = query.grid.voxel_volume_mm3 / _MM3_PER_ML * count / len(kept)
    alone = VisibleVoxels(organs, kept, ml, torch.zeros(int(organs.sum())))
    return replace(alone, rest=survey.sizes[organs] - alone.sizes(adapter, *alone.classifiers(adapter)))


def _cores(query: EncodedScan) -> Iterator[Box]:
    return tiles(query.grid.shape, _BLOCK)


def _touches_border(found: Tensor, core: Box, shape: tuple[int, int, int]) -> Tensor:
    """Return for each organ whether its mask within a block lies at the border of the grid, bool ``[K]``."""
    touches = torch.zeros(len(found), dtype=torch.bool)
    for axis, ((low, high), size) in enumerate(zip(core.ranges, shape, strict=True), start=1):
        if low == 0:
            touches |= found.select(axis, 0).flatten(1).any(1)
        if high == size:
            touches |= found.select(axis, -1).flatten(1).any(1)
    return touches
