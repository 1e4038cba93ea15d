"""The function that a Dask worker runs for each case of a batch."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fseft_edge.batch.case_work import CaseError, CaseTask, CaseWork
from fseft_edge.batch.worker import WorkerSettings
from fseft_edge.outbox.records import Outcome
from fseft_edge.runtime.system.threads import limit_threads
from fseft_edge.segmentation.segmenter import Segmenter, open_segmenter

_SCRATCH_PREFIX: Final = "fseft-edge-worker-"


@dataclass
class _OpenSegmenter:
    """The segmenter that this process keeps open from case to case."""

    settings: WorkerSettings
    segmenter: Segmenter
    resources: ExitStack


_open: list[_OpenSegmenter] = []
"""At most one element."""


def do_case(settings: WorkerSettings, task: CaseTask, neighbours: Mapping[str, int]) -> Outcome:
    """Segment one case. The encoder stays open for the next case.

    Args:
        settings: settings of every worker.
        task: the case.
        neighbours: number of workers on the machine of each worker, by the address of the worker. They share the memory
            and the cores of their machine.

    Raises:
        FseftEdgeError: this worker cannot segment any case.
    """
    from distributed import get_worker  # noqa: PLC0415 - Dask is optional

    processes = neighbours.get(get_worker().address, 1)
    segmenter = _segmenter(replace(settings, segmentation=replace(settings.segmentation, processes=processes)))
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
    limit_threads(settings.segmentation.processes)
    tempfile.tempdir = str(_scratch_folder())
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)  # its messages quote values of the file
    with ExitStack() as stack:
        segmenter = stack.enter_context(open_segmenter(settings.segmentation))
        _open.append(_OpenSegmenter(settings, segmenter, stack.pop_all()))
    return segmenter


def _scratch_folder() -> Path:
    """Return the folder for temporary files of this process; delete the folders of processes that have ended."""
    root = Path(tempfile.gettempdir())
    own = root if root.name.startswith(_SCRATCH_PREFIX) else root / f"{_SCRATCH_PREFIX}{os.getpid()}"
    for folder in own.parent.glob(f"{_SCRATCH_PREFIX}*"):
        number = folder.name.removeprefix(_SCRATCH_PREFIX)
        if folder != own and number.isdecimal() and not Path(f"/proc/{number}").exists():
            shutil.rmtree(folder, ignore_errors=True)
    own.mkdir(mode=0o700, exist_ok=True)
    return own
