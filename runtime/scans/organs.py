"""Organs, their label values and names, and parsing of the option ``--organ``."""

from __future__ import annotations

import colorsys
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.organ_names import same_name, same_organ

LARGEST_LABEL = 65535
"""Largest label value: label maps are unsigned integers of at most 16 bits."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_EXAMPLE = (
    "Give --organ NAME=ID, where ID is the label value of the organ in label maps, for example --organ "
    "liver=6,spleen=1. For annotations that name their structures, give --organ NAME, or --organ 'NAME=ROI|OTHER ROI'."
)
_BETWEEN_ORGANS = re.compile(r",(?!\s)|,(?=\s*[A-Za-z0-9][A-Za-z0-9_-]*\s*=)")
"""A comma between two organs. A comma before a blank belongs to the name of a structure, unless ``NAME=`` follows."""
_LABEL = re.compile(r"[0-9]{1,9}")
_NO_NAME = re.compile(r"[-+]?[\d.]+|=.*|")
"""No name of a structure: a number that is no label value, or a mistake in typing."""


@dataclass(frozen=True)
class OrganLabel:
    """An organ, its label value, and its names in the annotation files.

    Args:
        name: name of the organ. It has 1 to 64 letters, digits, ``_`` and ``-``, starts with a letter or a digit, and
            becomes part of file names.
        label: label value from 1 to 65535; 0 is the background.
        names: names of the organ in annotations that name their structures (structure sets, DICOM segmentations,
            ``.seg.nrrd``, label maps with names). If the organ's own name is among them, all names that
            :mod:`fseft_edge.runtime.scans.organ_names` knows for it count too.
        in_label_maps: whether ``label`` is the organ's value in label maps.

    Raises:
        UsageError: the name or the label value is invalid.
    """

    name: str
    label: int
    names: tuple[str, ...] = ()
    in_label_maps: bool = True

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

    @property
    def described(self) -> str:
        """The organ as in ``--organ``: its name, and how it is found in annotations."""
        found_by = [*([str(self.label)] if self.in_label_maps else []), *self.names]
        return self.name if found_by == [self.name] else f"{self.name}={'|'.join(found_by)}"

    def is_named(self, structure: str) -> bool:
        """Return whether a structure of an annotation file is this organ, by its name."""
        return any(
            same_name(name, structure) or (name == self.name and same_organ(name, structure)) for name in self.names
        )


GivenOrgans: TypeAlias = Mapping[str, int | str] | Sequence[OrganLabel | str]
"""Organs that a Python caller gives (see :func:`organs_of`)."""


def organ_colour(number: int) -> tuple[int, int, int]:
    """Return an RGB colour (0 to 255) that differs clearly from those of smaller numbers.

    The hues are a golden section apart. Mask files and DICOM objects show organ ``number`` (from 1) in this colour.
    """
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(number * 0.618034 % 1.0, 0.75, 1.0))
    return red, green, blue


def organs_of(organs: GivenOrgans) -> tuple[OrganLabel, ...]:
    """Return the organs that a Python caller gives, in order.

    Args:
        organs: label value or names of each organ by its name, as in ``--organ`` (``{"liver": 6}``,
            ``{"parotid_left": "Parotid L|PAROTID LT"}``); or a list of names and ``OrganLabel`` objects.

    Raises:
        UsageError: there is no organ, a name or label value is invalid, or a name or label value occurs twice.
    """
    if isinstance(organs, Mapping):
        return _numbered([_organ(name, str(wanted)) for name, wanted in organs.items()])
    if isinstance(organs, str) or not all(isinstance(organ, OrganLabel | str) for organ in organs):
        raise UsageError(
            "The organs have no label values.", remedy="Give a dictionary, such as {'liver': 6, 'spleen': 1}."
        )
    return _numbered([organ if isinstance(organ, OrganLabel) else _organ(organ, organ) for organ in organs])


def parse_organs(values: Iterable[str]) -> tuple[OrganLabel, ...]:
    """Return the organs in the values of ``--organ``, in the given order.

    Args:
        values: values of the option; each is one organ or several separated by commas. An organ is ``NAME=ID``,
            ``NAME`` (structures with a known name of this organ), or ``NAME="ROI|OTHER ROI"``. One of the
            alternatives may be a label value, for label maps; ``#3`` is the structure with the number 3.

    Raises:
        UsageError: there is no organ, an organ is malformed, or a name or label value occurs twice.
    """
    return _numbered([_parse_organ(part) for value in values for part in _BETWEEN_ORGANS.split(value)])


class _Wanted(NamedTuple):
    """An organ whose label value may still be missing."""

    name: str
    label: int | None
    names: tuple[str, ...]


def _numbered(wanted: Sequence[_Wanted | OrganLabel]) -> tuple[OrganLabel, ...]:
    """Give the smallest free label values to organs without one."""
    taken = {organ.label for organ in wanted}
    free = (label for label in itertools.count(1) if label not in taken)
    return _checked(
        tuple(
            organ
            if isinstance(organ, OrganLabel)
            else OrganLabel(organ.name, next(free), organ.names, in_label_maps=False)
            if organ.label is None
            else OrganLabel(organ.name, organ.label, organ.names)
            for organ in wanted
        )
    )


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


def _parse_organ(text: str) -> _Wanted:
    name, separator, wanted = (part.strip() for part in text.partition("="))
    if separator and not wanted:
        raise UsageError(f"{text.strip()!r} is not an organ and its label value or names.", remedy=_EXAMPLE)
    return _organ(name, wanted or name)


def _organ(name: str, wanted: str) -> _Wanted:
    """Return an organ from its name and the text behind ``=``: label value, names, or both, separated by ``|``."""
    parts = [part.strip() for part in wanted.split("|")]
    labels = [int(part) for part in parts if _LABEL.fullmatch(part)]
    names = tuple(part for part in parts if not _LABEL.fullmatch(part))
    if len(labels) > 1 or any(_NO_NAME.fullmatch(part) for part in names):
        raise UsageError(
            f"{name}={wanted} has {'several label values' if len(labels) > 1 else 'an invalid label value or name'}.",
            remedy=_EXAMPLE,
        )
    OrganLabel(name, labels[0] if labels else 1)  # raises the error of an invalid name or label value
    return _Wanted(name, labels[0] if labels else None, names)
