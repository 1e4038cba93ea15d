"""The scan that a mask was made of: still there, and still the same."""

from __future__ import annotations

from fseft_edge.outbox.content_key import content_key
from fseft_edge.outbox.records import CaseRecord
from fseft_edge.runtime.errors import InputError
from fseft_edge.runtime.scans.sources import read_scan
from fseft_edge.runtime.scans.volume import Volume


def check_source(case: CaseRecord) -> None:
    """Make sure that a case's scan is the one that its mask was made of.

    Raises:
        UnreadableFileError: it cannot be read any more.
        InputError: something else lies in its place.
    """
    if content_key(case.source) != case.key:
        raise InputError(
            f"The scan of {case.key} has changed since its mask was made.",
            remedy="Put the scan back; or reject the case, and let the batch do what lies there now.",
        )


def read_source(case: CaseRecord) -> Volume:
    """Read the scan that a mask was made of.

    Raises:
        InputError: it cannot be read any more, or something else lies in its place.
    """
    check_source(case)
    return read_scan(case.source)
