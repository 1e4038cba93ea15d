"""The result of a case: its mask and the measurements of its organs; and the JSON beside the mask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fseft_edge.runtime.errors import LabelError


@dataclass(frozen=True)
class SegmentedOrgan:
    """An organ in a mask.

    Attributes:
        name: as the adapter has it.
        label: its value in the mask.
        volume_ml: of its mask.
        flags: what to look at (see :mod:`fseft_edge.masks.quality`).
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


def organ_labels(description: Path) -> dict[str, int]:
    """Return each organ's label value, in the order of the file.

    Args:
        description: ``<case>.json`` as ``segment`` writes it.

    Raises:
        LabelError: it cannot be read, or does not say.
    """
    try:
        entries = json.loads(description.read_text(encoding="utf-8"))["organs"]
        return {str(entry["name"]): int(entry["label"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelError(
            f"{description} does not say which label is which organ.",
            remedy="Segment the case again, or give label maps whose values you name yourself, without such a file.",
        ) from error
