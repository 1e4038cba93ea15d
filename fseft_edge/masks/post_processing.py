"""Post-processing of the mask of an organ: keep the largest connected component, fill holes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adapters.file import PostProcessing
from fseft_edge.runtime.scans.components import bounding_box, largest_component

ALL = tuple(PostProcessing(*steps) for steps in product((False, True), repeat=2))
"""All combinations of post-processing steps. The first combination is no post-processing."""


def post_process(
    labels: NDArray[np.uint8] | NDArray[np.uint16], organs: Sequence[PostProcessing]
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return a post-processed copy of a label map.

    First the smaller components of all organs are removed. Then holes are filled, in the order of the labels.

    Args:
        labels: label map ``[X, Y, Z]``; organ ``k`` has the label value ``k + 1``.
        organs: post-processing of each organ.
    """
    done = labels.copy()
    if any(steps.fill_holes for steps in organs):
        from scipy.ndimage import binary_fill_holes  # noqa: PLC0415 - slow to import
    for label, steps in enumerate(organs, start=1):
        if not steps.largest_component:
            continue
        mask = done == label
        if mask.any():
            box = bounding_box(mask)
            done[box][mask[box] & ~largest_component(mask[box])] = 0
    for label, steps in enumerate(organs, start=1):
        if not steps.fill_holes:
            continue
        mask = done == label
        if mask.any():
            box = bounding_box(mask)
            done[box][binary_fill_holes(mask[box]) & (done[box] == 0)] = label
    return done
