"""Names of structures in messages. A name that contains the name or a number of the patient is not printed."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from fseft_edge.runtime.scans.structures import StructureFile

HIDDEN = "(a name that contains the patient's name)"
_UNKNOWN = "(a name that is not shown, because the patient's name cannot be read)"
_LISTED = 40
_LONG = 3
_WORD = re.compile(r"[^\W_]+")
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue"})


def names_in(file: StructureFile, *, show_all: bool = False) -> list[str]:
    """Return the names of all structures of an annotation file, in their order, as they may be printed.

    Args:
        file: the annotation file. In DICOM, it states the patient.
        show_all: return all names as they are.
    """
    names = [printable(structure.name) or "(no name)" for structure in file.structures]
    if show_all:
        return names
    identifying = _identifying(file)
    if identifying is None:
        return [_UNKNOWN] * len(names)
    return [HIDDEN if identifies(name, identifying) else name for name in names]


def printable(name: str) -> str:
    """Return a name without signs that a terminal would not print, such as line breaks and escape sequences."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name)


def identifies(name: str, identifying: Iterable[str]) -> bool:
    """Return whether a name contains a word that identifies the patient.

    Accents, umlauts, upper and lower case and signs between letters have no effect. Words of two letters or digits have
    to be words of the name; a single letter identifies nobody.

    Args:
        name: name of a structure.
        identifying: names and numbers of the patient.
    """
    wanted = {word for text in identifying for words in _spellings(text) for word in (*words, "".join(words))}
    for words in _spellings(name):
        joined = "".join(words)
        for word in wanted:
            bare = word.lstrip("0") if word.isdecimal() else word
            is_long = len(bare) >= _LONG or (bare != "" and not bare.isascii())
            if (is_long and bare in joined) or (len(bare) == _LONG - 1 and bare in words):
                return True
    return False


def _spellings(text: str) -> list[list[str]]:
    """Return the words of a text in lower case without accents, with umlauts as one letter and as two."""
    found = []
    for variant in (text.casefold(), unicodedata.normalize("NFC", text).casefold().translate(_UMLAUTS)):
        plain = "".join(sign for sign in unicodedata.normalize("NFKD", variant) if not unicodedata.combining(sign))
        found.append(_WORD.findall(plain))
    return found


def listed_names(files: Sequence[StructureFile]) -> str:
    """Return the names of all structures in annotation files for a message: ``Brainstem (in 3 files)``, ..."""
    count = Counter(name for file in files for name in dict.fromkeys(names_in(file)))
    listed = [
        f"{name} (in {number} {'file' if number == 1 else 'files'})" for name, number in sorted(count.items())[:_LISTED]
    ]
    if len(count) > _LISTED:
        listed.append(f"and {len(count) - _LISTED} more")
    return ", ".join(listed) or "none"


def _identifying(file: StructureFile) -> frozenset[str] | None:
    from fseft_edge.runtime.scans.dicom.annotation_objects import AnnotationObject  # noqa: PLC0415 - loads pydicom
    from fseft_edge.runtime.scans.dicom.identifying import identifying_words  # noqa: PLC0415

    return identifying_words(file.file) if isinstance(file, AnnotationObject) else frozenset()
