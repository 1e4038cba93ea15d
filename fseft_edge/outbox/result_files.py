"""Open result files of a case safely: no links, only regular files, and only a mask that its JSON file describes."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from fseft_edge.masks.result import describes
from fseft_edge.runtime.errors import LabelError, UnreadableFileError
from fseft_edge.runtime.scans.nifti import read_label_map
from fseft_edge.runtime.scans.volume import LabelMap

MASK_SUFFIX: Final = ".nii.gz"
CORRECTED_SUFFIX: Final = ".corrected.nii.gz"
"""Suffix of the mask that a person corrected, beside the mask of the batch."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def open_result(outbox: Path, key: str, suffix: str) -> BufferedReader:
    """Open ``OUTBOX/<key>/<key><suffix>`` for reading.

    No symbolic link below the outbox is followed, neither for the folder of the case nor for the file, even if the link
    is created while this function runs. Only regular files are opened. A mask is opened only if it is the one that the
    JSON file beside it describes.

    Args:
        outbox: outbox of the batch.
        key: key of a case in the state of the batch.
        suffix: ``.nii.gz``, ``.corrected.nii.gz``, ``.json`` or ``.png``.

    Raises:
        UnreadableFileError: the file does not exist, is not a regular file, or cannot be opened.
        LabelError: the mask was changed after it was made, so its label values may stand for other organs.
    """
    result = _opened(outbox, key, suffix)
    if suffix == MASK_SUFFIX:
        try:
            with _opened(outbox, key, ".json") as description:
                same = describes(_fields(description), result)
        except BaseException:
            result.close()
            raise
        if not same:
            result.close()
            raise LabelError(
                f"The mask of {key} in the outbox was changed after it was made.",
                remedy="Restore the mask, or move it to a folder of corrected masks and segment the case again.",
            )
        result.seek(0)
    return result


def mask_suffix(outbox: Path, key: str) -> str:
    """Return the suffix of the mask of a case that counts: the corrected mask if there is one, else the batch's."""
    return CORRECTED_SUFFIX if os.path.lexists(outbox / key / f"{key}{CORRECTED_SUFFIX}") else MASK_SUFFIX


def read_mask(outbox: Path, key: str) -> LabelMap:
    """Read the mask that the batch made of a case, with the care of :func:`open_result`.

    Raises:
        InputError: the mask cannot be read, is not a label map, or was changed after it was made.
    """
    with open_result(outbox, key, MASK_SUFFIX) as mask:
        labels = read_label_map(Path(f"/proc/self/fd/{mask.fileno()}"))  # the file that was checked
    return replace(labels, source=outbox / key / f"{key}{MASK_SUFFIX}")


def _fields(description: BufferedReader) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it is damaged, as a file of an earlier version without checksum."""
    try:
        fields = json.load(description)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _opened(outbox: Path, key: str, suffix: str) -> BufferedReader:
    if not _PLAIN_NAME.fullmatch(key):
        raise _unreadable(key, suffix, "the key is not a plain file name")
    try:
        box = os.open(outbox, os.O_RDONLY | os.O_DIRECTORY)
        try:
            folder = os.open(key, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=box)
            try:
                # O_NONBLOCK keeps a named pipe from waiting for a program that writes to it.
                result = os.open(key + suffix, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            finally:
                os.close(folder)
        finally:
            os.close(box)
    except OSError as error:
        raise _unreadable(key, suffix, error.strerror or "it cannot be opened") from error
    if not stat.S_ISREG(os.fstat(result).st_mode):
        os.close(result)
        raise _unreadable(key, suffix, "it is not a regular file")
    return os.fdopen(result, "rb")


def _unreadable(key: str, suffix: str, reason: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"The result {key}{suffix} cannot be read: {reason}.",
        remedy="Restore the file in OUTBOX, or segment the scan again into another OUTBOX.",
    )
