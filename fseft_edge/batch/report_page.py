"""The morning report as a page: what needs attention first, then every case with its picture and organs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from typing import Final

from fseft_edge.batch.report_style import STYLE
from fseft_edge.batch.statistics import BatchStatistics, ReportedCase
from fseft_edge.masks.quality import MEANINGS, SIZE_MARGIN, in_words
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import CaseState, Duplicate, Review, printable
from fseft_edge.report.page import page_around
from fseft_edge.report.range_bar import range_bar
from fseft_edge.report.thumbnails import thumbnail
from fseft_edge.runtime.errors import UnreadableFileError

_STATES: Final = {
    CaseState.FAILED: "failed",
    CaseState.SET_ASIDE: "set aside",
    CaseState.WAITING: "waiting",
    CaseState.RUNNING: "at work",
    CaseState.CANCELLED: "cancelled",
    CaseState.DONE: "done",
}


def page(
    title: str,
    statistics: BatchStatistics,
    cases: Sequence[ReportedCase],
    duplicates: Sequence[Duplicate],
    *,
    show_ids: bool,
) -> str:
    """Return the page; ``cases`` are in the order in which they are shown."""
    failed = [case for case in cases if case.failed]
    flagged = [case for case in cases if case.flagged]
    plain = [case for case in cases if case.done and not case.flagged]
    rest = [case for case in cases if not case.done and not case.failed]
    body = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="summary">{escape(_in_one_sentence(statistics))}</p>',
        _figures(statistics),
        f'<p class="soft">{escape(_when(statistics))}</p></header>',
    ]
    if failed:
        body.append(_section("failed", f"No mask: {len(failed)}", [_failures(failed, show_ids)]))
    if flagged:
        articles = [_article(case, show_ids) for case in flagged]
        body.append(_section("look", f"To look at: {len(flagged)}", [_index(flagged), *articles]))
    if plain:
        body.append(_section("plain", f"Without remark: {len(plain)}", [_article(case, show_ids) for case in plain]))
    if rest:
        body.append(_section("rest", f"Not done: {len(rest)}", [_listing(rest, show_ids)]))
    if duplicates:
        body.append(_section("again", f"Found more than once: {len(duplicates)}", [_again(duplicates, show_ids)]))
    body.append(_section("legend", "How to read this", [_legend(statistics)]))
    return page_around("\n".join(body), title, style=STYLE)


def _in_one_sentence(statistics: BatchStatistics) -> str:
    if not statistics.found:
        return "No case was found."
    parts = [f"{statistics.done} of {statistics.found} cases are segmented"]
    missing = statistics.failed + statistics.set_aside
    if missing:
        parts.append(f"{missing} could not be")
    if statistics.flagged:
        parts.append(f"{_count(statistics.flagged, 'mask')} should be looked at")
    if statistics.waiting:
        parts.append(f"{statistics.waiting} still to be done")
    if len(parts) == 1 and statistics.done:
        return f"{parts[0]}, none with a remark."
    return f"{'; '.join(parts)}."


def _figures(statistics: BatchStatistics) -> str:
    figures = [
        ("found", statistics.found, None),
        ("done", statistics.done, "plain" if statistics.done > statistics.flagged else None),
        ("to look at", statistics.flagged, "look"),
        ("failed", statistics.failed, "failed"),
        ("set aside", statistics.set_aside, "failed"),
        ("waiting", statistics.waiting, "rest"),
        ("cancelled", statistics.cancelled, "rest"),
        ("duplicates", statistics.duplicates, "again"),
    ]
    boxes = []
    for name, number, section in figures:
        kind = f" {section}" if number and section in ("look", "failed") else ""
        amount = f'<a href="#{section}">{number}</a>' if number and section else str(number)
        boxes.append(f'<div class="figure{kind if number else " none"}"><dd>{amount}</dd><dt>{name}</dt></div>')
    return f'<dl class="figures">{"".join(boxes)}</dl>'


def _when(statistics: BatchStatistics) -> str:
    if statistics.began is None:
        return "No case has been begun."
    until = f" to {_local(statistics.ended)}" if statistics.ended is not None else ""
    text = f"{_local(statistics.began)}{until}; {_duration(statistics.busy_seconds)} at work"
    if statistics.cases_per_hour is not None:
        text += f", {_number(statistics.cases_per_hour)} cases an hour"
    return f"{text}."


def _failures(cases: Sequence[ReportedCase], show_ids: bool) -> str:
    items = []
    for case in cases:
        record = case.record
        tries = f" after {_count(record.attempts, 'attempt')}" if record.state == CaseState.SET_ASIDE else ""
        items.append(
            f'<article class="case failed" id="{escape(record.key)}"><div><h3>{escape(record.key)}</h3>'
            f'<p class="state">{_STATES[record.state]}{tries}</p>{_source(case, show_ids)}</div>'
            f"<div><p>{escape(record.reason or 'No reason is known.')}</p>"
            f'<p class="remedy">{escape(record.remedy)}</p>'
            f'<p class="soft">{escape(_joined(record.problem, _ended(case)))}</p></div></article>'
        )
    return "\n".join(items)


def _index(cases: Sequence[ReportedCase]) -> str:
    """One line a case: which organs, and why."""
    rows = []
    for case in cases:
        organs = [
            f"<span>{escape(organ.name)} {_flags(organ.flags)}</span>" for organ in case.record.organs if organ.flags
        ]
        organs += [f'<span class="complaint">{escape(complaint)}</span>' for complaint in case.complaints]
        key = escape(case.record.key)
        rows.append(f'<li><a href="#{key}">{key}</a>{"".join(organs)}{_verdict(case.record.review)}</li>')
    return f'<ul class="index">{"".join(rows)}</ul>'


def _article(case: ReportedCase, show_ids: bool) -> str:
    key = escape(case.record.key)
    complaints = "".join(f'<p class="complaint">{escape(complaint)}</p>' for complaint in case.complaints)
    return (
        f'<article class="case{" look" if case.flagged else ""}" id="{key}">'
        f"<h3>{key}{_verdict(case.record.review)}</h3>"
        f"{_source(case, show_ids)}{complaints}{_note(case.record.review)}"
        f'<div class="both">{_picture(case)}<div>{_organs(case.record.organs)}'
        f'<p class="soft">{escape(_joined(_lattice(case), _stages(case), _ended(case)))}</p></div></div></article>'
    )


def _picture(case: ReportedCase) -> str:
    key = escape(case.record.key)
    try:
        small = thumbnail(case.picture)
    except UnreadableFileError:
        there = case.picture.exists()
        return f'<p class="nothing">{"The picture is damaged." if there else "There is no picture."}</p>'
    alternative = f"{key}: axial, coronal and sagittal plane with the masks' outlines"
    return (
        f'<a class="picture" href="{key}/{key}.png"><img src="{small.source}" width="{small.width}" '
        f'height="{small.height}" alt="{alternative}"></a>'
    )


def _organs(organs: Sequence[SegmentedOrgan]) -> str:
    if not organs:
        return ""
    headings = ("organ", "ml", "support set, ml", "confidence", "median HU")
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    rows = []
    for organ in organs:
        cells = (
            ("ml", "number", _number(organ.volume_ml)),
            ("support set", "range", _against_support(organ)),
            ("confidence", "number", "–" if organ.confidence is None else f"{organ.confidence:.3f}"),
            ("median HU", "number", "–" if organ.median_hu is None else str(organ.median_hu)),
        )
        flags = f'<div class="flags">{_flags(organ.flags)}</div>' if organ.flags else ""
        rows.append(
            f'<tr><th scope="row">{organ.label} {escape(organ.name)}{flags}</th>'
            + "".join(f'<td class="{kind}" data-name="{name}">{cell}</td>' for name, kind, cell in cells)
            + "</tr>"
        )
    return f'<table class="organs"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _against_support(organ: SegmentedOrgan) -> str:
    if organ.support_ml is None:
        return "–"
    low, high = organ.support_ml
    where = "below" if organ.volume_ml < low else "above" if organ.volume_ml > high else "within"
    text = f"{_number(organ.volume_ml)} ml, {where} the support set's {_number(low)} to {_number(high)} ml"
    drawn = range_bar(organ.volume_ml, low, high, margin=SIZE_MARGIN, text=text)
    return f'{drawn}<span class="soft">{_number(low)}–{_number(high)}</span>'


def _flags(flags: Iterable[str]) -> str:
    return " ".join(
        f'<a class="flag" href="#flag-{escape(flag)}" title="{escape(MEANINGS.get(flag, ""))}">'
        f"{escape(in_words(flag))}</a>"
        for flag in flags
    )


def _verdict(review: Review | None) -> str:
    return f'<span class="verdict {review.decision}">{review.decision}</span>' if review else ""


def _note(review: Review | None) -> str:
    if review is None:
        return ""
    note = f": {review.note}" if review.note else ""
    return f'<p class="soft">{escape(f"{review.decision.capitalize()} {_local(review.at)}{note}")}</p>'


def _listing(cases: Sequence[ReportedCase], show_ids: bool) -> str:
    items = (
        f'<li id="{escape(case.record.key)}">{escape(case.record.key)} '
        f'<span class="state">{_STATES[case.record.state]}</span>{_source(case, show_ids)}</li>'
        for case in cases
    )
    return f'<ul class="index">{"".join(items)}</ul>'


def _again(duplicates: Sequence[Duplicate], show_ids: bool) -> str:
    """How often each case lay there beside the first time, or, with names, where."""
    if show_ids:
        lines = [f"{duplicate.key}: {printable(duplicate.source.name)}" for duplicate in duplicates]
    else:
        keys = [duplicate.key for duplicate in duplicates]
        lines = [f"{key}: {_count(keys.count(key), 'further copy', 'further copies')}" for key in dict.fromkeys(keys)]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    said = "They hold what another one held before them, and were not segmented again."
    return f'<p>{said}</p><ul class="index">{items}</ul>'


_WHOSE = "Which file a case is says <code>fseft-edge batch status OUTBOX --show-ids</code> where the state lies."


def _legend(statistics: BatchStatistics) -> str:
    flags = "".join(
        f'<dt id="flag-{flag}">{in_words(flag)}</dt><dd>{escape(meaning)}</dd>' for flag, meaning in MEANINGS.items()
    )
    made = "".join(f'<p class="soft">{escape(line)}</p>' for line in statistics.made_with)
    organs = f"<p>The adapters segment {escape(', '.join(statistics.organs))}.</p>" if statistics.organs else ""
    return (
        "<p>Flags say where a person should look. They are no verdict, and a mask without any may be wrong too.</p>"
        f'<dl class="meanings">{flags}</dl>'
        "<p>The drawing beside a volume: the band is the range of the support set, the line is that range widened by "
        f"{100 * SIZE_MARGIN:.0f} %, the mark is this case. Confidence is the mean probability of the organ's voxels, "
        "0 to 1. The picture is a smaller copy; it leads to the whole one where the report lies beside the results.</p>"
        f"<p>{_WHOSE}</p>{organs}{made}"
    )


def _section(name: str, heading: str, blocks: Iterable[str]) -> str:
    return f'<section id="{name}">\n<h2>{escape(heading)}</h2>\n' + "\n".join(blocks) + "\n</section>"


def _source(case: ReportedCase, show_ids: bool) -> str:
    return f'<p class="source">{escape(case.record.source_name)}</p>' if show_ids else ""


def _lattice(case: ReportedCase) -> str:
    shape, spacing = case.description.get("shape"), case.description.get("spacing_mm")
    if not isinstance(shape, list) or not isinstance(spacing, list):
        return ""
    return f"{' × '.join(map(str, shape))} voxels of {' × '.join(map(str, spacing))} mm"


def _stages(case: ReportedCase) -> str:
    seconds = case.record.seconds
    if seconds is None:
        return ""
    stages = {"read": seconds.read, "encode": seconds.encode, "finish": seconds.finish}
    return ", ".join(f"{name} {_number(value)} s" for name, value in stages.items())


def _ended(case: ReportedCase) -> str:
    return f"ended {_local(case.record.finished_at)}" if case.record.finished_at is not None else ""


def _joined(*parts: str) -> str:
    return " · ".join(part for part in parts if part)


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


def _local(seconds: float | None) -> str:
    """Return the time on this machine's clock, with its distance from UTC."""
    return "" if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")
