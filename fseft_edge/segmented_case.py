"""What segmentation says of a case: its mask, and the organs in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class SegmentedOrgan:
    """An organ in a mask: its name, label value, volume, and what to look at (see :mod:`fseft_edge.quality`)."""

    name: str
    label: int
    volume_ml: float
    flags: tuple[str, ...]

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Self:
        """Return what :func:`dataclasses.asdict` and JSON made of one."""
        return cls(**{**written, "flags": tuple(written["flags"])})


@dataclass(frozen=True)
class SegmentedCase:
    """A scan's result: the mask file, and its organs as ``OUT/<case>.json`` holds them."""

    case: str
    mask: Path
    organs: tuple[SegmentedOrgan, ...]
