"""Annotated scans whose first feature channel is the organ, so that the correct adapter is known."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from doubles.features import MemoryFeatures
from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.runtime.encoder.feature_map import FeatureMap

SHAPE = (48, 40, 48)


def scan_with_organ(seed: int) -> SupportScan:
    """Return a scan with a ball-shaped organ; the first feature channel is the ball plus noise."""
    random = np.random.default_rng(seed)
    organ = ball(seed)
    finest = torch.from_numpy(random.normal(0, 0.2, (3, *SHAPE)).astype(np.float32))
    finest[0] += torch.from_numpy(organ)
    coarse = torch.nn.functional.avg_pool3d(finest[None], 2)[0]
    features = cast("FeatureMap", MemoryFeatures((finest, coarse)))
    volume = float(organ.sum() * 27)
    return SupportScan(features, SHAPE, Occupancy([organ]), np.array([True]), (volume,))


def ball(seed: int) -> NDArray[np.float32]:
    """Return a ball at a random position: 1 inside, 0 outside."""
    centre = np.random.default_rng(seed).uniform(16, 28, 3)
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(SHAPE), centre, strict=True)))
    return (distance < 8).astype(np.float32)
