"""The reason and the remedy of a failed case, without any text that could contain a patient's data."""

from __future__ import annotations

import traceback
from pathlib import Path

from fseft_edge.runtime.errors import FseftEdgeError, OutOfMemoryError
from fseft_edge.runtime.system.memory import is_out_of_memory

_BUG = "This is a bug: please report it. Run `fseft-edge segment` on this scan alone to see the full error."


def reason_and_remedy(error: Exception) -> tuple[str, str]:
    """Return what is shown of an error. Of an unexpected error, only the kind and the place in the code are shown.

    The text of an unexpected error may contain data of the file, such as values of a DICOM header.
    """
    error = as_known_error(error)
    if isinstance(error, FseftEdgeError):
        return error.message, error.remedy
    if isinstance(error, OSError) and error.strerror:
        return f"The operating system reported: {error.strerror}.", "Check the disks, the files and their permissions."
    return f"{in_words(error)}.", _BUG


def as_known_error(error: Exception) -> Exception:
    """Return an error that means exhausted memory as :class:`OutOfMemoryError`; return any other error unchanged."""
    if not isinstance(error, FseftEdgeError) and is_out_of_memory(error):
        return OutOfMemoryError(
            "There was not enough free memory.",
            remedy="Close other programs, limit the memory with --memory, or use a machine with more memory.",
        )
    return error


def in_words(error: Exception) -> str:
    """Return the kind of an unexpected error and its place in the code."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"An unexpected {type(error).__name__} in {Path(where.filename).name}, line {where.lineno}"
