"""How much the accepted masks of a batch were corrected, week by week."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from fseft_edge.batch.statistics import ReportedCase
from fseft_edge.masks.result import MASK_SHA256
from fseft_edge.outbox.records import CorrectedOrgan, Correction, Decision


@dataclass(frozen=True)
class OrganOfWeek:
    """One organ in the masks that were accepted in a week. Every mean counts a mask without correction as 0.

    Attributes:
        name: name of the organ.
        mean_distance_mm: mean of the mean surface distances in mm. None if in every mask the organ was there only
            before or only after the correction; such masks have no distance.
        hd95_mm: mean of the 95th percentiles of the surface distance in mm; None as above.
        added_path_mm: mean of the added path lengths in mm.
    """

    name: str
    mean_distance_mm: float | None
    hd95_mm: float | None
    added_path_mm: float


@dataclass(frozen=True)
class WeekOfCorrections:
    """The masks that were accepted in a week.

    Attributes:
        week: Monday of the week, in UTC.
        accepted: number of accepted masks of which it is known whether they were corrected.
        corrected: number of those that were corrected.
        organs: the organs of these masks.
    """

    week: date
    accepted: int
    corrected: int
    organs: tuple[OrganOfWeek, ...]

    def fields(self) -> dict[str, Any]:
        """Return the week ready for JSON."""
        return asdict(self) | {"week": self.week.isoformat()}


def weeks_of_corrections(cases: Sequence[ReportedCase]) -> list[WeekOfCorrections]:
    """Return the weeks in which masks were accepted, the earliest first; none if no mask was corrected.

    A mask counts in the week of its last decision, if this accepted it. A mask that was accepted from a folder of
    corrected masks does not count, because it was not compared with the mask of the batch.
    """
    if not any(case.record.corrections for case in cases):
        return []
    weeks: dict[date, list[tuple[tuple[CorrectedOrgan, ...], bool]]] = {}
    for case in cases:
        review = case.record.review
        if not case.done or review is None or review.decision != Decision.ACCEPTED:
            continue
        correction = case.record.correction(review.mask_sha256)
        if correction is None and review.mask_sha256 != case.description.get(MASK_SHA256):
            continue
        unchanged = tuple(
            CorrectedOrgan(organ.name, organ.label, organ.volume_ml, 0.0, 0.0, 0.0) for organ in case.record.organs
        )
        day = datetime.fromtimestamp(review.at, UTC).date()
        week = weeks.setdefault(day - timedelta(days=day.weekday()), [])
        week.append((correction.organs if correction else unchanged, correction is not None))
    return [_week(monday, masks) for monday, masks in sorted(weeks.items())]


def _week(monday: date, masks: Sequence[tuple[tuple[CorrectedOrgan, ...], bool]]) -> WeekOfCorrections:
    names = dict.fromkeys(organ.name for organs, _ in masks for organ in organs)
    found = {name: [organ for organs, _ in masks for organ in organs if organ.name == name] for name in names}
    organs = tuple(
        OrganOfWeek(
            name,
            _mean(organ.mean_distance_mm for organ in same),
            _mean(organ.hd95_mm for organ in same),
            _mean(organ.added_path_mm for organ in same) or 0.0,
        )
        for name, same in found.items()
    )
    return WeekOfCorrections(monday, len(masks), sum(corrected for _, corrected in masks), organs)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 3) if known else None


def correction_fields(correction: Correction) -> dict[str, Any]:
    """Return a correction ready for JSON."""
    return asdict(correction) | {"at": correction.when}
