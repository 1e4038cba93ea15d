"""Calibration of the thresholds of a trained adapter: training with perturbed features makes its masks too large.

With a feature dropped or shifted, an adapter is less sure where an organ ends, and the Dice loss then rewards a mask
that is rather too large. Without perturbation, as on a scan to segment, the masks stay too large: those of the training
scans themselves by half (docs/decisions, "Calibrated thresholds"). The bias of each organ is therefore moved after the
training. On new scans, half of the move that gives the training scans their volumes is best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.query_sizes import log_odds_in, voxels_above
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Adapter

_LEAST, _MOST, _STEP = -80, 160, 0.05
"""Range of moves in steps, from -4 to 8 in log odds, and a step."""

_MARGIN: Final = 8
"""Voxels around the annotated organs in which masks are measured."""


def calibrate(adapter: Adapter, support: Sequence[SupportScan], share: float) -> None:
    """Move the bias of each organ of a trained adapter, in place, by a share of what gives its volumes on the support.

    An organ that no scan shows is not changed.

    Args:
        adapter: adapter with sigmoid activation.
        support: the scans that the adapter was trained on, without variations.
        share: share of the move that gives the masks of the support scans the total volume of the annotations.
    """
    thresholds = torch.arange(_LEAST, _MOST + 1) * _STEP
    found = torch.zeros(adapter.classes, len(thresholds))
    annotated = torch.zeros(adapter.classes)
    for scan in support:
        box = _around_organs(scan)
        if box is None:
            continue
        known = torch.from_numpy(scan.annotated)
        for core, log_odds in log_odds_in(adapter, scan.features, [box]):
            found[known] += voxels_above(log_odds[known], thresholds)
            annotated[known] += scan.occupancy.block(core)[known].sum((1, 2, 3))
    # The first threshold at which the masks are not larger than the annotations, or the last one.
    first = (found <= annotated[:, None]).int().argmax(1)
    first[(found > annotated[:, None]).all(1)] = len(thresholds) - 1
    move = torch.where(annotated > 0, share * thresholds[first], 0.0)
    with torch.no_grad():
        assert adapter.direct.bias is not None  # noqa: S101 - narrows the type for the checker
        adapter.direct.bias -= move.to(adapter.device)


def _around_organs(scan: SupportScan) -> Box | None:
    """Return the box around all annotated organs of a scan, with a margin inside the grid; None if there is none."""
    shown = [scan.occupancy.positions(k) for k in range(len(scan.occupancy)) if scan.annotated[k]]
    positions = np.concatenate([np.empty((0, 3), np.int64), *shown])
    if not len(positions):
        return None
    low = np.maximum(positions.min(0) - _MARGIN, 0).tolist()
    high = np.minimum(positions.max(0) + 1 + _MARGIN, scan.shape).tolist()
    return Box(*zip(low, high, strict=True))
