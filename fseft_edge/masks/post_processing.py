"""Post-processing of the mask of an organ: keep the largest connected component, fill holes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adapters.file import PostProcessing
from fseft_edge.runtime.scans.components import label_boxes, largest_component

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
    done = labels.copy(order="K")
    if not any(steps.largest_component or steps.fill_holes for steps in organs):
        return done
    if any(steps.fill_holes for steps in organs):
        from scipy.ndimage import binary_fill_holes  # noqa: PLC0415 - slow to import
    boxes = label_boxes(labels, range(1, len(organs) + 1))
    found = [(label, done[box], steps) for label, (box, steps) in enumerate(zip(boxes, organs, strict=True), start=1)]
    for label, part, steps in found:
        if steps.largest_component and part.size:
            mask = part == label
            part[mask & ~largest_component(mask)] = 0
    for label, part, steps in found:
        if steps.fill_holes and part.size:
            part[binary_fill_holes(part == label) & (part == 0)] = label
    return done
