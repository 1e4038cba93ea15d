"""Organ sizes that an adapter predicts in a query, and the voxels that these sizes depend on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fseft_edge.adapters.blocks import Box, read_block, tiles
from fseft_edge.adapters.network import Adapter
from fseft_edge.runtime.encoder.encoding import EncodedScan
from fseft_edge.runtime.encoder.feature_map import Features

BLOCK = (64, 64, 32)
"""Usual size of the blocks in which a query is read, in voxels."""
_MM3_PER_ML = 1000.0
_MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class Survey:
    """Statistics of the probabilities of an adapter over a complete query.

    Attributes:
        sizes: sum of the probabilities of each organ, as a volume in ml, ``[K]``.
        masks: volume of the mask of each organ (probability above 0.5) in ml, ``[K]``.
        at_border: True if the mask of the organ touches the border of the field of view, bool ``[K]``.
        peaks: largest probability of each organ in every block, ``[blocks, K]``.
    """

    sizes: Tensor
    masks: Tensor
    at_border: Tensor
    peaks: Tensor


def survey_of(adapter: Adapter, query: EncodedScan) -> Survey:
    """Return the statistics of the probabilities of an adapter over a query. The query is read block by block."""
    sums, masks, borders, peaks = [], [], [], []
    with torch.inference_mode():
        for core in cores_of([whole(query)]):
            features = read_block(query.features, adapter.boxes(core), adapter.device)
            probabilities = adapter.probabilities(adapter(features, core))[0, adapter.backgrounds :].cpu()
            mask = probabilities > _MASK_THRESHOLD
            sums.append(probabilities.sum((1, 2, 3)))
            masks.append(mask.sum((1, 2, 3)))
            borders.append(touches_border(mask, core, query.grid.shape))
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
    """The voxels of a query in which at least one of the selected organs is visible, or a random sample of them.

    Attributes:
        organs: True for the selected organs, bool ``[K]``; ``F`` organs are selected.
        features: input of the classifiers in these voxels, ``[N, D]``.
        ml: volume in ml that each of these voxels represents.
        rest: size of each selected organ in all other voxels of the query, in ml, ``[F]``.
    """

    organs: Tensor
    features: Tensor
    ml: float
    rest: Tensor

    def rows(self, adapter: Adapter) -> Tensor:
        """Return True for the classifiers of the selected organs and of the background, bool ``[classes]``."""
        return torch.cat([torch.ones(adapter.backgrounds, dtype=torch.bool), self.organs])

    def classifiers(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the classifiers of the selected organs and of the background."""
        return adapter.linear_weight()[self.rows(adapter)], adapter.linear_bias()[self.rows(adapter)]

    def sizes(self, adapter: Adapter, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the sizes ``Ŝ`` in ml, ``[F]``, for changed classifiers. The sizes in all other voxels stay constant.

        Args:
            adapter: adapter that computes probabilities from logits.
            weight: changed weight of the classifiers of :meth:`classifiers`.
            bias: changed bias of the classifiers of :meth:`classifiers`.
        """
        probabilities = adapter.probabilities(self.features @ weight.T + bias)[:, adapter.backgrounds :]
        return self.rest + probabilities.sum(0) * self.ml


def visible_voxels(
    adapter: Adapter, query: EncodedScan, survey: Survey, organs: Tensor, *, visible: float, most: int, seed: int
) -> VisibleVoxels:
    """Collect the voxels of a query in which at least one of the selected organs is visible.

    Args:
        adapter: adapter that computes the probabilities and the input of the classifiers.
        query: scan to segment.
        survey: statistics of this adapter over this query.
        organs: True for the selected organs, bool ``[K]``.
        visible: smallest probability at which an organ counts as visible.
        most: maximum number of voxels; if more voxels are visible, a random sample of this number is kept.
        seed: seed for the random sample.
    """
    kept, drawn, count = torch.empty(0, len(adapter.linear_weight()[0])), torch.empty(0), 0
    generator = torch.Generator().manual_seed(seed)
    weight, bias = adapter.linear_weight().to(adapter.device), adapter.linear_bias().to(adapter.device)
    organs_on_device = organs.to(adapter.device)
    with torch.no_grad():
        for core, peaks in zip(cores_of([whole(query)]), survey.peaks, strict=True):
            if float(peaks[organs].amax()) < visible:
                continue
            features = read_block(query.features, adapter.boxes(core), adapter.device)
            inputs = adapter.penultimate(features, core)[0].flatten(1).T
            probabilities = adapter.probabilities(inputs @ weight.T + bias)[:, adapter.backgrounds :]
            inputs = inputs[probabilities[:, organs_on_device].amax(1) >= visible].cpu()
            count += len(inputs)
            kept = torch.cat([kept, inputs])
            drawn = torch.cat([drawn, torch.rand(len(inputs), generator=generator)])
            # Keep the voxels with the lowest random numbers. This is an unbiased sample, and memory never holds more
            # than one block in addition to the sample.
            if len(kept) > most:
                drawn, lowest = drawn.topk(most, largest=False)
                kept = kept[lowest]
    ml = query.grid.voxel_volume_mm3 / _MM3_PER_ML * count / len(kept)
    without_rest = VisibleVoxels(organs, kept, ml, torch.zeros(int(organs.sum())))
    sizes_inside = without_rest.sizes(adapter, *without_rest.classifiers(adapter))
    return replace(without_rest, rest=survey.sizes[organs] - sizes_inside)


def log_odds_in(
    adapter: Adapter, features: Features, boxes: Sequence[Box], block: tuple[int, int, int] = BLOCK
) -> Iterator[tuple[Box, Tensor]]:
    """Yield the log odds of each organ block by block: the box of the block, and ``[K, X, Y, Z]`` on the CPU.

    Args:
        adapter: adapter with sigmoid activation.
        features: feature map of a scan.
        boxes: boxes of the grid that the blocks cover.
        block: largest size of a block.
    """
    with torch.inference_mode():
        for core in cores_of(boxes, block):
            yield core, adapter(read_block(features, adapter.boxes(core), adapter.device), core)[0].cpu()


def voxels_above(log_odds: Tensor, thresholds: Tensor) -> Tensor:
    """Return the number of voxels of each organ whose log odds are above each threshold, ``[K, T]``, int64.

    Args:
        log_odds: ``[K, X, Y, Z]``.
        thresholds: ascending log odds, ``[T]``.
    """
    counts = []
    for of_organ in log_odds:
        near = of_organ[of_organ > thresholds[0]]
        # A voxel with the index i is above i thresholds.
        above = torch.bincount(torch.bucketize(near, thresholds), minlength=len(thresholds) + 1)
        counts.append(above.flip(0).cumsum(0).flip(0)[1:])
    return torch.stack(counts)


def whole(query: EncodedScan) -> Box:
    """Return the box of the whole grid of a query."""
    return Box(*((0, length) for length in query.grid.shape))


def cores_of(boxes: Sequence[Box], block: tuple[int, int, int] = BLOCK) -> Iterator[Box]:
    """Yield the blocks, of at most this size, in which boxes of a grid are read."""
    for box in boxes:
        for tile in tiles(box.shape, block):
            ends = zip(tile.ranges, box.ranges, strict=True)
            yield Box(*((low + first, high + first) for (low, high), (first, _) in ends))


def touches_border(mask: Tensor, core: Box, shape: tuple[int, int, int]) -> Tensor:
    """Return, for each organ, True if its mask in the block ``core`` touches the border of the grid, bool ``[K]``."""
    touches = torch.zeros(len(mask), dtype=torch.bool)
    for axis, ((low, high), size) in enumerate(zip(core.ranges, shape, strict=True), start=1):
        if low == 0:
            touches |= mask.select(axis, 0).flatten(1).any(1)
        if high == size:
            touches |= mask.select(axis, -1).flatten(1).any(1)
    return touches
