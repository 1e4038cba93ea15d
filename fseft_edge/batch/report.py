"""The morning report of a batch: one page for people, two files for programs."""

from __future__ import annotations

import json
from pathlib import Path

from fseft_edge.batch.report_page import page
from fseft_edge.batch.report_tables import csv_text, json_fields
from fseft_edge.batch.statistics import ReportedCase, reported, statistics_of
from fseft_edge.outbox.records import CaseState
from fseft_edge.outbox.store import BatchStore
from fseft_edge.runtime.system.atomic import atomic_path

_ORDER = (CaseState.DONE, CaseState.RUNNING, CaseState.WAITING, CaseState.CANCELLED)


def write_report(outbox: Path, store: BatchStore, *, show_ids: bool = False, title: str = "Batch report") -> Path:
    """Write ``report.html``, ``report.csv`` and ``report.json`` into the outbox, each complete or not at all.

    The page holds everything that it shows, pictures included, and runs nothing. The same state and results give the
    same bytes on one machine (its times are local). What is missing or damaged in the results of a case is said there
    and costs nothing else. May be called at any time, also while cases are at work.

    Args:
        outbox: holds ``<key>/<key>.nii.gz``, ``.json`` and ``.png`` of every case that is done.
        store: the state of the batch.
        show_ids: name the files and folders that the cases came from, which may be patients' names; else only keys.
        title: of the page.

    Returns:
        The page.

    Raises:
        BatchStateError: the state is damaged or held by another program.
        OutOfSpaceError: the disk is full or cannot be written to.
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
    """Failures first, then masks to look at, then the others; among equals, the order in which they were found.

    Of masks to look at, those that nobody has decided on come first, and those with the most complaints and flags.
    """
    if case.failed:
        return (0,)
    if case.flagged:
        remarks = len(case.complaints) + sum(len(organ.flags) for organ in case.record.organs)
        return (1, int(case.record.review is not None), -remarks)
    return (2 + _ORDER.index(case.record.state),)
