"""What may be done to an organ's mask afterwards: keep its largest piece, fill its holes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes

from fseft_edge.adapters.file import PostProcessing
from fseft_edge.runtime.scans.components import bounding_box, largest_component

ALL = tuple(PostProcessing(*steps) for steps in product((False, True), repeat=2))
"""Every combination, that of doing nothing first."""


def post_process(
    labels: NDArray[np.uint8] | NDArray[np.uint16], organs: Sequence[PostProcessing]
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return a label map ``[X, Y, Z]`` with organ ``k``, label ``k + 1``, treated by ``organs[k]``.

    All organs lose their smaller components first; holes are filled afterwards, in the order of the labels.
    """
    done = labels.copy()
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
