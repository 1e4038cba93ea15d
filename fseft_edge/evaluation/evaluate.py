"""Comparison of predicted masks with references: DSC, HD95 and normalised surface distance of every case and organ.

If an organ is annotated but not predicted, its row has the status ``missed``: DSC and normalised surface distance are 0
and count in the means. HD95 is not defined for a missed organ, so the mean HD95 covers only the cases in which the
organ was found, and the summary states the number of missed cases.

If a reference does not contain the label value of an organ, this has one of two meanings:

- The organ was not annotated in that case (clinical contours are partial). This is the default. The row has the status
  ``absent``, a word of the file format that means "not annotated", and no scores: a mask of the organ may be right.
- The organ does not exist in that scan, or was removed. References state this only for organs that were annotated in
  every scan that shows them, and the user names these organs (``always_annotated``). If the mask contains the organ,
  the row has the status ``false_positive``: DSC and normalised surface distance are 0 and count in the means, as in
  nnU-Net (Isensee et al., Nature Methods 18 (2021) 203-211). If the mask does not contain the organ either, the status
  is ``true_negative``; there are no scores, and the case counts in no mean, as in nnU-Net.

In both cases the summary of the organ states in how many cases only the mask contains the organ, and the volume.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from fseft_edge.evaluation.metrics import DEFAULT_NSD_TOLERANCE_MM, score_mask, volume_ml
from fseft_edge.masks.mask_image import Mask
from fseft_edge.masks.result import case_in, organ_labels
from fseft_edge.runtime.errors import EnvironmentProblemError, FseftEdgeError, InputError, LabelError, UsageError
from fseft_edge.runtime.scans.annotated import AnnotationSettings, annotations_by_case
from fseft_edge.runtime.scans.annotation import Annotation
from fseft_edge.runtime.scans.annotation_files import (
    FoundAnnotation,
    contents_of,
    names_structures,
    organs_of_label_map,
    organs_of_structures,
    structures_of,
)
from fseft_edge.runtime.scans.given import GivenLabels, given_labels
from fseft_edge.runtime.scans.image_files import read_label_names
from fseft_edge.runtime.scans.nifti import case_name
from fseft_edge.runtime.scans.organs import GivenOrgans, OrganLabel, organs_of
from fseft_edge.runtime.scans.structures import Lattice
from fseft_edge.runtime.scans.volume import LabelMap, labels_on, spacing_of
from fseft_edge.runtime.system.atomic import atomic_path
from fseft_edge.runtime.system.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table

EVALUATION_SCHEMA_VERSION = 2

Status = Literal["scored", "missed", "absent", "false_positive", "true_negative"]

_SHOWN: Mapping[Status, str] = {
    "scored": "scored",
    "missed": "missed",
    "absent": "not annotated",
    "false_positive": "false positive",
    "true_negative": "true negative",
}

# The label values of an organ are probably wrong if another label value of the mask reaches a DSC that is higher by
# this amount.
_MUCH_BETTER = 0.3


@dataclass(frozen=True)
class EvaluationRow:
    """The scores of one organ in one case.

    Attributes:
        case: case name.
        organ: organ name.
        status: ``scored``; ``missed`` (annotated, but not predicted); ``absent`` (not annotated in this reference);
            ``false_positive`` (predicted, but the reference states that the organ is absent); ``true_negative``
            (neither predicted nor in the scan, according to the reference). The module explains them.
        dsc: Dice similarity coefficient, 0 to 1; None for status ``absent`` or ``true_negative``.
        hd95_mm: 95th percentile of the Hausdorff distance in mm; None for every status except ``scored``.
        nsd: normalised surface distance, 0 to 1; None for status ``absent`` or ``true_negative``.
        predicted_ml: volume of the predicted mask in ml.
        reference_ml: volume of the reference in ml; None for status ``absent``.
    """

    case: str
    organ: str
    status: Status
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
        false_positives: number of cases in which the organ is predicted, but is absent according to the reference; they
            count as 0 in ``dsc`` and ``nsd``.
        true_negatives: number of cases in which the organ is neither predicted nor in the scan, according to the
            reference; they do not count in any statistics.
        only_predicted: number of cases in which the mask contains the organ and the reference does not, whether the
            organ was not annotated or is absent.
        only_predicted_ml: total volume of the organ in the masks of these cases in ml.
        dsc: statistics of the DSC; None if no case has a value.
        hd95_mm: statistics of the HD95 in mm; None if no case has a value.
        nsd: statistics of the normalised surface distance; None if no case has a value.
    """

    organ: str
    scored: int
    missed: int
    absent: int
    false_positives: int
    true_negatives: int
    only_predicted: int
    only_predicted_ml: float
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
        always_annotated: organs that were annotated in every scan that shows them.
        hints: signs that label values are wrong, as sentences.
    """

    rows: tuple[EvaluationRow, ...]
    failures: tuple[CaseFailure, ...]
    without_prediction: tuple[str, ...]
    organs: tuple[str, ...]
    nsd_tolerance_mm: float
    always_annotated: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()

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

        only_predicted = [row.predicted_ml for row in rows if not row.reference_ml and row.predicted_ml]
        return OrganSummary(
            organ=organ,
            scored=count("scored"),
            missed=count("missed"),
            absent=count("absent"),
            false_positives=count("false_positive"),
            true_negatives=count("true_negative"),
            only_predicted=len(only_predicted),
            only_predicted_ml=round(math.fsum(only_predicted), 6),
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
            dsc = _number(row.dsc, 3, missing=_SHOWN[row.status])
            numbers = (dsc, _number(row.hd95_mm, 1), _number(row.nsd, 3))
            volumes = (_number(row.predicted_ml, 1), _number(row.reference_ml, 1))
            table.add_row(Text(row.case), Text(row.organ), *numbers, *volumes)
        table.add_section()
        for summary in self.summaries():
            cases = f"mean of {summary.scored + summary.missed + summary.false_positives}"
            numbers = (_mean(summary.dsc, 3), _mean(summary.hd95_mm, 1), _mean(summary.nsd, 3))
            table.add_row(cases, Text(summary.organ), *numbers, style="bold")
            if summary.only_predicted:
                without = summary.absent + summary.false_positives + summary.true_negatives
                cases = f"only in the mask: {summary.only_predicted} of {without}"
                table.add_row(cases, Text(summary.organ), "–", "–", "–", _number(summary.only_predicted_ml, 1), "–")
        return table

    def _caption(self) -> str:
        statuses = Counter(row.status for row in self.rows)
        parts = ["mean ± standard deviation"]
        if statuses["absent"]:
            parts.append(f"{statuses['absent']} not annotated in the reference: not averaged")
        if unknown := sum(row.status == "absent" and row.predicted_ml > 0 for row in self.rows):
            parts.append(
                f"{unknown} only in the mask and not averaged: these are false positives if the organ is always "
                "annotated where it exists"
            )
        if statuses["true_negative"]:
            parts.append(f"{statuses['true_negative']} true negative: not averaged")
        if statuses["false_positive"]:
            parts.append(f"{statuses['false_positive']} false positive: DSC and NSD 0, no HD95")
        if statuses["missed"]:
            parts.append(f"{statuses['missed']} missed: DSC and NSD 0, no HD95")
        if self.without_prediction:
            parts.append(f"references without a prediction (skipped): {len(self.without_prediction)}")
        if self.failures:
            parts.append(f"{len(self.failures)} {'case' if len(self.failures) == 1 else 'cases'} failed")
        return "; ".join(parts)

    def to_dataframe(self) -> DataFrame:
        """Return :attr:`rows` as a table of pandas: one row per case and organ, missing values as NaN.

        Raises:
            EnvironmentProblemError: pandas is not installed.
        """
        try:
            import pandas as pd  # noqa: PLC0415 - not installed with the toolkit
        except ImportError as error:
            raise EnvironmentProblemError(
                "A table of pandas needs pandas, which is not installed.",
                remedy="Run `pip install pandas`, or use rows, to_csv or to_json.",
            ) from error
        return pd.DataFrame([asdict(row) for row in self.rows], columns=list(EvaluationRow.__dataclass_fields__))

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
            "always_annotated": list(self.always_annotated),
            "organs": [asdict(summary) for summary in self.summaries()],
            "cases": [asdict(row) for row in self.rows],
            "without_prediction": list(self.without_prediction),
            "failures": [asdict(failure) for failure in self.failures],
            "hints": list(self.hints),
        }


def evaluate(
    predictions: str | Path | Sequence[GivenLabels],
    references: str | Path | Sequence[GivenLabels],
    organs: GivenOrgans,
    *,
    prediction_ids: Mapping[str, int] | None = None,
    always_annotated: Collection[str] = (),
    nsd_tolerance_mm: float = DEFAULT_NSD_TOLERANCE_MM,
    structure_set: str | None = None,
    interpolate: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Score every predicted mask with the reference of the same case name.

    Masks and references are label maps, segmentations of 3D Slicer, RT Structure Sets or DICOM Segmentations; one of
    the two is a label map, whose lattice is that of the scan. Files of two folders are paired by case name: the name of
    the file, or of the first subfolder. A prediction without a reference is a failed case. References without
    a prediction are counted and skipped, so that a part of a reference folder can be scored. A single file is paired
    with the file of its case name in the other folder. Two single files are paired independently of their names. A
    failed case is listed, and the evaluation continues with the other cases.

    Args:
        predictions: mask, or folder of masks, as ``segment`` writes them; or a list of masks: paths, masks that
            ``segment`` returned, NIfTI images of nibabel, or ``LabelMap`` objects.
        references: annotation, or folder of annotations; for a list of masks, a list of their references in the same
            order.
        organs: label value of each organ in the references, or its names there (see
            :func:`fseft_edge.runtime.scans.organs.organs_of`).
        prediction_ids: label value of each organ in the predictions. If None, the values are those of the mask that
            ``segment`` returned, or of the file ``<case>.json`` that ``segment`` writes next to the mask; without this
            file, the values of the references apply.
        always_annotated: organs that were annotated in every scan that shows them. For these organs, a reference
            without the label value states that the organ is absent, and a mask that contains the organ is a false
            positive with DSC 0. For all other organs, such a reference means that the organ was not annotated, and the
            case has no scores.
        nsd_tolerance_mm: tolerance of the normalised surface distance in mm.
        structure_set: which structure set or segmentation of a case to use, if there are several in DICOM (see
            :class:`fseft_edge.runtime.scans.annotated.AnnotationSettings`); None selects the newest approved one.
        interpolate: fill the slices between contours on every second or every n-th slice. If not, they stay empty.
        progress: receiver of progress reports; None reports nothing.

    Raises:
        UsageError: ``organs`` is empty, ``prediction_ids`` does not contain all organs, ``always_annotated`` contains
            another organ, or the tolerance is negative or not finite.
        UnreadableFileError: the predictions or the references do not exist.
        InputError: no prediction has a reference of its case name.
        LabelError: no readable reference contains any of the organs, or no JSON file of a prediction knows an organ.
    """
    if not isinstance(predictions, str | Path) and not predictions:
        raise UsageError("No prediction is given.", remedy="Give at least one mask and its reference.")
    if not organs:
        raise UsageError(
            "No organ is given for the evaluation.", remedy="Give at least one organ, for example --organ liver=6."
        )
    wanted = organs_of(organs)
    names = [organ.name for organ in wanted]
    if prediction_ids is not None and (missing := [name for name in names if name not in prediction_ids]):
        raise UsageError(
            f"prediction_ids (--prediction-organ) contains no label value for {', '.join(missing)}.",
            remedy="Give a label value for every organ, or none, to read the values from the JSON files of the "
            "predictions.",
        )
    if unknown := [name for name in always_annotated if name not in names]:
        raise UsageError(
            f"--always-annotated names {', '.join(unknown)}, but the organs of the evaluation are {', '.join(names)}.",
            remedy="Name only organs of --organ with --always-annotated.",
        )
    if not (math.isfinite(nsd_tolerance_mm) and nsd_tolerance_mm >= 0):
        raise UsageError(
            f"The surface tolerance {nsd_tolerance_mm} mm is negative or not finite.",
            remedy="Give --nsd-tolerance a value of 0 mm or more, for example 2.",
        )
    if isinstance(predictions, str | Path) and isinstance(references, str | Path):
        settings = AnnotationSettings(structure_set, interpolate)
        pairs, failures, without_prediction = _paired(Path(predictions), Path(references), settings)
    else:
        pairs, failures, without_prediction = _listed(predictions, references), [], ()
    if prediction_ids is None:
        _check_predicted_organs(pairs, names)
    rows: list[EvaluationRow] = []
    better: Counter[_BetterValue] = Counter()
    with (progress or SilentProgress()).task("evaluate", total=len(pairs)) as task:
        for pair in pairs:
            try:
                of_case, better_values = _evaluate_case(
                    pair, wanted, prediction_ids, always_annotated, nsd_tolerance_mm
                )
                rows += of_case
                better.update(better_values)
            except FseftEdgeError as error:
                failures.append(CaseFailure(pair.case, error.message, error.remedy))
            task.advance()
    annotated = {row.organ for row in rows if row.reference_ml}
    hints = [value.sentence(cases) for value, cases in better.items()]
    hints += _renamed(pairs)
    if rows and (nowhere := [organ for organ in wanted if organ.name not in annotated]):
        compared = {row.case for row in rows}
        found = contents_of([pair.reference for pair in pairs if pair.case in compared])
        where = f" in {references}" if isinstance(references, str | Path) else ""
        listed = ", ".join(organ.described for organ in nowhere)
        message = f"No reference{where} contains a voxel of {listed}. {found}"
        if all(row.status == "absent" for row in rows):
            raise LabelError(message, remedy="Check the label values or names in the references, and correct --organ.")
        hints.append(message)
    always = tuple(name for name in names if name in always_annotated)
    return Evaluation(
        tuple(rows), tuple(failures), without_prediction, tuple(names), nsd_tolerance_mm, always, tuple(hints)
    )


@dataclass(frozen=True)
class _Pair:
    case: str
    prediction: GivenLabels | FoundAnnotation
    reference: GivenLabels | FoundAnnotation


def _listed(
    predictions: str | Path | Sequence[GivenLabels], references: str | Path | Sequence[GivenLabels]
) -> list[_Pair]:
    """Return lists of masks and references as pairs. A case has the name of its mask file, or its number."""
    if isinstance(predictions, str | Path) or isinstance(references, str | Path):
        raise UsageError(
            "One of predictions and references is a list, and the other is a path.",
            remedy="Give two paths, or a list of masks and a list of their references in the same order.",
        )
    if len(predictions) != len(references):
        raise UsageError(
            f"{len(predictions)} predictions and {len(references)} references are given.",
            remedy="Give a list of masks, and a list with the reference of each mask in the same order.",
        )
    named = [
        case_name(Path(prediction)) if isinstance(prediction, str | Path) else f"case_{number}"
        for number, prediction in enumerate(predictions, start=1)
    ]
    count = Counter(named)
    cases = [f"{name}_{number}" if count[name] > 1 else name for number, name in enumerate(named, start=1)]
    return [_Pair(*pair) for pair in zip(cases, predictions, references, strict=True)]


def _paired(
    predictions: Path, references: Path, settings: AnnotationSettings
) -> tuple[list[_Pair], list[CaseFailure], tuple[str, ...]]:
    predicted, reference = annotations_by_case(predictions, settings), annotations_by_case(references, settings)
    if predictions.is_file() and references.is_file():
        ((case, prediction),) = predicted.items()
        return [_Pair(case, prediction, *reference.values())], [], ()
    pairs = [_Pair(case, path, reference[case]) for case, path in predicted.items() if case in reference]
    if not pairs:
        raise InputError(
            f"No prediction in {predictions} has the file name of a reference in {references}.",
            remedy="Give both files of a case the same name, for example hn_002.nii.gz in both folders.",
        )
    failures = [
        CaseFailure(
            case,
            f"The prediction {found if isinstance(found, Path) else found.path} has no reference of its name in "
            f"{references}.",
            f"Add the reference {case}.nii.gz to {references}, or remove the prediction.",
        )
        for case, found in predicted.items()
        if references.is_dir() and case not in reference
    ]
    return pairs, failures, tuple(sorted(reference.keys() - predicted.keys()))


@dataclass(frozen=True)
class _BetterValue:
    """A label value of masks that fits the reference of an organ much better than the label value of that organ."""

    organ: str
    used: int
    better: int

    def sentence(self, cases: int) -> str:
        return (
            f"The label values of {self.organ} may be wrong: in {cases} {'case' if cases == 1 else 'cases'}, the label "
            f"value {self.better} of the mask fits the reference much better than the label value {self.used}. Check "
            "the label values of the references (--organ) and of the masks (--prediction-organ, or their JSON files)."
        )


def _evaluate_case(
    pair: _Pair,
    organs: Sequence[OrganLabel],
    prediction_ids: Mapping[str, int] | None,
    always_annotated: Collection[str],
    tolerance_mm: float,
) -> tuple[list[EvaluationRow], list[_BetterValue]]:
    prediction, reference, ids = _read(pair, organs, prediction_ids)
    rows, better = [], []
    for organ, label in ((organ.name, organ.label) for organ in organs):
        predicted, truth = prediction.mask(ids[organ]), reference.mask(label)
        predicted_ml = volume_ml(predicted, prediction.voxel_volume_mm3)
        reference_ml = volume_ml(truth, reference.voxel_volume_mm3)
        if reference_ml == 0 and organ not in always_annotated:
            row = EvaluationRow(pair.case, organ, "absent", None, None, None, predicted_ml, None)
        elif reference_ml == 0 and predicted_ml == 0:
            row = EvaluationRow(pair.case, organ, "true_negative", None, None, None, 0.0, 0.0)
        elif reference_ml == 0:
            row = EvaluationRow(pair.case, organ, "false_positive", 0.0, None, 0.0, predicted_ml, 0.0)
        elif predicted_ml == 0:
            row = EvaluationRow(pair.case, organ, "missed", 0.0, None, 0.0, predicted_ml, reference_ml)
        else:
            score = score_mask(predicted, truth, spacing_of(reference.affine), nsd_tolerance_mm=tolerance_mm)
            scores = (score.dsc, score.hd95_mm, score.nsd)
            row = EvaluationRow(pair.case, organ, "scored", *scores, predicted_ml, reference_ml)
        rows.append(row)
        if (
            reference_ml
            and isinstance(prediction, LabelMap)
            and (value := _better_value(prediction.array, truth, row.dsc or 0.0))
        ):
            better.append(_BetterValue(organ, ids[organ], value))
    return rows, better


def _read(
    pair: _Pair, organs: Sequence[OrganLabel], prediction_ids: Mapping[str, int] | None
) -> tuple[Annotation, Annotation, Mapping[str, int]]:
    """Return prediction and reference on one lattice, and the label value of each organ in the prediction."""
    by_name = [replace(organ, names=organ.names or (organ.name,)) for organ in organs]
    if names_structures(pair.prediction):
        reference = _label_map_of(pair, pair.reference, organs)
        lattice = Lattice(reference.shape, reference.affine)
        prediction = organs_of_structures(structures_of(pair.prediction), by_name, lattice, pair.case)
        return prediction, reference, {organ.name: organ.label for organ in organs}
    given = cast("GivenLabels", pair.prediction)
    labels = given_labels(given)
    ids = _ids_in_prediction(given, organs) if prediction_ids is None else prediction_ids
    if not names_structures(pair.reference):
        reference = _label_map_of(pair, pair.reference, organs)
        return labels_on(reference, labels, ("reference", "prediction")), reference, ids
    found = organs_of_structures(structures_of(pair.reference), organs, Lattice(labels.shape, labels.affine), pair.case)
    return labels, found, ids


def _label_map_of(pair: _Pair, given: GivenLabels | FoundAnnotation, organs: Sequence[OrganLabel]) -> LabelMap:
    if names_structures(given):
        raise UsageError(
            f"Prediction and reference of the case {pair.case} both name structures, so the lattice of their scan is "
            "not known.",
            remedy="Give one of them as a label map, such as the NIfTI mask that `segment` writes.",
        )
    if isinstance(given, str | Path):
        return organs_of_label_map(Path(given), organs)
    return given_labels(cast("GivenLabels", given))


def _better_value(prediction: NDArray[np.unsignedinteger[Any]], truth: NDArray[np.bool_], dsc: float) -> int | None:
    """Return the label value of a mask with the highest DSC if it is much higher than ``dsc``, else None."""
    values, overlaps = np.unique(prediction[truth], return_counts=True)
    in_reference = int(overlaps.sum())
    best, found = dsc + _MUCH_BETTER, None
    for value, overlap in zip(values.tolist(), overlaps.tolist(), strict=True):
        # The DSC with a mask that lies completely inside the reference is an upper limit.
        if value and 2 * overlap / (overlap + in_reference) > best:
            of_value = 2 * overlap / (int(np.count_nonzero(prediction == value)) + in_reference)
            if of_value > best:
                best, found = of_value, value
    return found


def _check_predicted_organs(pairs: Sequence[_Pair], organs: Sequence[str]) -> None:
    """Raise LabelError if every prediction has a JSON file and none of these files knows one of the organs."""
    known: set[str] = set()
    for pair in pairs:
        if not isinstance(pair.prediction, str | Path):
            known.update(organs)
            continue
        description = _description_of(Path(pair.prediction))
        try:
            known.update(organ_labels(description) if description.exists() else organs)
        except FseftEdgeError:  # this case fails later
            known.update(organs)
    if missing := [name for name in organs if name not in known]:
        raise LabelError(
            f"No prediction contains the organ {', '.join(missing)}: according to their JSON files, their organs are "
            f"{', '.join(sorted(known)) or 'none'}.",
            remedy="Give --organ the organ names of the adapters with which the cases were segmented.",
        )


def _renamed(pairs: Sequence[_Pair]) -> list[str]:
    """Return a sentence about predictions whose JSON file names another case: mask and JSON file were renamed."""
    renamed = []
    for pair in pairs:
        description = _description_of(Path(pair.prediction)) if isinstance(pair.prediction, str | Path) else None
        written = None if description is None or not description.exists() else case_in(description)
        if written is not None and written != pair.case:
            renamed.append(f"{pair.case} (written as {written})")
    if not renamed:
        return []
    return [f"The masks of these cases were renamed; check that each belongs to its reference: {', '.join(renamed)}."]


def _description_of(prediction: Path) -> Path:
    """Return the path of the JSON file that ``segment`` writes next to a mask."""
    return prediction.with_name(f"{case_name(prediction)}.json")


def _ids_in_prediction(given: GivenLabels, organs: Sequence[OrganLabel]) -> dict[str, int]:
    """Return the label value of each organ in a prediction, from the JSON file that ``segment`` writes next to it.

    Without this file, the names in the mask file itself apply if they include every organ. A mask that ``segment``
    returned contains the label values; for any other label map in memory, the values of the references apply.
    """
    if not isinstance(given, str | Path):
        return _of_references(organs, {one.name: one.label for one in given.organs} if isinstance(given, Mask) else {})
    prediction = Path(given)
    description = _description_of(prediction)
    if not description.exists():
        return _of_references(organs, {name: label for label, name in read_label_names(prediction).items()})
    ids = organ_labels(description, prediction)
    if missing := [organ.name for organ in organs if organ.name not in ids]:
        raise LabelError(
            f"{description} contains no label value for {', '.join(missing)}. Its organs are: "
            f"{', '.join(ids) or 'none'}.",
            remedy="Give --organ the organ names of the adapters with which the case was segmented.",
        )
    return ids


def _of_references(organs: Sequence[OrganLabel], named: dict[str, int]) -> dict[str, int]:
    """Return the label values of a prediction that names its organs, if it names all, else those of the references."""
    if {organ.name for organ in organs} <= named.keys():
        return named
    if unknown := [organ.name for organ in organs if not organ.in_label_maps]:
        raise LabelError(
            f"The label values of {', '.join(unknown)} in the prediction are not known: there is no JSON file of "
            "`segment` beside it, and the names in the mask do not include every organ.",
            remedy="Give the label values with --prediction-organ NAME=ID.",
        )
    return {organ.name: organ.label for organ in organs}


def _number(value: float | None, digits: int, *, missing: str = "–") -> str:
    return missing if value is None else f"{value:.{digits}f}"


def _mean(values: Statistics | None, digits: int) -> str:
    if values is None:
        return "–"
    return f"{values.mean:.{digits}f}" + ("" if values.sd is None else f" ± {values.sd:.{digits}f}")
