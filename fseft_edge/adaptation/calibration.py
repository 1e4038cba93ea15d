"""Calibration of the thresholds of a trained adapter: training with perturbed features makes its masks too large.

With a feature dropped or shifted, an adapter is less sure where an organ ends, and the Dice loss then rewards a mask
that is rather too large. Without perturbation, as on a scan to segment, the masks stay too large: those of the training
scans themselves by 10 to 60 % (docs/decisions, "Calibrated thresholds"). The bias of each organ is therefore moved
after the training. On new scans, half of the move that gives the training scans their volumes is best.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import torch

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.partial_encoding import organ_boxes
from fseft_edge.adaptation.query_sizes import log_odds_in, voxels_above
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Adapter
from fseft_edge.masks.region import clipped, separate
from fseft_edge.runtime.encoder.on_demand import FeaturesOnDemand

_LOG = logging.getLogger(__name__)

_LEAST, _MOST, _STEP = -80, 160, 0.05
"""Range of moves in steps, from -4 to 8 in log odds, and a step."""

_MARGIN: Final = 8
"""Voxels around each annotated part of an organ in which masks are measured."""


def calibrate(adapter: Adapter, support: Sequence[SupportScan], share: float) -> None:
    """Move the bias of each organ of a trained adapter, in place, by a share of what gives its volumes on the support.

    An organ that no scan shows, or that the adapter hardly finds, is not changed.

    Args:
        adapter: adapter with sigmoid activation.
        support: the scans that the adapter was trained on, without variations.
        share: share of the move that gives the masks of the support scans the total volume of the annotations.
    """
    thresholds = torch.arange(_LEAST, _MOST + 1) * _STEP
    found = torch.zeros(adapter.classes, len(thresholds))
    annotated = torch.zeros(adapter.classes)
    for scan in support:
        limit = Box(*((0, length) for length in scan.shape))
        boxes = separate([clipped(box.grown(_MARGIN), limit) for box in organ_boxes(scan)])
        known = torch.from_numpy(scan.annotated)
        for core, log_odds in log_odds_in(adapter, scan.features, boxes):
            found[known] += voxels_above(log_odds[known], thresholds)
            annotated[known] += scan.occupancy.block(core)[known].sum((1, 2, 3))
        if isinstance(scan.features, FeaturesOnDemand):
            scan.features.release()
    # The first threshold at which the masks are not larger than the annotations, or the last one.
    not_larger = found <= annotated[:, None]
    first = torch.where(not_larger.any(1), not_larger.int().argmax(1), len(thresholds) - 1)
    usable = (annotated > 0) & (found[:, 0] >= annotated)
    move = torch.where(usable, share * thresholds[first], 0.0)
    _LOG.info("calibration moved the thresholds by %s in log odds", ", ".join(f"{one:.2f}" for one in move.tolist()))
    with torch.no_grad():
        assert adapter.direct.bias is not None  # noqa: S101 - narrows the type for the checker
        adapter.direct.bias -= move.to(adapter.device)
