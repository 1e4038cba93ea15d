"""The result of a case: its mask, the measurements of its organs, and the JSON description of the mask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fseft_edge.runtime.errors import LabelError


@dataclass(frozen=True)
class SegmentedOrgan:
    """The measurements of one organ in a mask.

    Attributes:
        name: organ name from the adapter.
        label: label value of the organ in the mask.
        volume_ml: volume of the organ in ml.
        flags: quality flags (see :mod:`fseft_edge.masks.quality`).
        support_ml: smallest and largest volume of the organ in the support set in ml; None if the adapter has no
            support volumes.
        confidence: mean probability of the voxels of the organ before post-processing, 0 to 1; None for an empty mask.
        median_hu: median HU of the voxels of the organ; None for an empty mask.
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
        """Return the organ from its JSON fields. Optional fields that an older version did not write become None."""
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**{**fields, **lists})


@dataclass(frozen=True)
class SegmentedCase:
    """The result of a scan, as stored in ``OUT/<case>.json``.

    Attributes:
        case: name of the case.
        mask: mask file.
        organs: measurements of the organs.
        warnings: everything that was left out, corrected or assumed when the scan was read or a result was written, one
            sentence each (see :class:`fseft_edge.runtime.scans.volume.Volume`).
    """

    case: str
    mask: Path
    organs: tuple[SegmentedOrgan, ...]
    warnings: tuple[str, ...] = ()


def organ_labels(description: Path) -> dict[str, int]:
    """Return the label value of each organ of a mask, in the order of the description file.

    Args:
        description: the file ``<case>.json`` that ``segment`` writes.

    Raises:
        LabelError: the file cannot be read, or does not contain organ names and label values.
    """
    try:
        entries = json.loads(description.read_text(encoding="utf-8"))["organs"]
        return {str(entry["name"]): int(entry["label"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelError(
            f"{description} does not contain the organ names and label values of its mask.",
            remedy="Segment the case again. If another program made the label map, delete this file and give the label "
            "values with --organ.",
        ) from error
