"""The report of a batch: an HTML page for people, and a CSV and a JSON file for programs."""

from __future__ import annotations

import json
from pathlib import Path

from fseft_edge.batch.report_page import page
from fseft_edge.batch.report_tables import csv_text, json_fields
from fseft_edge.batch.statistics import ReportedCase, reported, statistics_of
from fseft_edge.outbox.records import CaseState
from fseft_edge.outbox.store import BatchStore
from fseft_edge.runtime.system.atomic import atomic_path

_ORDER = (CaseState.DONE, CaseState.SUPERSEDED, CaseState.RUNNING, CaseState.WAITING, CaseState.CANCELLED)


def write_report(outbox: Path, store: BatchStore, *, show_ids: bool = False, title: str = "Batch report") -> Path:
    """Write ``report.html``, ``report.csv`` and ``report.json`` into the outbox; each file is replaced in one step.

    The page contains its pictures, loads nothing and runs no script. The same state and results give the same bytes in
    the same time zone, because the page shows local times. If results of a case are missing or damaged, the report
    states this for the case and is otherwise complete. The function can be called at any time, also while cases are
    running.

    Args:
        outbox: folder with ``<key>/<key>.nii.gz``, ``.json`` and ``.png`` of each case that is done.
        store: state of the batch.
        show_ids: whether to show the names of the source files and folders, which may contain patients' names; if not,
            the report names cases only by their keys.
        title: title of the page.

    Returns:
        The path of the page.

    Raises:
        BatchStateError: the state is damaged or locked by another program.
        OutOfSpaceError: the disk is full or not writable.
    """
    cases = sorted((reported(outbox, record) for record in store.cases()), key=_urgency)
    duplicates = store.duplicates()
    statistics = statistics_of(cases, len(duplicates))
    fields = json_fields(title, statistics, cases, duplicates, show_ids=show_ids)
    texts = {
        "report.csv": csv_text(cases, show_ids=show_ids),
        "report.json": json.dumps(fields, indent=2, ensure_ascii=False) + "\n",
        "report.html": page(title, statistics, cases, duplicates, show_ids=show_ids),
    }
    for name, text in texts.items():
        with atomic_path(outbox / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return outbox / "report.html"


def _urgency(case: ReportedCase) -> tuple[int, ...]:
    """Return the sort key of a case: first cases without a mask, then masks to check, then the others.

    Masks to check are sorted by review (masks without a decision first), then by number of warnings, complaints and
    flags (most first). Cases with equal keys keep the order in which they were found.
    """
    if case.failed:
        return (0,)
    if case.flagged:
        remarks = len(case.complaints) + len(case.record.warnings)
        remarks += sum(len(organ.flags) for organ in case.record.organs)
        return (1, int(case.record.review is not None), -remarks)
    return (2 + _ORDER.index(case.record.state),)
