"""The JSON that lies beside a mask: which label is which organ."""

from __future__ import annotations

import json
from pathlib import Path

from fseft_edge.runtime.errors import LabelError


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
