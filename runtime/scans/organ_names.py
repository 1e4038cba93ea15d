"""Names of organs as people and programs write them: ``kidney_left``, ``Kidney_L``, ``LT KIDNEY``, ``Glnd_Submand_L``.

Known names are those of AAPM's Task Group 263 (Mayo et al., Standardizing Nomenclatures in Radiation Oncology, 2018)
for the organs below, with any position of the side.
"""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple

Side = Literal["Left", "Right"]

_SIDES: Final[dict[str, Side]] = {
    **dict.fromkeys(("left", "l", "lt"), "Left"),
    **dict.fromkeys(("right", "r", "rt"), "Right"),
}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_OTHER_SIGNS = re.compile(r"[^A-Za-z0-9\s_,.()-]")
_IGNORED = re.compile(r"[\s_,]+")

_TG263: Final = {
    "aaorta": "aorta",
    "apulmonary": "pulmonaryartery",
    "bonemandible": "mandible",
    "bowelsmall": "smallbowel",
    "femurhead": "femoralhead",
    "glndadrenal": "adrenal",
    "glndsubmand": "submandibular",
    "glndthyroid": "thyroid",
    "opticnrv": "opticnerve",
    "seminalves": "seminalvesicle",
    "vvenacavai": "inferiorvenacava",
    "vvenacavas": "superiorvenacava",
}
_SAME: Final = {
    "adrenalgland": "adrenal",
    "cord": "spinalcord",
    "ivc": "inferiorvenacava",
    "oesophagus": "esophagus",
    "parotidgland": "parotid",
    "postcava": "inferiorvenacava",
    "smallintestine": "smallbowel",
    "submandibulargland": "submandibular",
    "svc": "superiorvenacava",
    "thyroidgland": "thyroid",
    "urinarybladder": "bladder",
    **_TG263,
}
"""Words of an organ, without side and plural, and the words under which this module knows the organ."""


class OrganWords(NamedTuple):
    """The words of an organ's name.

    Attributes:
        organ: all words except the sides, in lower case, joined.
        sides: the sides in the name.
    """

    organ: str
    sides: tuple[Side, ...]


def organ_words(name: str) -> OrganWords:
    """Return the words of a name; upper and lower case, spaces, ``_`` and ``-`` have no effect."""
    words = [word.lower() for word in _WORDS.findall(name)]
    sides = tuple(_SIDES[word] for word in words if word in _SIDES)
    return OrganWords("".join(word for word in words if word not in _SIDES), sides)


def same_organ(first: str, second: str) -> bool:
    """Return whether two names are known to mean the same organ on the same side.

    A plural is an organ of its own, because ``Kidneys`` are two: only the names of one organ are compared.
    """
    if _OTHER_SIGNS.search(first + second):
        return False  # in TG-263, "~Brain" is a part of the brain
    a, b = organ_words(first), organ_words(second)
    return bool(a.organ) and a.sides == b.sides and _SAME.get(a.organ, a.organ) == _SAME.get(b.organ, b.organ)


def same_name(first: str, second: str) -> bool:
    """Return whether two names are equal; upper and lower case, spaces, ``_`` and commas have no effect."""
    return _IGNORED.sub("", first).casefold() == _IGNORED.sub("", second).casefold()
