"""The source scan of a case: read it only if its content is still the content from which the mask was made."""

from __future__ import annotations

from fseft_edge.outbox.content_key import content_key
from fseft_edge.outbox.records import CaseRecord
from fseft_edge.runtime.errors import InputError
from fseft_edge.runtime.scans.sources import read_scan
from fseft_edge.runtime.scans.volume import Volume


def check_source(case: CaseRecord) -> None:
    """Check that the scan of a case has not changed since its mask was made.

    Raises:
        UnreadableFileError: the scan cannot be read.
        InputError: the file or folder now has other content.
    """
    if content_key(case.source) != case.key:
        raise InputError(
            f"The scan of {case.key} has changed since its mask was made.",
            remedy="Restore the original scan, or reject the case and run the batch on the changed scan.",
        )


def read_source(case: CaseRecord) -> Volume:
    """Read the scan from which the mask of a case was made.

    Raises:
        InputError: the scan cannot be read, or the file or folder now has other content.
    """
    check_source(case)
    return read_scan(case.source)
