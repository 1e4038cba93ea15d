"""What segmentation says of a case: its mask, and the organs in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class SegmentedOrgan:
    """An organ in a mask.

    Attributes:
        name: as the adapter has it.
        label: its value in the mask.
        volume_ml: of its mask.
        flags: what to look at (see :mod:`fseft_edge.flags`).
        support_ml: the least and the greatest volume in the support set; None where the adapter knows none.
        confidence: mean probability of the voxels that the organ was given, before post-processing, 0 to 1; None for an
            empty mask.
        median_hu: of the mask's voxels; None for an empty mask.
    """

    name: str
    label: int
    volume_ml: float
    flags: tuple[str, ...]
    support_ml: tuple[float, float] | None = None
    confidence: float | None = None
    median_hu: int | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the organ that ``asdict`` and JSON made these fields of; what an older version lacks is None."""
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**{**fields, **lists})


@dataclass(frozen=True)
class SegmentedCase:
    """A scan's result: the mask file, and its organs as ``OUT/<case>.json`` holds them."""

    case: str
    mask: Path
    organs: tuple[SegmentedOrgan, ...]
