"""Quality flags: what a person should check in a mask before using it, and what each flag means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.scans.components import bounding_box, components
from fseft_edge.runtime.scans.intensities import HuPercentiles

if TYPE_CHECKING:  # a report needs the limits, and not torch
    from fseft_edge.adapters.network import Method

MEANINGS: Final = {
    "empty": "No voxel was given to the organ.",
    "touches_edge": "The mask reaches the border of the scan: the organ may be cut off, and its volume too small.",
    "small": "The volume is more than 30 % below the smallest in the support set.",
    "large": "The volume is more than 30 % above the largest in the support set.",
    "fragmented": "The largest connected piece holds less than 90 % of the mask.",
    "low_confidence": "The adapter was not sure of what it found.",
    "implausible_hu": "The mask's median HU is far from those of the support set: another organ, another contrast "
    "phase, metal, or a scan whose HU are off.",
    "cut_off": "The organ reaches the border of the field of view; its size was not corrected upwards.",
    "absent": "Hardly anything of the organ was found; it was taken to be absent and left alone.",
    "outside_prior": "The organ's size is still outside its prior after tuning.",
}
"""What each flag means. This module raises them, but for the last three, which the transduction raises."""


def in_words(flag: str) -> str:
    """Return a flag as a reader meets it."""
    return flag.replace("_", " ").replace(" hu", " HU")


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
