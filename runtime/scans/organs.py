"""Organs and their label values, and parsing of the option ``--organ liver=6,spleen=1``."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fseft_edge.runtime.errors import UsageError

LARGEST_LABEL = 65535
"""Largest label value: label maps are unsigned integers of at most 16 bits."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_EXAMPLE = (
    "Give --organ NAME=ID, where ID is the label value of the organ in the annotation files, for example "
    "--organ liver=6,spleen=1."
)


@dataclass(frozen=True)
class OrganLabel:
    """Name of an organ and its label value in the annotation files.

    Args:
        name: name of the organ. It has 1 to 64 letters, digits, ``_`` and ``-``, starts with a letter or a digit, and
            becomes part of file names.
        label: label value from 1 to 65535; 0 is the background.

    Raises:
        UsageError: the name or the label value is invalid.
    """

    name: str
    label: int

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"{self.name!r} is not a valid organ name. An organ name has 1 to 64 letters, digits, '_' and '-', and "
                "starts with a letter or a digit.",
                remedy=_EXAMPLE,
            )
        if not 1 <= self.label <= LARGEST_LABEL:
            raise UsageError(
                f"The label value {self.label} of organ {self.name!r} is not between 1 and {LARGEST_LABEL}.",
                remedy=_EXAMPLE,
            )


def organ_colour(number: int) -> tuple[int, int, int]:
    """Return an RGB colour (0 to 255) that differs clearly from those of smaller numbers.

    The hues are a golden section apart. Mask files and DICOM objects show organ ``number`` (from 1) in this colour.
    """
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(number * 0.618034 % 1.0, 0.75, 1.0))
    return red, green, blue


def organs_of(organs: Mapping[str, int] | Sequence[OrganLabel]) -> tuple[OrganLabel, ...]:
    """Return the organs that a Python caller gives as label values by name, or as ``OrganLabel`` objects, in order.

    Raises:
        UsageError: there is no organ, a name or label value is invalid, or a name or label value occurs twice.
    """
    if isinstance(organs, Mapping):
        return _checked(tuple(OrganLabel(name, label) for name, label in organs.items()))
    if not all(isinstance(organ, OrganLabel) for organ in organs):
        raise UsageError(
            "The organs have no label values.", remedy="Give a dictionary, such as {'liver': 6, 'spleen': 1}."
        )
    return _checked(tuple(organs))


def parse_organs(values: Iterable[str]) -> tuple[OrganLabel, ...]:
    """Return the organs in the values of ``--organ``, in the given order.

    Args:
        values: values of the option; each is ``NAME=ID`` or several such pairs separated by commas.

    Raises:
        UsageError: there is no organ, an organ is malformed, or a name or label value occurs twice.
    """
    organs = tuple(_parse_organ(part) for value in values for part in value.split(","))
    return _checked(organs)


def _checked(organs: tuple[OrganLabel, ...]) -> tuple[OrganLabel, ...]:
    """Raise UsageError if there is no organ, or if a name or label value occurs twice; else return the organs."""
    if not organs:
        raise UsageError("No organ is given (--organ).", remedy=_EXAMPLE)
    for index, organ in enumerate(organs):
        for earlier in organs[:index]:
            if organ.name == earlier.name:
                raise UsageError(f"The organ {organ.name!r} is given twice.", remedy="Give each organ only once.")
            if organ.label == earlier.label:
                raise UsageError(
                    f"The organs {earlier.name!r} and {organ.name!r} have the same label value {organ.label}.",
                    remedy="Give each organ a different label value.",
                )
    return organs


def _parse_organ(text: str) -> OrganLabel:
    name, separator, label = (part.strip() for part in text.partition("="))
    if not separator or not re.fullmatch(r"[0-9]{1,9}", label):
        raise UsageError(f"{text.strip()!r} is not an organ and its label value.", remedy=_EXAMPLE)
    return OrganLabel(name, int(label))
