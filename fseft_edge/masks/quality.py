"""Quality flags: properties of a mask that a person should check before using the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from fseft_edge.runtime.scans.components import BoxedMask, components
from fseft_edge.runtime.scans.intensities import HuPercentiles

if TYPE_CHECKING:  # reports import this module for its limits, and they must not import torch
    from fseft_edge.adapters.network import Method

_MEASURED: Final = {
    "empty": "The mask contains no voxel of the organ.",
    "touches_edge": "The mask touches the border of the scan. The organ may be cut off, and its volume too small.",
    "small": "The volume is more than 30 % below the smallest volume in the support set.",
    "large": "The volume is more than 30 % above the largest volume in the support set.",
    "fragmented": "The largest connected component contains less than 90 % of the mask.",
    "low_confidence": "The mean probability of the voxels of the mask is low.",
    "implausible_hu": "The median HU of the mask is far from the values of the support set. Possible reasons: another "
    "organ, another contrast phase, metal, or a scan with wrong HU.",
}
_SET_BY_TRANSDUCTION: Final = {
    "cut_off": "The organ touches the border of the field of view. Its size was not corrected upwards.",
    "absent": "Almost no voxel of the organ was found. The organ is treated as absent; its size was not corrected.",
    "outside_prior": "After the refit, the size of the organ is still outside its size prior.",
}
_SET_BY_MOVED_THRESHOLD: Final = {
    "threshold_moved": "The size of the mask was outside the range that the adapter expects. The threshold was moved, "
    "and the volume changed by more than 15 %.",
}
MEANINGS: Final = {**_MEASURED, **_SET_BY_MOVED_THRESHOLD, **_SET_BY_TRANSDUCTION}
"""The meaning of each flag that :func:`quality_flags`, a moved threshold or the transduction sets."""


def in_words(flag: str) -> str:
    """Return a flag as text for the user."""
    return flag.replace("_", " ").replace(" hu", " HU")


SIZE_MARGIN = 0.3
LARGEST_COMPONENT_SHARE = 0.9
LEAST_CONFIDENCE: Final[dict[Method, float]] = {"linear": 0.75, "pointwise": 0.84, "spatial": 0.84}
"""Limit of the confidence per method. Adapters with a residual path give higher probabilities, also if wrong."""
HU_MARGIN, HU_MARGIN_SHARE = 50, 0.5
"""The margins of HU. docs/segment.md, "How the limits were chosen", explains these limits and those of confidence."""


def quality_flags(
    mask: BoxedMask,
    volume_ml: float,
    support_volumes_ml: Sequence[float],
    *,
    confidence: float | None = None,
    method: Method = "spatial",
    median_hu: int | None = None,
    support_hu: Sequence[HuPercentiles] = (),
) -> tuple[str, ...]:
    """Return the quality flags of the mask of an organ.

    Args:
        mask: mask of the organ on the lattice of the scan.
        volume_ml: volume of the mask in ml.
        support_volumes_ml: volumes of the organ in the support set in ml.
        confidence: mean probability of the voxels of the mask; None if it is not known.
        method: method of the adapter that predicted the mask.
        median_hu: median HU of the voxels of the mask; None if it is not known.
        support_hu: HU percentiles of the organ in the support set.

    Returns:
        Any of ``empty``; ``touches_edge`` (the mask touches the border of the field of view, so that the organ may be
        cut off); ``small`` or ``large`` (the volume is outside the range of the support set, widened by 30 %);
        ``fragmented`` (the largest 26-connected component contains less than 90 % of the mask); ``low_confidence``
        (the confidence is below the limit of the method); ``implausible_hu`` (see :func:`has_implausible_hu`).
    """
    if not mask.voxels:
        return ("empty",)
    flags: list[str] = []
    if any(part.start == 0 or part.stop == size for part, size in zip(mask.box, mask.shape, strict=True)):
        flags.append("touches_edge")
    if support_volumes_ml:
        if volume_ml < (1 - SIZE_MARGIN) * min(support_volumes_ml):
            flags.append("small")
        if volume_ml > (1 + SIZE_MARGIN) * max(support_volumes_ml):
            flags.append("large")
    if largest_component_share(mask) < LARGEST_COMPONENT_SHARE:
        flags.append("fragmented")
    if confidence is not None and confidence < LEAST_CONFIDENCE[method]:
        flags.append("low_confidence")
    if median_hu is not None and has_implausible_hu(median_hu, support_hu):
        flags.append("implausible_hu")
    return tuple(flags)


def has_implausible_hu(median_hu: int, support_hu: Sequence[HuPercentiles]) -> bool:
    """Return whether the median HU of a mask is outside the range of the medians of the support set plus a margin.

    The margin at each end of the range is 50 HU, or half of the absolute HU of that end, whichever is larger. Bone and
    lung need the larger margin, because density and partial volume change their HU much more than those of soft tissue.
    """
    if not support_hu:
        return False
    low, high = (end(hu.median for hu in support_hu) for end in (min, max))
    return median_hu < low - _margin(low) or median_hu > high + _margin(high)


def _margin(hu: int) -> float:
    return max(HU_MARGIN, HU_MARGIN_SHARE * abs(hu))


def largest_component_share(mask: BoxedMask) -> float:
    """Return the share of the voxels of a non-empty mask that are in its largest 26-connected component."""
    _, sizes = components(mask.inside)
    return float(sizes.max() / sizes.sum())
