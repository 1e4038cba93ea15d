"""Comparison of predicted masks with references: DSC, HD95 and normalised surface distance of every case and organ.

If a reference does not contain the label value of an organ, the organ was not annotated in that case (clinical contours
are partial). The row of this organ has the status ``absent`` and the predicted volume, but no scores, and does not
count in any mean. If an organ is annotated but not predicted, its row has the status ``missed``: DSC and normalised
surface distance are 0 and count in the means. HD95 is not defined for a missed organ, so the mean HD95 covers only the
cases in which the organ was found, and the summary states the number of missed cases.
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
    """The scores of one organ in one case.

    Attributes:
        case: case name.
        organ: organ name.
        status: ``scored``; ``missed`` (annotated, but not predicted); ``absent`` (not annotated in this reference).
        dsc: Dice similarity coefficient, 0 to 1; None for status ``absent``.
        hd95_mm: 95th percentile of the Hausdorff distance in mm; None for status ``absent`` or ``missed``.
        nsd: normalised surface distance, 0 to 1; None for status ``absent``.
        predicted_ml: volume of the predicted mask in ml.
        reference_ml: volume of the reference in ml; None for status ``absent``.
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
    """The mean, the sample standard deviation (None for fewer than two values) and the median of ``n`` > 0 values."""

    n: int
    mean: float
    sd: float | None
    median: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistics | None:
        """Return the statistics of values; None if there are no values."""
        if not values:
            return None
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(len(values), statistics.fmean(values), sd, statistics.median(values))


@dataclass(frozen=True)
class OrganSummary:
    """The statistics of one organ over all cases.

    Attributes:
        organ: organ name.
        scored: number of cases in which the organ is annotated and predicted.
        missed: number of cases in which the organ is annotated but not predicted; they count as 0 in ``dsc`` and
            ``nsd``.
        absent: number of cases in which the organ is not annotated; they do not count in any statistics.
        dsc: statistics of the DSC; None if no case has a value.
        hd95_mm: statistics of the HD95 in mm; None if no case has a value.
        nsd: statistics of the normalised surface distance; None if no case has a value.
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
    """A case that could not be scored, with error message and remedy."""

    case: str
    message: str
    remedy: str


@dataclass(frozen=True)
class Evaluation:
    """The scores of a set of predictions.

    Attributes:
        rows: one row for each organ of each compared case, in the order of the cases and of ``organs``.
        failures: predictions that could not be compared.
        without_prediction: case names of references without a prediction.
        organs: organ names in the order of the arguments of :func:`evaluate`.
        nsd_tolerance_mm: tolerance of the normalised surface distance in mm.
    """

    rows: tuple[EvaluationRow, ...]
    failures: tuple[CaseFailure, ...]
    without_prediction: tuple[str, ...]
    organs: tuple[str, ...]
    nsd_tolerance_mm: float

    def summaries(self) -> tuple[OrganSummary, ...]:
        """Return the statistics of every organ over all cases."""
        return tuple(self._summary(organ) for organ in self.organs)

    def mean_dsc(self) -> float | None:
        """Return the mean of the mean DSC of all organs; None if no organ is annotated in any case."""
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
        """Return a table of all rows and of mean ± standard deviation of each organ, for a terminal or a log."""
        from rich.table import Table  # noqa: PLC0415 - only needed to display a table
        from rich.text import Text  # noqa: PLC0415 - only needed to display a table

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
            parts.append(f"references without a prediction (skipped): {len(self.without_prediction)}")
        if self.failures:
            parts.append(f"{len(self.failures)} {'case' if len(self.failures) == 1 else 'cases'} failed")
        return "; ".join(parts)

    def to_csv(self, path: Path) -> None:
        """Write a CSV file with one line per case and organ; cells without a value are empty.

        Raises:
            OutOfSpaceError: the disk is full, or the folder is not writable.
        """
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(EvaluationRow.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)

    def to_json(self, path: Path) -> None:
        """Write the result of :meth:`as_dict` as a JSON file.

        Raises:
            OutOfSpaceError: the disk is full, or the folder is not writable.
        """
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """Return rows, statistics and failures as a dictionary for JSON."""
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
    """Score every predicted label map with the reference of the same case name.

    Files of two folders are paired by case name. A prediction without a reference is a failed case. References without
    a prediction are counted and skipped, so that a part of a reference folder can be scored. A single file is paired
    with the file of its case name in the other folder. Two single files are paired independently of their names. A
    failed case is listed, and the evaluation continues with the other cases.

    Args:
        predictions: label map, or folder of label maps, as ``segment`` writes them.
        references: label map, or folder of label maps.
        organs: label value of each organ in the references.
        prediction_ids: label value of each organ in the predictions. If None, the values are read from the file
            ``<case>.json`` that ``segment`` writes next to the mask; without this file, the values of the references
            apply.
        nsd_tolerance_mm: tolerance of the normalised surface distance in mm.
        progress: receiver of progress reports; None reports nothing.

    Raises:
        UsageError: ``organs`` is empty, ``prediction_ids`` does not contain all organs, or the tolerance is negative or
            not finite.
        UnreadableFileError: the predictions or the references do not exist.
        InputError: no prediction has a reference of its case name.
        LabelError: no readable reference contains any of the organs.
    """
    if not organs:
        raise UsageError(
            "No organ is given for the evaluation.", remedy="Give at least one organ, for example --organ liver=6."
        )
    if prediction_ids is not None and (missing := [name for name in organs if name not in prediction_ids]):
        raise UsageError(
            f"prediction_ids contains no label value for {', '.join(missing)}.",
            remedy="Give prediction_ids a label value for every organ, or use None to read the values from the JSON "
            "files of the predictions.",
        )
    if not (math.isfinite(nsd_tolerance_mm) and nsd_tolerance_mm >= 0):
        raise UsageError(
            f"The surface tolerance {nsd_tolerance_mm} mm is negative or not finite.",
            remedy="Give --nsd-tolerance a value of 0 mm or more, for example 2.",
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
            f"No reference in {references} contains a voxel of {wanted}.",
            remedy="Check the label values of the references, and correct --organ.",
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
            f"No prediction in {predictions} has the file name of a reference in {references}.",
            remedy="Give both files of a case the same name, for example hn_002.nii.gz in both folders.",
        )
    failures = [
        CaseFailure(
            case,
            f"The prediction {path} has no reference of its file name in {references}.",
            f"Add the reference {case}.nii.gz to {references}, or remove the prediction.",
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
            f"The prediction {pair.prediction} and the reference {pair.reference} have different lattices.",
            remedy="Give a prediction and a reference of the same scan, both on the lattice of the scan.",
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
    """Return the label value of each organ in a prediction, from the JSON file that ``segment`` writes next to it."""
    description = prediction.with_name(f"{case_name(prediction)}.json")
    if not description.exists():
        return dict(organs)
    ids = organ_labels(description)
    if missing := [name for name in organs if name not in ids]:
        raise LabelError(
            f"{description} contains no label value for {', '.join(missing)}. Its organs are: "
            f"{', '.join(ids) or 'none'}.",
            remedy="Give --organ the organ names of the adapters with which the case was segmented.",
        )
    return ids


def _number(value: float | None, digits: int, *, missing: str = "–") -> str:
    return missing if value is None else f"{value:.{digits}f}"


def _mean(values: Statistics | None, digits: int) -> str:
    if values is None:
        return "–"
    return f"{values.mean:.{digits}f}" + ("" if values.sd is None else f" ± {values.sd:.{digits}f}")
