"""The batch report as an HTML page: first the cases that need attention, then each case with its picture and organs.

The markup is in ``templates/report.html.j2``. This module computes the content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from fseft_edge.batch.report_corrections import weeks_of_corrections
from fseft_edge.batch.statistics import BatchStatistics, ReportedCase
from fseft_edge.masks.quality import MEANINGS, SIZE_MARGIN, in_words
from fseft_edge.outbox.records import CaseState, Duplicate, printable
from fseft_edge.report.rendering import rendered
from fseft_edge.report.thumbnails import Thumbnail, thumbnail
from fseft_edge.runtime.errors import UnreadableFileError


@dataclass(frozen=True)
class _Figure:
    """A number at the top of the page. A number above zero links to its section, if it has one."""

    name: str
    number: int
    section: str = ""


def page(
    title: str,
    statistics: BatchStatistics,
    cases: Sequence[ReportedCase],
    duplicates: Sequence[Duplicate],
    *,
    show_ids: bool,
) -> str:
    """Return the page. Each section shows its cases in the order of ``cases``."""
    unflagged = [case for case in cases if case.done and not case.flagged]
    return rendered(
        "fseft_edge.batch",
        "report.html.j2",
        title=title,
        show_ids=show_ids,
        statistics=statistics,
        summary=_summary(statistics),
        times=_times(statistics),
        figures=[
            _Figure("found", statistics.found),
            _Figure("done", statistics.done, "unflagged" if unflagged else ""),
            _Figure("to check", statistics.flagged, "flagged"),
            _Figure("with warnings", statistics.warned, "flagged"),
            _Figure("failed", statistics.failed, "failed"),
            _Figure("set aside", statistics.set_aside, "failed"),
            _Figure("waiting or running", statistics.waiting, "unfinished"),
            _Figure("cancelled", statistics.cancelled, "unfinished"),
            _Figure("superseded", statistics.superseded, "superseded"),
            _Figure("duplicates", statistics.duplicates, "duplicates"),
        ],
        failed=[case for case in cases if case.failed],
        flagged=[case for case in cases if case.flagged],
        unflagged=unflagged,
        superseded=[case for case in cases if case.superseded],
        unfinished=[case for case in cases if not (case.done or case.failed or case.superseded)],
        weeks=weeks_of_corrections(cases),
        duplicates=duplicates,
        duplicate_lines=_duplicate_lines(duplicates, show_ids=show_ids),
        meanings=MEANINGS,
        margin=SIZE_MARGIN,
        in_words=in_words,
        state=_state,
        facts=_facts,
        small_picture=_small_picture,
        number=_number,
        local_time=_local_time,
    )


def _summary(statistics: BatchStatistics) -> str:
    if not statistics.found:
        return "The batch has no cases."
    verb = "is" if 1 in (statistics.done, statistics.found) else "are"
    sentences = [f"{statistics.done} of {_count(statistics.found, 'case')} {verb} segmented."]
    missing = statistics.failed + statistics.set_aside
    if missing:
        sentences.append(f"{_count(missing, 'case')} could not be segmented.")
    if statistics.flagged:
        sentences.append(f"A person should check {_count(statistics.flagged, 'mask')}.")
    if statistics.warned:
        whose = "its" if statistics.warned == 1 else "their"
        warned = _count(statistics.warned, "mask")
        sentences.append(f"{warned} must not be used before a person has read {whose} warnings.")
    if statistics.superseded:
        sentences.append(f"{_count(statistics.superseded, 'case is', 'cases are')} superseded by another case.")
    if statistics.waiting:
        sentences.append(f"The batch still has to segment {_count(statistics.waiting, 'case')}.")
    if len(sentences) == 1 and statistics.done:
        sentences.append("No mask has a flag.")
    return " ".join(sentences)


def _times(statistics: BatchStatistics) -> str:
    if statistics.began is None:
        return "No case was started."
    text = f"First case started {_local_time(statistics.began)}"
    if statistics.ended is not None:
        text += f", last case ended {_local_time(statistics.ended)}"
    text += f". Running time: {_duration(statistics.busy_seconds)}"
    if statistics.cases_per_hour is not None:
        text += f", {_number(statistics.cases_per_hour)} cases per hour"
    return f"{text}."


def _state(case: ReportedCase) -> str:
    state = in_words(case.record.state)
    if case.record.state == CaseState.SET_ASIDE:
        return f"{state} after {_count(case.record.attempts, 'attempt')}"
    return state


def _small_picture(case: ReportedCase) -> Thumbnail | None:
    """Return the preview picture of a case; None if the picture is missing or damaged."""
    try:
        return thumbnail(case.picture)
    except UnreadableFileError:
        return None


def _facts(case: ReportedCase) -> str:
    """Return the kind of error, the lattice, the seconds of each stage and the end of a case, as far as known."""
    record = case.record
    facts = [record.problem] if record.problem else []
    shape, spacing = case.description.get("shape"), case.description.get("spacing_mm")
    if isinstance(shape, list) and isinstance(spacing, list):
        facts.append(f"{' × '.join(map(str, shape))} voxels of {' × '.join(map(str, spacing))} mm")
    if case.encoded:
        facts.append(f"encoded: {case.encoded}")
    if record.seconds is not None:
        stages = {"read": record.seconds.read, "encode": record.seconds.encode, "finish": record.seconds.finish}
        facts.append(", ".join(f"{name} {_number(value)} s" for name, value in stages.items()))
    if record.finished_at is not None:
        facts.append(f"ended {_local_time(record.finished_at)}")
    return " · ".join(facts)


def _duplicate_lines(duplicates: Sequence[Duplicate], *, show_ids: bool) -> list[str]:
    """Return a line with the name of each duplicate, or, without names, with the number of copies of each case."""
    if show_ids:
        return [f"{duplicate.key}: {printable(duplicate.source.name)}" for duplicate in duplicates]
    keys = [duplicate.key for duplicate in duplicates]
    return [f"{key}: {_count(keys.count(key), 'further copy', 'further copies')}" for key in dict.fromkeys(keys)]


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def _count(number: int, one: str, more: str | None = None) -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, last = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {last} s" if minutes else f"{last} s"


def _local_time(seconds: float) -> str:
    """Return the time in the local time zone, with the offset from UTC."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")
