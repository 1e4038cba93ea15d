"""Organs and the label values that stand for them: what ``--organ liver=6,spleen=1`` means."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fseft_edge.runtime.errors import UsageError

LARGEST_LABEL = 65535
"""Label maps are unsigned integers of at most 16 bits."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_EXAMPLE = (
    "Write --organ NAME=ID with the organ's label value in the annotation files, such as --organ liver=6,spleen=1."
)


@dataclass(frozen=True)
class OrganLabel:
    """An organ's name and the value that its voxels have in the annotation files.

    Args:
        name: 1 to 64 letters, digits, ``_`` and ``-``, the first a letter or digit; it becomes part of file names.
        label: 1 to 65535; 0 is background.

    Raises:
        UsageError: the name or the label is not of that form.
    """

    name: str
    label: int

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"{self.name!r} is no organ name: up to 64 letters, digits, '_' and '-' make one.", remedy=_EXAMPLE
            )
        if not 1 <= self.label <= LARGEST_LABEL:
            raise UsageError(
                f"Organ {self.name!r} has label {self.label}, which is not between 1 and {LARGEST_LABEL}.",
                remedy=_EXAMPLE,
            )


def parse_organs(values: Iterable[str]) -> tuple[OrganLabel, ...]:
    """The organs that the values of ``--organ`` name, in the order given.

    Args:
        values: each ``NAME=ID`` or several of them separated by commas.

    Raises:
        UsageError: no organ at all, a malformed one, or a name or label that occurs twice.
    """
    organs = tuple(_parse_organ(part) for value in values for part in value.split(","))
    if not organs:
        raise UsageError("No organ was named.", remedy=_EXAMPLE)
    for index, organ in enumerate(organs):
        for earlier in organs[:index]:
            if organ.name == earlier.name:
                raise UsageError(f"Organ {organ.name!r} is named twice.", remedy="Name each organ once.")
            if organ.label == earlier.label:
                raise UsageError(
                    f"Label {organ.label} is given to both {earlier.name!r} and {organ.name!r}.",
                    remedy="Give each organ a label of its own.",
                )
    return organs


def _parse_organ(text: str) -> OrganLabel:
    name, separator, label = (part.strip() for part in text.partition("="))
    if not separator or not re.fullmatch(r"[0-9]{1,9}", label):
        raise UsageError(f"{text.strip()!r} does not name an organ and its label.", remedy=_EXAMPLE)
    return OrganLabel(name, int(label))
