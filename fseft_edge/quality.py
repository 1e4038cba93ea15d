"""Quality flags: what about a mask a person should look at before using it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fseft_edge.components import bounding_box, components
from fseft_edge.intensities import HuPercentiles

if TYPE_CHECKING:  # a report needs the limits, and not torch
    from fseft_edge.adapters import Method

SIZE_MARGIN = 0.3
LARGEST_COMPONENT_SHARE = 0.9
LEAST_CONFIDENCE: Final[dict[Method, float]] = {"linear": 0.75, "pointwise": 0.84, "spatial": 0.84}
"""Adapters with a residual path are surer of themselves, also where they are wrong."""
HU_MARGIN, HU_MARGIN_SHARE = 50, 0.5
"""These and the least confidence were chosen on `support`: docs/segment.md, "How the limits were chosen"."""


def quality_flags(
    mask: NDArray[np.bool_],
    volume_ml: float,
    support_volumes_ml: Sequence[float],
    *,
    confidence: float | None = None,
    method: Method = "spatial",
    median_hu: int | None = None,
    support_hu: Sequence[HuPercentiles] = (),
) -> tuple[str, ...]:
    """Return what is unusual about an organ's mask.

    Args:
        mask: ``[X, Y, Z]`` on the scan's lattice.
        volume_ml: its volume.
        support_volumes_ml: the organ's volumes in the support set.
        confidence: mean probability of its voxels; None where it is not known.
        method: of the adapter that found it.
        median_hu: of its voxels; None likewise.
        support_hu: of the organ in the support set.

    Returns:
        Any of ``empty``; ``touches_edge`` (the organ reaches the border of the field of view and may be cut off);
        ``small`` or ``large`` (outside the support set's range, widened by 30 %); ``fragmented`` (the largest
        26-connected component holds less than 90 % of it); ``low_confidence`` (below what is usual for the method);
        ``implausible_hu`` (see :func:`has_implausible_hu`).
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
    if confidence is not None and confidence < LEAST_CONFIDENCE[method]:
        flags.append("low_confidence")
    if median_hu is not None and has_implausible_hu(median_hu, support_hu):
        flags.append("implausible_hu")
    return tuple(flags)


def has_implausible_hu(median_hu: int, support_hu: Sequence[HuPercentiles]) -> bool:
    """Whether a mask's median HU lies beyond the support set's medians by more than their margin.

    The margin at either end is 50 HU, or half of that end's own HU where this is more: bone and lung vary with density
    and partial volume by far more than soft tissue does.
    """
    if not support_hu:
        return False
    low, high = (end(hu.median for hu in support_hu) for end in (min, max))
    return median_hu < low - _margin(low) or median_hu > high + _margin(high)


def _margin(hu: int) -> float:
    return max(HU_MARGIN, HU_MARGIN_SHARE * abs(hu))


def largest_component_share(mask: NDArray[np.bool_]) -> float:
    """Return the share of a non-empty mask that its largest 26-connected component holds."""
    _, sizes = components(mask[bounding_box(mask)])
    return float(sizes.max() / sizes.sum())
