"""A threshold that follows the expected size of an organ: the least form of the size constraint of FSEFT (eqs. 2, 3).

An adapter that was trained on a few scans ranks the voxels of a new scan better than it sets their level: in some scans
all probabilities of an organ are too high or too low. A mask that is larger than the organ was in the support set is
then cut back to the voxels of higher probability, and a smaller mask grows, until its size is in the expected range.
The log odds are moved by at most 2, so that a mask with steep edges, which is as sure as a mask can be, hardly changes.

This needs one pass over the features, and nothing of the support set but the sizes of the organ. The optimisation of
all classifiers for the same constraint is :mod:`fseft_edge.adaptation.transduction`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fseft_edge.adaptation.query_sizes import BLOCK, log_odds_in, touches_border, voxels_above, whole
from fseft_edge.adaptation.size_priors import SizePrior
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Adapter
from fseft_edge.runtime.encoder.encoding import EncodedScan

MOST_LOG_ODDS: Final = 2.0
"""Largest move of a threshold in log odds: from a probability of 0.5 to 0.12 or 0.88."""

_STEPS: Final = 40
_LEAST_SHARE: Final = 0.3
_MUCH: Final = 0.15
_LOWER, _UPPER = 0.9, 1.1
_MM3_PER_ML = 1000.0


@dataclass(frozen=True)
class MovedThreshold:
    """What happened to the threshold of an organ.

    Attributes:
        before_ml: volume of all voxels of the grid with a probability above one half before the move, also where
            another organ is more probable.
        after_ml: the same after the move.
        log_odds: move of the threshold in log odds; positive if the mask became smaller, 0 if nothing was moved.
        flags: ``cut_off`` (one of these voxels touches the border of the field of view, so that the size says nothing;
            nothing was moved), ``absent`` (almost nothing of the organ was found; nothing was moved), or
            ``outside_prior`` (the size is still outside the expected range).
    """

    before_ml: float
    after_ml: float
    log_odds: float
    flags: tuple[str, ...]

    @property
    def changes_much(self) -> bool:
        """Whether the volume changed by more than 15 %: a person should look at the mask."""
        return abs(self.after_ml - self.before_ml) > _MUCH * self.before_ml


def expected_range(volumes_ml: Sequence[float]) -> SizePrior | None:
    """Return the expected range of an organ: from 0.9 of its smallest to 1.1 of its largest volume; None without any.

    Args:
        volumes_ml: volumes of the organ in the support set, in ml.
    """
    found = [volume for volume in volumes_ml if volume > 0]
    return SizePrior(_LOWER * min(found), _UPPER * max(found)) if found else None


def can_move_thresholds(adapter: Adapter) -> bool:
    """Return whether each organ of an adapter has a threshold: with softmax, the organs compete instead."""
    return adapter.settings.activation == "sigmoid"


def move_thresholds(
    adapter: Adapter,
    query: EncodedScan,
    ranges: Sequence[SizePrior | None],
    *,
    boxes: Sequence[Box] | None = None,
    block: tuple[int, int, int] = BLOCK,
) -> tuple[Adapter, tuple[MovedThreshold | None, ...]]:
    """Return an adapter for one scan, whose masks have a size in the expected range where a small move is sufficient.

    Args:
        adapter: adapter with sigmoid activation; it is not changed.
        query: scan to segment.
        ranges: expected range of each organ; None leaves the threshold of the organ at a probability of 0.5.
        boxes: boxes of the grid that are segmented; None means the whole grid.
        block: largest size of the blocks in which the query is read, in voxels.

    Returns:
        The adapter with moved biases, or the given adapter if no threshold moved; and what happened to each organ, None
        for an organ without a range.
    """
    curves, at_border = _curves(adapter, query, boxes or [whole(query)], block)
    moved = tuple(
        None if wanted is None else _moved(curve, wanted, cut_off=bool(cut))
        for curve, wanted, cut in zip(curves, ranges, at_border, strict=True)
    )
    if not any(organ and organ.log_odds for organ in moved):
        return adapter, moved
    changed = copy.deepcopy(adapter)
    shift = torch.tensor([organ.log_odds if organ else 0.0 for organ in moved], device=adapter.device)
    with torch.no_grad():
        assert changed.direct.bias is not None  # noqa: S101 - narrows the type for the checker
        changed.direct.bias -= shift
    return changed, moved


def _curves(
    adapter: Adapter, query: EncodedScan, boxes: Sequence[Box], block: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Return the size of each mask in ml for each threshold, and whether the mask touches the border of the grid.

    Returns:
        ``[K, 2 * 40 + 1]`` for the thresholds from -2 to 2 in log odds, and bool ``[K]``.
    """
    thresholds = torch.arange(-_STEPS, _STEPS + 1) * (MOST_LOG_ODDS / _STEPS)
    counts = torch.zeros(adapter.classes, len(thresholds), dtype=torch.int64)
    at_border = torch.zeros(adapter.classes, dtype=torch.bool)
    for core, log_odds in log_odds_in(adapter, query.features, boxes, block):
        counts += voxels_above(log_odds, thresholds)
        at_border |= touches_border(log_odds > 0, core, query.grid.shape)
    return counts * (query.grid.voxel_volume_mm3 / _MM3_PER_ML), at_border


def _moved(curve: Tensor, wanted: SizePrior, *, cut_off: bool) -> MovedThreshold:
    """Return the least move that brings a mask into the expected range, or the largest move."""
    before = float(curve[_STEPS])
    if cut_off:
        return MovedThreshold(before, before, 0.0, ("cut_off",))
    if before < _LEAST_SHARE * wanted.low_ml:
        return MovedThreshold(before, before, 0.0, ("absent",))
    step = 0
    if before > wanted.high_ml:
        step = next((i for i in range(1, _STEPS) if float(curve[_STEPS + i]) <= wanted.high_ml), _STEPS)
    elif before < wanted.low_ml:
        step = -next((i for i in range(1, _STEPS) if float(curve[_STEPS - i]) >= wanted.low_ml), _STEPS)
    after = float(curve[_STEPS + step])
    outside = not wanted.low_ml <= after <= wanted.high_ml
    return MovedThreshold(before, after, MOST_LOG_ODDS * step / _STEPS, ("outside_prior",) if outside else ())
