"""The result of a case: its mask, the measurements of its organs, and the JSON description of the mask."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from fseft_edge.runtime.errors import LabelError
from fseft_edge.runtime.system.json_text import parse_json

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MASK_SHA256: Final = "mask_sha256"
"""Key of the checksum of the mask file in its JSON file. Files of earlier versions have no such key."""


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

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str
    label: int
    volume_ml: float
    flags: tuple[str, ...]
    support_ml: tuple[float, float] | None = None
    confidence: float | None = None
    median_hu: int | None = None

    @classmethod
    def from_json(cls, fields: object) -> SegmentedOrgan:
        """Return the organ from its JSON fields. Optional fields that an older version did not write become None.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type.
        """
        return _organ_type().validate_python(fields)


@functools.cache
def _organ_type() -> TypeAdapter[SegmentedOrgan]:
    from pydantic import TypeAdapter  # noqa: PLC0415 - the help of the commands does not need it

    return TypeAdapter(SegmentedOrgan)


@dataclass(frozen=True)
class SegmentedCase:
    """The result of a scan, as stored in ``OUT/<case>.json``.

    Attributes:
        case: name of the case.
        mask: mask file.
        organs: measurements of the organs.
        warnings: everything that was left out, corrected or assumed when the scan was read or a result was written, one
            sentence each (see :class:`fseft_edge.runtime.scans.volume.Volume`).
        not_written: outputs that were requested but could not be written, such as ``seg``. The mask is complete.
        existing: whether the result was there before, so that nothing was computed.
    """

    case: str
    mask: Path
    organs: tuple[SegmentedOrgan, ...]
    warnings: tuple[str, ...] = ()
    not_written: tuple[str, ...] = ()
    existing: bool = False


def describes(fields: Mapping[str, Any], mask: BufferedReader) -> bool:
    """Return whether a JSON file describes this mask: whether the mask has the checksum that the JSON file states.

    Files of earlier versions state no checksum. They are trusted.

    Args:
        fields: content of the file ``<case>.json``.
        mask: the mask file, open at its start; it is read to its end.
    """
    stated = fields.get(MASK_SHA256)
    return stated is None or bool(stated == hashlib.file_digest(mask, "sha256").hexdigest())


def case_in(description: Path) -> str | None:
    """Return the name of the case for which a description file was written; None if the file cannot be read."""
    try:
        return str(parse_json(description.read_bytes())["case"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def organ_labels(description: Path, mask: Path | None = None) -> dict[str, int]:
    """Return the label value of each organ of a mask, in the order of the description file.

    Args:
        description: the file ``<case>.json`` that ``segment`` writes.
        mask: the mask to which the label values are applied. None, for a mask that a person corrected, accepts any
            mask.

    Raises:
        LabelError: the file cannot be read, does not contain organ names and label values, or describes another mask.
    """
    try:
        fields = parse_json(description.read_text(encoding="utf-8"))
        labels = {str(entry["name"]): int(entry["label"]) for entry in fields["organs"]}
        if mask is None:
            return labels
        with mask.open("rb") as file:
            same = describes(fields, file)
    except (OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        raise LabelError(
            f"{description} does not contain the organ names and label values of its mask.",
            remedy="Segment the case again. If another program made the label map, delete this file and give the label "
            "values with --organ.",
        ) from error
    if not same:
        raise LabelError(
            f"{description} does not describe {mask}: the mask file is not the one that was written together with it.",
            remedy="Segment the case again. If the mask was corrected by hand, move it to another folder, without the "
            "JSON file.",
        )
    return labels
