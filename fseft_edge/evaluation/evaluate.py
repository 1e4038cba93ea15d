"""Predicted masks against references: DSC, HD95 and normalised surface distance of every case and organ.

An organ whose label a reference lacks was not annotated there (clinical contours are partial): its row says ``absent``,
with the predicted volume but no score, and it is averaged nowhere. An organ that is annotated but not predicted is
``missed``: DSC and normalised surface distance 0, which count, and no HD95, since none is defined; the mean HD95
is that of the cases in which the organ was found, and the number missed stands beside it.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fseft_edge.evaluation.metrics import DEFAULT_NSD_TOLERANCE_MM, score_mask, volume_ml
from fseft_edge.masks.result import organ_labels
from fseft_edge.runtime.errors import FseftEdgeError, GeometryError, InputError, LabelError, UsageError
from fseft_edge.runtime.scans.nifti import case_name, cases_by_name, read_label_map
from fseft_edge.runtime.scans.volume import same_lattice, spacing_of
from fseft_edge.runtime.system.atomic import atomic_path
from fseft_edge.runtime.system.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from rich.table import Table

EVALUATION_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class EvaluationRow:
    """One organ of one case.

    Attributes:
        status: ``scored``; ``missed``: annotated, not predicted; ``absent``: not annotated in this reference.
        dsc: 0 to 1; None when absent.
        hd95_mm: None when absent or missed.
        nsd: normalised surface distance, 0 to 1; None when absent.
        predicted_ml: predicted volume.
        reference_ml: annotated volume; None when absent.
    """

    case: str
    organ: str
    status: Literal["scored", "missed", "absent"]
    dsc: float | None
    hd95_mm: float | None
    nsd: float | None
    predicted_ml: float
    reference_ml: float | None


@dataclass(frozen=True)
class Statistics:
    """Mean, sample standard deviation (None below two values) and median of ``n`` > 0 values."""

    n: int
    mean: float
    sd: float | None
    median: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistics | None:
        """None of no values."""
        if not values:
            return None
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(len(values), statistics.fmean(values), sd, statistics.median(values))


@dataclass(frozen=True)
class OrganSummary:
    """One organ over all cases; a measure is None where no case has it.

    Attributes:
        scored: cases in which the organ was annotated and found.
        missed: cases in which it was annotated and not found; in ``dsc`` and ``nsd`` they count as 0.
        absent: cases in which it was not annotated; counted in no measure.
    """

    organ: str
    scored: int
    missed: int
    absent: int
    dsc: Statistics | None
    hd95_mm: Statistics | None
    nsd: Statistics | None


@dataclass(frozen=True)
class CaseFailure:
    """A case that could not be scored, and what to do about it."""

    case: str
    message: str
    remedy: str


@dataclass(frozen=True)
class Evaluation:
    """The scores of a set of predictions, by case and organ in the order they were asked for.

    Attributes:
        rows: one for each organ of each case compared.
        failures: predictions that could not be compared.
        without_prediction: references that no prediction belongs to.
        organs: names, in order.
        nsd_tolerance_mm: how far a surface may be off and still count as right.
    """

    rows: tuple[EvaluationRow, ...]
    failures: tuple[CaseFailure, ...]
    without_prediction: tuple[str, ...]
    organs: tuple[str, ...]
    nsd_tolerance_mm: float

    def summaries(self) -> tuple[OrganSummary, ...]:
        """Every organ over all cases."""
        return tuple(self._summary(organ) for organ in self.organs)

    def mean_dsc(self) -> float | None:
        """Mean over organs of their mean DSC; None when no organ was annotated anywhere."""
        means = [summary.dsc.mean for summary in self.summaries() if summary.dsc is not None]
        return statistics.fmean(means) if means else None

    def _summary(self, organ: str) -> OrganSummary:
        rows = [row for row in self.rows if row.organ == organ]

        def count(status: str) -> int:
            return sum(row.status == status for row in rows)

        def over(measure: Callable[[EvaluationRow], float | None]) -> Statistics | None:
            return Statistics.of([value for row in rows if (value := measure(row)) is not None])

        return OrganSummary(
            organ=organ,
            scored=count("scored"),
            missed=count("missed"),
            absent=count("absent"),
            dsc=over(lambda row: row.dsc),
            hd95_mm=over(lambda row: row.hd95_mm),
            nsd=over(lambda row: row.nsd),
        )

    def table(self) -> Table:
        """Every row, then each organ's mean ± standard deviation, for a terminal or a log."""
        from rich.table import Table  # noqa: PLC0415  only where a table is shown
        from rich.text import Text  # noqa: PLC0415 - likewise

        table = Table(caption=self._caption(), caption_justify="left")
        for heading in ("case", "organ"):
            table.add_column(heading)
        for heading in ("DSC", "HD95 mm", f"NSD {self.nsd_tolerance_mm:g} mm", "ml", "reference ml"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            dsc = _number(row.dsc, 3, missing=row.status)
            numbers = (dsc, _number(row.hd95_mm, 1), _number(row.nsd, 3))
            volumes = (_number(row.predicted_ml, 1), _number(row.reference_ml, 1))
            table.add_row(Text(row.case), Text(row.organ), *numbers, *volumes)
        table.add_section()
        for summary in self.summaries():
            cases = f"mean of {summary.scored + summary.missed}"
            numbers = (_mean(summary.dsc, 3), _mean(summary.hd95_mm, 1), _mean(summary.nsd, 3))
            table.add_row(cases, Text(summary.organ), *numbers, style="bold")
        return table

    def _caption(self) -> str:
        missed = sum(row.status == "missed" for row in self.rows)
        absent = sum(row.status == "absent" for row in self.rows)
        parts = ["mean ± standard deviation"]
        if absent:
            parts.append(f"{absent} absent (not annotated in the reference): not averaged")
        if missed:
            parts.append(f"{missed} missed: DSC and NSD 0, no HD95")
        if self.without_prediction:
            parts.append(f"references without a prediction, left out: {len(self.without_prediction)}")
        if self.failures:
            parts.append(f"{len(self.failures)} {'case' if len(self.failures) == 1 else 'cases'} failed")
        return "; ".join(parts)

    def to_csv(self, path: Path) -> None:
        """Write one line per case and organ; empty where there is no value.

        Raises:
            OutOfSpaceError: the disk is full or not writable.
        """
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(EvaluationRow.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)

    def to_json(self, path: Path) -> None:
        """Write what :meth:`as_dict` returns.

        Raises:
            OutOfSpaceError: the disk is full or not writable.
        """
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """Rows, summaries and failures, ready for JSON."""
        return {
            "schema_version": EVALUATION_SCHEMA_VERSION,
            "nsd_tolerance_mm": self.nsd_tolerance_mm,
            "organs": [asdict(summary) for summary in self.summaries()],
            "cases": [asdict(row) for row in self.rows],
            "without_prediction": list(self.without_prediction),
            "failures": [asdict(failure) for failure in self.failures],
        }


def evaluate(
    predictions: Path,
    references: Path,
    organs: Mapping[str, int],
    *,
    prediction_ids: Mapping[str, int] | None = None,
    nsd_tolerance_mm: float = DEFAULT_NSD_TOLERANCE_MM,
    progress: Progress | None = None,
) -> Evaluation:
    """Score every predicted label map against the reference of the same case name.

    Two folders pair by name. A prediction without a reference is a failed case; references without a prediction are
    counted and left out, so that part of a reference folder can be scored. A single file pairs with the file of its
    name in the other folder, or with the other single file whatever its name. A case that fails is listed and the
    others go on.

    Args:
        predictions: a label map or a folder of them, as ``segment`` writes.
        references: a label map or a folder of them.
        organs: name → label value in the references.
        prediction_ids: name → label value in the predictions; when None they are read from the ``<case>.json`` that
            ``segment`` writes beside the mask; without that file they are those of the references.
        nsd_tolerance_mm: how far a surface may be off and still count as right, mm.
        progress: told of every case.

    Raises:
        UsageError: no organ, ``prediction_ids`` lacks one, or the tolerance is no length.
        UnreadableFileError: predictions or references are not there at all.
        InputError: no prediction has a reference of its name.
        LabelError: no reference that could be read has any of the organs.
    """
    if not organs:
        raise UsageError("No organ to evaluate was named.", remedy="Name at least one, such as --organ liver=6.")
    if prediction_ids is not None and (missing := [name for name in organs if name not in prediction_ids]):
        raise UsageError(
            f"No label value is given for {', '.join(missing)} in the predictions.",
            remedy="Give one for every organ, or none to read them from the predictions' JSON.",
        )
    if not (math.isfinite(nsd_tolerance_mm) and nsd_tolerance_mm >= 0):
        raise UsageError(
            f"A surface tolerance of {nsd_tolerance_mm} mm is impossible.", remedy="Give 0 or a few millimetres."
        )
    pairs, failures, without_prediction = _paired(predictions, references)
    rows: list[EvaluationRow] = []
    with (progress or SilentProgress()).task("evaluate", total=len(pairs)) as task:
        for pair in pairs:
            try:
                ids = _ids_in_prediction(pair.prediction, organs) if prediction_ids is None else prediction_ids
                rows += _evaluate_case(pair, organs, ids, nsd_tolerance_mm)
            except FseftEdgeError as error:
                failures.append(CaseFailure(pair.case, error.message, error.remedy))
            task.advance()
    if rows and all(row.status == "absent" for row in rows):
        wanted = ", ".join(f"{name}={label}" for name, label in organs.items())
        raise LabelError(
            f"No reference in {references} has a voxel of {wanted}.", remedy="Check the label values of the references."
        )
    return Evaluation(tuple(rows), tuple(failures), without_prediction, tuple(organs), nsd_tolerance_mm)


@dataclass(frozen=True)
class _Pair:
    case: str
    prediction: Path
    reference: Path


def _paired(predictions: Path, references: Path) -> tuple[list[_Pair], list[CaseFailure], tuple[str, ...]]:
    predicted, reference = cases_by_name(predictions), cases_by_name(references)
    if predictions.is_file() and references.is_file():
        return [_Pair(case_name(predictions), predictions, references)], [], ()
    pairs = [_Pair(case, path, reference[case]) for case, path in predicted.items() if case in reference]
    if not pairs:
        raise InputError(
            f"No prediction in {predictions} has the name of a reference in {references}.",
            remedy="Name the files of one case alike, such as hn_002.nii.gz in both folders.",
        )
    failures = [
        CaseFailure(
            case,
            f"{path} has no reference of its name in {references}.",
            f"Add {case}.nii.gz to {references}, or leave it out.",
        )
        for case, path in predicted.items()
        if references.is_dir() and case not in reference
    ]
    return pairs, failures, tuple(sorted(reference.keys() - predicted.keys()))


def _evaluate_case(
    pair: _Pair, organs: Mapping[str, int], ids: Mapping[str, int], tolerance_mm: float
) -> list[EvaluationRow]:
    prediction, reference = read_label_map(pair.prediction), read_label_map(pair.reference)
    if not same_lattice(prediction, reference):
        raise GeometryError(
            f"{pair.prediction} and {pair.reference} do not lie on the same lattice.",
            remedy="Compare masks of the same scan, on the lattice of that scan.",
        )
    rows = []
    for organ, label in organs.items():
        predicted, truth = prediction.array == ids[organ], reference.array == label
        predicted_ml = volume_ml(predicted, prediction.voxel_volume_mm3)
        reference_ml = volume_ml(truth, reference.voxel_volume_mm3)
        if reference_ml == 0:
            row = EvaluationRow(pair.case, organ, "absent", None, None, None, predicted_ml, None)
        elif predicted_ml == 0:
            row = EvaluationRow(pair.case, organ, "missed", 0.0, None, 0.0, predicted_ml, reference_ml)
        else:
            score = score_mask(predicted, truth, spacing_of(reference.affine), nsd_tolerance_mm=tolerance_mm)
            scores = (score.dsc, score.hd95_mm, score.nsd)
            row = EvaluationRow(pair.case, organ, "scored", *scores, predicted_ml, reference_ml)
        rows.append(row)
    return rows


def _ids_in_prediction(prediction: Path, organs: Mapping[str, int]) -> dict[str, int]:
    """The label value of each organ in a predicted mask, from the JSON that ``segment`` writes beside it."""
    description = prediction.with_name(f"{case_name(prediction)}.json")
    if not description.exists():
        return dict(organs)
    ids = organ_labels(description)
    if missing := [name for name in organs if name not in ids]:
        raise LabelError(
            f"{description} names no {' and no '.join(missing)}, only {', '.join(ids) or 'nothing'}.",
            remedy="Evaluate organs that were segmented, under the names of their adapters.",
        )
    return ids


def _number(value: float | None, digits: int, *, missing: str = "–") -> str:
    return missing if value is None else f"{value:.{digits}f}"


def _mean(values: Statistics | None, digits: int) -> str:
    if values is None:
        return "–"
    return f"{values.mean:.{digits}f}" + ("" if values.sd is None else f" ± {values.sd:.{digits}f}")
