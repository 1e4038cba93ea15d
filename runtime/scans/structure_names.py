"""Names of structures in messages. A name that contains the name or a number of the patient is not printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fseft_edge.runtime.scans.structures import StructureFile

HIDDEN = "(a name that contains the patient's name)"
_UNKNOWN = "(a name that is not shown, because the patient's name cannot be read)"
_LISTED = 40


def names_in(file: StructureFile, *, show_all: bool = False) -> list[str]:
    """Return the names of all structures of an annotation file, in their order, as they may be printed.

    Args:
        file: the annotation file. In DICOM, it states the patient.
        show_all: return all names as they are.
    """
    names = [structure.name or "(no name)" for structure in file.structures]
    if show_all:
        return names
    identifying = _identifying(file)
    if identifying is None:
        return [_UNKNOWN] * len(names)
    return [HIDDEN if any(word in name.casefold() for word in identifying) else name for name in names]


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
