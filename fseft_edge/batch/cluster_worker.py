"""What a Dask worker does with a case of a batch."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fseft_edge.batch.case_work import CaseError, CaseTask, CaseWork
from fseft_edge.batch.worker import WorkerSettings
from fseft_edge.outbox.records import Outcome
from fseft_edge.segmentation.segmenter import Segmenter, open_segmenter

_SCRATCH: Final = "fseft-edge-worker-"


@dataclass
class _Open:
    """The encoder that this process has open, for one case after another."""

    settings: WorkerSettings
    segmenter: Segmenter
    resources: ExitStack


_open: list[_Open] = []
"""Of this process; at most one."""


def do_case(settings: WorkerSettings, task: CaseTask) -> Outcome:
    """Segment one case; the encoder stays open for the next.

    Raises:
        FseftEdgeError: this worker cannot segment at all.
    """
    segmenter = _segmenter(settings)
    work = CaseWork(segmenter, settings.outbox, settings.fingerprint)
    try:
        return work.finish(work.encode(work.read(task)))
    except CaseError as error:
        return error.outcome


def _segmenter(settings: WorkerSettings) -> Segmenter:
    if _open and _open[0].settings == settings:
        return _open[0].segmenter
    while _open:
        _open.pop().resources.close()
    tempfile.tempdir = str(_scratch())
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)  # it quotes what it reads
    with ExitStack() as stack:
        segmenter = stack.enter_context(open_segmenter(settings.segmentation))
        _open.append(_Open(settings, segmenter, stack.pop_all()))
    return segmenter


def _scratch() -> Path:
    """Return a folder for this process's temporary files; those of processes that are gone are removed."""
    root = Path(tempfile.gettempdir())
    ours = root if root.name.startswith(_SCRATCH) else root / f"{_SCRATCH}{os.getpid()}"
    for folder in ours.parent.glob(f"{_SCRATCH}*"):
        number = folder.name.removeprefix(_SCRATCH)
        if folder != ours and number.isdecimal() and not Path(f"/proc/{number}").exists():
            shutil.rmtree(folder, ignore_errors=True)
    ours.mkdir(mode=0o700, exist_ok=True)
    return ours
