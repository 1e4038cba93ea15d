"""Quality flags in words, for whoever meets one in a report."""

from __future__ import annotations

from typing import Final

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
"""Every flag that :mod:`fseft_edge.quality` and :mod:`fseft_edge.transduction` raise, and what it says of a mask."""


def in_words(flag: str) -> str:
    """Return a flag as a reader meets it."""
    return flag.replace("_", " ").replace(" hu", " HU")
