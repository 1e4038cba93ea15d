"""The batch report for other programs: CSV with one row for each case and organ, and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

from fseft_edge.batch.report_corrections import correction_fields, weeks_of_corrections
from fseft_edge.batch.statistics import BatchStatistics, ReportedCase
from fseft_edge.masks.quality import MEANINGS
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import CorrectedOrgan, Duplicate, Review, printable

SCHEMA_VERSION: Final = 1

COLUMNS: Final[tuple[str, ...]] = (
    "case",
    "source",
    "state",
    "organ",
    "label",
    "volume_ml",
    "support_min_ml",
    "support_max_ml",
    "confidence",
    "median_hu",
    "flags",
    "problem",
    "reason",
    "remedy",
    "complaints",
    "attempts",
    "found_at",
    "started_at",
    "finished_at",
    "read_s",
    "encode_s",
    "finish_s",
    "review",
    "review_note",
    "warnings",
    "superseded_by",
    "review_by",
    "review_at",
    "review_mask_sha256",
    "encoded",
    "corrected_by",
    "corrected_at",
    "corrected_mask_sha256",
    "corrected_volume_ml",
    "mean_distance_mm",
    "hd95_mm",
    "added_path_mm",
)
"""Columns of ``report.csv``. Later versions may add columns at the end."""

_FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")


def csv_text(cases: Sequence[ReportedCase], *, show_ids: bool) -> str:
    """Return the CSV: one row for each organ of each case that is done, and one row for each other case."""
    written = io.StringIO()
    writer = csv.DictWriter(written, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for case in cases:
        of_case = _case_cells(case, show_ids=show_ids)
        corrected = (
            {organ.name: organ for organ in case.record.corrections[-1].organs} if case.record.corrections else {}
        )
        for organ in case.record.organs or (None,):
            cells = of_case | (_organ_cells(organ, corrected.get(organ.name)) if organ else {})
            writer.writerow({name: _harmless(value) for name, value in cells.items() if value is not None})
    return written.getvalue()


def json_fields(
    title: str,
    statistics: BatchStatistics,
    cases: Sequence[ReportedCase],
    duplicates: Sequence[Duplicate],
    *,
    show_ids: bool,
) -> dict[str, Any]:
    """Return the content of ``report.json``."""
    return {
        "schema_version": SCHEMA_VERSION,
        "title": title,
        "summary": {
            **asdict(statistics),
            "began": _time(statistics.began),
            "ended": _time(statistics.ended),
            "busy_seconds": round(statistics.busy_seconds, 3),
            "cases_per_hour": None if statistics.cases_per_hour is None else round(statistics.cases_per_hour, 2),
        },
        "corrections_by_week": [week.fields() for week in weeks_of_corrections(cases)],
        "cases": [_case_fields(case, show_ids=show_ids) for case in cases],
        "duplicates": [
            {"case": duplicate.key, "source": printable(duplicate.source.name) if show_ids else None}
            for duplicate in duplicates
        ],
        "flags": MEANINGS,
    }


def _case_fields(case: ReportedCase, *, show_ids: bool) -> dict[str, Any]:
    record = case.record
    return {
        "case": record.key,
        "source": record.source_name if show_ids else None,
        "state": record.state.value,
        "flagged": case.flagged,
        "problem": record.problem,
        "reason": record.reason,
        "remedy": record.remedy,
        "complaints": list(case.complaints),
        "warnings": list(record.warnings),
        "encoded": case.encoded or None,
        "superseded_by": record.superseded_by or None,
        "attempts": record.attempts,
        "found_at": _time(record.found_at),
        "started_at": _time(record.started_at),
        "finished_at": _time(record.finished_at),
        "seconds": asdict(record.seconds) if record.seconds else None,
        "organs": [asdict(organ) for organ in record.organs],
        "review": _decision_fields(record.review) if record.review else None,
        "decisions": [_decision_fields(review) for review in record.decisions],
        "corrections": [correction_fields(correction) for correction in record.corrections],
    }


def _decision_fields(review: Review) -> dict[str, str | None]:
    return {
        "decision": review.decision.value,
        "note": review.note,
        "at": review.when,
        "reviewer": review.reviewer or None,
        "mask_sha256": review.mask_sha256 or None,
    }


def _case_cells(case: ReportedCase, *, show_ids: bool) -> dict[str, str | float | None]:
    seconds, review = case.record.seconds, case.record.review
    correction = case.record.corrections[-1] if case.record.corrections else None
    fields = _case_fields(case, show_ids=show_ids)
    return {name: fields[name] for name in COLUMNS if name in fields} | {
        "complaints": " ".join(case.complaints),
        "warnings": " ".join(case.record.warnings),
        "read_s": round(seconds.read, 3) if seconds else None,
        "encode_s": round(seconds.encode, 3) if seconds else None,
        "finish_s": round(seconds.finish, 3) if seconds else None,
        "review": review.decision.value if review else None,
        "review_note": review.note if review else None,
        "review_by": review.reviewer if review else None,
        "review_at": review.when if review else None,
        "review_mask_sha256": review.mask_sha256 if review else None,
        "corrected_by": correction.reviewer if correction else None,
        "corrected_at": correction.when if correction else None,
        "corrected_mask_sha256": correction.mask_sha256 if correction else None,
    }


def _organ_cells(organ: SegmentedOrgan, corrected: CorrectedOrgan | None) -> dict[str, str | float | None]:
    low, high = organ.support_ml or (None, None)
    return {
        "organ": organ.name,
        "label": organ.label,
        "volume_ml": organ.volume_ml,
        "support_min_ml": low,
        "support_max_ml": high,
        "confidence": organ.confidence,
        "median_hu": organ.median_hu,
        "flags": " ".join(organ.flags),
        "corrected_volume_ml": corrected.volume_ml if corrected else None,
        "mean_distance_mm": corrected.mean_distance_mm if corrected else None,
        "hd95_mm": corrected.hd95_mm if corrected else None,
        "added_path_mm": corrected.added_path_mm if corrected else None,
    }


def _harmless(value: str | float) -> str | float:
    """Return a cell that spreadsheet programs do not treat as a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value


def _time(seconds: float | None) -> str | None:
    """Return the time as ISO 8601 in UTC, rounded down to the second."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
