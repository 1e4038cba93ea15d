"""Quality flags: what about a mask a person should look at before using it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fseft_edge.components import bounding_box, components

SIZE_MARGIN = 0.3
LARGEST_COMPONENT_SHARE = 0.9


def quality_flags(mask: NDArray[np.bool_], volume_ml: float, support_volumes_ml: Sequence[float]) -> tuple[str, ...]:
    """Return what is unusual about an organ's mask.

    Args:
        mask: ``[X, Y, Z]`` on the scan's lattice.
        volume_ml: its volume.
        support_volumes_ml: the organ's volumes in the support set.

    Returns:
        Any of ``empty``; ``touches_edge`` (the organ reaches the border of the field of view and may be cut off);
        ``small`` or ``large`` (outside the support set's range, widened by 30 %); ``fragmented`` (the largest
        26-connected component holds less than 90 % of it).
    """
    if not mask.any():
        return ("empty",)
    flags: list[str] = []
    box = bounding_box(mask)
    if any(part.start == 0 or part.stop == size for part, size in zip(box, mask.shape, strict=True)):
        flags.append("touches_edge")
    if support_volumes_ml:
        if volume_ml < (1 - SIZE_MARGIN) * min(support_volumes_ml):
            flags.append("small")
        if volume_ml > (1 + SIZE_MARGIN) * max(support_volumes_ml):
            flags.append("large")
    if largest_component_share(mask[box]) < LARGEST_COMPONENT_SHARE:
        flags.append("fragmented")
    return tuple(flags)


def largest_component_share(mask: NDArray[np.bool_]) -> float:
    """Return the share of a non-empty mask that its largest 26-connected component holds."""
    _, sizes = components(mask[bounding_box(mask)])
    return float(sizes.max() / sizes.sum())
