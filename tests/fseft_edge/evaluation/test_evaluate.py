"""Evaluation of label maps: scores, statistics, pairing of files, failed cases, and output files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from doubles.errors import refused
from numpy.typing import NDArray
from rich.console import Console

from fseft_edge.evaluation.evaluate import Evaluation, EvaluationRow, evaluate
from fseft_edge.runtime.errors import InputError, LabelError, UnreadableFileError, UsageError
from fseft_edge.runtime.scans.nifti import write_label_map
from fseft_edge.runtime.scans.volume import LabelMap
from fseft_edge.runtime.system.progress import RichProgress

AFFINE = np.diag([1.0, 2.0, 4.0, 1.0])
ORGANS = {"liver": 6, "spleen": 1}
FOUND = {"liver": 1, "spleen": 2}


def labels(**boxes: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return a map with a bar of label value N for each ``idN=(x start, x stop, y row)``, 4 x 4 voxels thick."""
    array = np.zeros((30, 20, 10), dtype=np.uint8)
    for name, (start, stop, row) in boxes.items():
        array[start:stop, row : row + 4, 3:7] = int(name.removeprefix("id"))
    return array


def write(folder: Path, case: str, array: NDArray[np.uint8], affine: NDArray[np.float64] = AFFINE) -> Path:
    path = folder / f"{case}.nii.gz"
    write_label_map(path, LabelMap(array, affine))
    return path


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    return tmp_path / "predictions"


@pytest.fixture
def references(tmp_path: Path) -> Path:
    return tmp_path / "references"


def row(evaluation: Evaluation, case: str, organ: str) -> EvaluationRow:
    (found,) = [row for row in evaluation.rows if (row.case, row.organ) == (case, organ)]
    return found


def printed(evaluation: Evaluation) -> str:
    """Return the table of an evaluation as text with single spaces."""
    stream = io.StringIO()
    Console(file=stream, width=160).print(evaluation.table())
    return " ".join(stream.getvalue().split())


def test_scores_volumes_and_summaries_of_known_masks(predictions: Path, references: Path) -> None:
    for case, shift in (("a", 0), ("b", 2), ("c", 5)):
        write(references, case, labels(id6=(5, 15, 3), id1=(5, 15, 12)))
        write(predictions, case, labels(id1=(5 + shift, 15 + shift, 3), id2=(5, 15, 12)))
    evaluation = evaluate(predictions, references, ORGANS, prediction_ids=FOUND)
    assert [(r.case, r.organ) for r in evaluation.rows] == [(c, o) for c in "abc" for o in ORGANS]
    assert [row(evaluation, case, "liver").dsc for case in "abc"] == pytest.approx([1.0, 0.8, 0.5])
    assert [row(evaluation, case, "liver").hd95_mm for case in "abc"] == pytest.approx([0, 2, 5])
    shifted = row(evaluation, "b", "liver")
    assert (shifted.status, shifted.predicted_ml, shifted.reference_ml) == ("scored", 1.28, 1.28)  # 160 voxels of 8 mm3
    liver, spleen = evaluation.summaries()
    assert liver.dsc is not None
    assert liver.dsc.mean == pytest.approx(2.3 / 3)
    assert liver.dsc.sd == pytest.approx(statistics.stdev([1.0, 0.8, 0.5]))
    assert liver.dsc.median == pytest.approx(0.8)
    assert spleen.nsd is not None
    assert (spleen.nsd.mean, spleen.nsd.sd) == (1, 0)
    assert evaluation.mean_dsc() == pytest.approx((2.3 / 3 + 1) / 2)


def test_the_tolerance_of_the_surface_distance_is_in_mm(predictions: Path, references: Path) -> None:
    write(references, "a", labels(id6=(5, 15, 3)))
    write(predictions, "a", labels(id1=(8, 18, 3)))
    strict = row(evaluate(predictions, references, {"liver": 6}, prediction_ids=FOUND), "a", "liver")
    loose = row(
        evaluate(predictions, references, {"liver": 6}, prediction_ids=FOUND, nsd_tolerance_mm=3.0), "a", "liver"
    )
    assert strict.nsd is not None
    assert strict.nsd < 1
    assert loose.nsd == 1


def test_an_organ_without_annotation_is_absent_and_not_averaged(predictions: Path, references: Path) -> None:
    write(references, "a", labels(id6=(5, 15, 3), id1=(5, 15, 12)))
    write(references, "b", labels(id1=(5, 15, 12)))
    for case in "ab":
        write(predictions, case, labels(id1=(5, 15, 3), id2=(5, 15, 12)))
    evaluation = evaluate(predictions, references, ORGANS, prediction_ids=FOUND)
    assert row(evaluation, "b", "liver") == EvaluationRow("b", "liver", "absent", None, None, None, 1.28, None)
    liver, spleen = evaluation.summaries()
    assert (liver.scored, liver.absent) == (1, 1)
    assert (spleen.scored, spleen.absent) == (2, 0)
    assert liver.dsc is not None
    assert (liver.dsc.n, liver.dsc.mean, liver.dsc.sd) == (1, 1.0, None)


def labels_with(volume_voxels: int) -> NDArray[np.uint8]:
    """Return a map with this number of voxels of the liver."""
    array = np.zeros((30, 20, 10), dtype=np.uint8)
    array.reshape(-1)[:volume_voxels] = 1
    return array


def nnunet_dsc(prediction: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """The DSC of nnU-Net 2: NaN if both masks are empty (compute_metrics in nnunetv2/evaluation)."""
    tp = int(np.sum((prediction == 1) & (reference == 1)))
    fp = int(np.sum((prediction == 1) & (reference != 1)))
    fn = int(np.sum((prediction != 1) & (reference == 1)))
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan")


SIZES = {"both": (100, 100), "missed": (0, 100), "false_positive": (50, 0), "another": (30, 0), "neither": (0, 0)}


@pytest.mark.parametrize("always", [True, False])
def test_an_organ_only_in_the_mask_is_counted_and_a_false_positive_is_scored_as_in_nnunet(
    predictions: Path, references: Path, always: bool
) -> None:
    dsc = []
    for case, (predicted, annotated) in SIZES.items():
        write(predictions, case, labels_with(predicted))
        write(references, case, labels_with(annotated))
        dsc.append(nnunet_dsc(labels_with(predicted), labels_with(annotated)))
    evaluation = evaluate(predictions, references, {"liver": 1}, always_annotated=["liver"] if always else [])
    (liver,) = evaluation.summaries()
    assert (liver.only_predicted, liver.only_predicted_ml) == (2, pytest.approx(80 * 8 / 1000))
    assert (liver.scored, liver.missed) == (1, 1)
    assert liver.dsc is not None
    assert liver.hd95_mm is not None
    assert liver.hd95_mm.n == 1
    if always:
        assert liver.dsc.mean == pytest.approx(float(np.nanmean(dsc)))
        assert (liver.dsc.n, liver.false_positives, liver.true_negatives, liver.absent) == (4, 2, 1, 0)
        found = row(evaluation, "another", "liver")
        assert found == EvaluationRow("another", "liver", "false_positive", 0.0, None, 0.0, 0.24, 0.0)
        found = row(evaluation, "neither", "liver")
        assert found == EvaluationRow("neither", "liver", "true_negative", None, None, None, 0.0, 0.0)
    else:
        assert liver.dsc.mean == pytest.approx(0.5)
        assert (liver.dsc.n, liver.false_positives, liver.true_negatives, liver.absent) == (2, 0, 0, 3)
    assert evaluation.as_dict()["always_annotated"] == (["liver"] if always else [])
    text = printed(evaluation)
    assert "only in the mask: 2 of 3" in text
    assert ("2 false positive: DSC and NSD 0" if always else "2 only in the mask and not averaged") in text


def test_a_study_of_scans_without_the_organ_has_only_false_positives(predictions: Path, references: Path) -> None:
    write(predictions, "a", labels_with(5))
    write(references, "a", labels(id3=(5, 15, 3)))
    evaluation = evaluate(predictions, references, {"liver": 1}, always_annotated=["liver"])
    assert evaluation.mean_dsc() == 0
    (hint,) = evaluation.hints
    assert "liver=1" in hint
    assert "3 (in 1 file" in hint


def test_swapped_label_values_are_pointed_out(predictions: Path, references: Path) -> None:
    for case in "ab":
        write(references, case, labels(id6=(5, 15, 3), id1=(5, 15, 12)))
        write(predictions, case, labels(id6=(5, 15, 12), id1=(6, 15, 3)))
    evaluation = evaluate(predictions, references, ORGANS)
    assert evaluation.mean_dsc() == 0
    assert len(evaluation.hints) == 2
    for hint, (organ, used, better) in zip(evaluation.hints, [("liver", 6, 1), ("spleen", 1, 6)], strict=True):
        assert f"label values of {organ} may be wrong: in 2 cases" in hint
        assert f"label value {better} of the mask fits the reference much better than the label value {used}" in hint
    assert evaluate(predictions, references, ORGANS, prediction_ids={"liver": 1, "spleen": 6}).hints == ()


def test_a_label_value_that_is_only_a_little_better_is_not_pointed_out(predictions: Path, references: Path) -> None:
    write(references, "a", labels(id6=(5, 15, 3)))
    write(predictions, "a", labels(id1=(5, 9, 3), id2=(9, 15, 3)))
    assert evaluate(predictions, references, {"liver": 6}, prediction_ids=FOUND).hints == ()


def test_an_organ_that_no_mask_can_contain_is_refused_once(predictions: Path, references: Path) -> None:
    for case in "ab":
        write(references, case, labels(id6=(5, 15, 3), id1=(5, 15, 12)))
        write(predictions, case, labels(id1=(5, 15, 3)))
        (predictions / f"{case}.json").write_text(json.dumps({"organs": [{"name": "liver", "label": 1}]}))
    with refused(LabelError, "organ spleen", "their organs are liver"):
        evaluate(predictions, references, ORGANS)


def test_a_missed_organ_counts_as_zero_and_has_no_distance(predictions: Path, references: Path) -> None:
    for case in "ab":
        write(references, case, labels(id6=(5, 15, 3)))
    write(predictions, "a", labels(id1=(5, 15, 3)))
    write(predictions, "b", labels())
    evaluation = evaluate(predictions, references, {"liver": 6}, prediction_ids=FOUND)
    assert row(evaluation, "b", "liver") == EvaluationRow("b", "liver", "missed", 0.0, None, 0.0, 0.0, 1.28)
    (liver,) = evaluation.summaries()
    assert (liver.scored, liver.missed) == (1, 1)
    assert liver.dsc is not None
    assert liver.hd95_mm is not None
    assert (liver.dsc.mean, liver.hd95_mm.n, liver.hd95_mm.mean) == (0.5, 1, 0)


def test_label_values_are_read_from_the_json_file_of_the_prediction(predictions: Path, references: Path) -> None:
    write(references, "a", labels(id6=(5, 15, 3), id1=(5, 15, 12)))
    write(predictions, "a", labels(id1=(5, 15, 12), id2=(5, 15, 3)))
    described = {
        "organs": [{"name": "spleen", "label": 1, "volume_ml": 1.28, "flags": []}, {"name": "liver", "label": 2}]
    }
    (predictions / "a.json").write_text(json.dumps(described))
    assert [r.dsc for r in evaluate(predictions, references, ORGANS).rows] == [1, 1]
    given = evaluate(predictions, references, ORGANS, prediction_ids={"liver": 1, "spleen": 2})
    assert [r.dsc for r in given.rows] == [0, 0]


def test_a_json_file_of_another_mask_fails_its_case(predictions: Path, references: Path) -> None:
    for case in "ab":
        write(references, case, labels(id6=(5, 15, 3), id1=(5, 15, 12)))
        write(predictions, case, labels(id1=(5, 15, 12), id2=(5, 15, 3)))
        organs = [{"name": "spleen", "label": 1}, {"name": "liver", "label": 2}]
        mask = predictions / f"{case}.nii.gz"
        described = {"organs": organs, "mask_sha256": hashlib.sha256(mask.read_bytes()).hexdigest()}
        (predictions / f"{case}.json").write_text(json.dumps(described))
    write(predictions, "b", labels(id1=(5, 15, 3), id2=(5, 15, 12)))  # of a run with the organs in another order
    evaluation = evaluate(predictions, references, ORGANS)
    assert [(row.case, row.dsc) for row in evaluation.rows] == [("a", 1), ("a", 1)]
    (failure,) = evaluation.failures
    assert failure.case == "b"
    assert "b.json" in failure.message


def test_a_renamed_mask_is_named_in_a_hint(predictions: Path, references: Path) -> None:
    write(references, "a", labels(id6=(5, 15, 3)))
    write(predictions, "a", labels(id1=(5, 15, 3)))
    described = {"case": "other", "organs": [{"name": "liver", "label": 1}]}
    (predictions / "a.json").write_text(json.dumps(described))
    result = evaluate(predictions, references, {"liver": 6})
    assert any("a (written as other)" in hint for hint in result.hints)


def test_without_a_json_file_the_names_in_the_mask_apply(predictions: Path, references: Path) -> None:
    write(references, "a", labels(id6=(5, 15, 3), id1=(5, 15, 12)))
    mask = LabelMap(labels(id1=(5, 15, 12), id2=(5, 15, 3)), AFFINE)
    write_label_map(predictions / "a.nii.gz", mask, {1: "spleen", 2: "liver"})
    assert [row.dsc for row in evaluate(predictions, references, ORGANS).rows] == [1, 1]
    write_label_map(
        predictions / "a.nii.gz", mask, {1: "spleen", 2: "Leber"}
    )  # not every organ: the references' values
    assert [row.dsc for row in evaluate(predictions, references, ORGANS).rows] != [1, 1]


@pytest.mark.parametrize("text", ['{"organs": [{"name": "spleen", "label": 1}]}', "{}", "no json", '{"organs": 3}'])
def test_a_json_file_without_the_organ_fails_only_its_case(predictions: Path, references: Path, text: str) -> None:
    for case in "ab":
        write(references, case, labels(id6=(5, 15, 3)))
        write(predictions, case, labels(id1=(5, 15, 3)))
    (predictions / "b.json").write_text(text)
    evaluation = evaluate(predictions, references, {"liver": 6})
    assert [r.case for r in evaluation.rows] == ["a"]
    (failure,) = evaluation.failures
    assert failure.case == "b"
    assert "b.json" in failure.message


def test_cases_that_cannot_be_compared_are_listed_and_the_others_are_scored(
    predictions: Path, references: Path
) -> None:
    array = labels(id6=(5, 15, 3))
    for case in ("good", "other_shape", "other_place", "only_reference", "damaged"):
        write(references, case, array)
    write(predictions, "good", labels(id1=(5, 15, 3)))
    write(predictions, "other_shape", array[1:])
    write(predictions, "other_place", array, AFFINE + np.array([[0, 0, 0, 0.5]] + 3 * [[0, 0, 0, 0]]))
    write(predictions, "only_prediction", array)
    (predictions / "damaged.nii.gz").write_bytes(b"\x1f\x8b not really")
    evaluation = evaluate(predictions, references, {"liver": 6}, prediction_ids=FOUND)
    assert [r.case for r in evaluation.rows] == ["good"]
    messages = {failure.case: failure.message for failure in evaluation.failures}
    assert set(messages) == {"other_shape", "other_place", "only_prediction", "damaged"}
    assert evaluation.without_prediction == ("only_reference",)
    for case in ("other_shape", "other_place"):
        assert "lattice" in messages[case]
        for folder in (predictions, references):
            assert str(folder / f"{case}.nii.gz") in messages[case]
    assert str(predictions / "only_prediction.nii.gz") in messages["only_prediction"]
    assert "damaged.nii.gz" in messages["damaged"]
    assert all(failure.remedy for failure in evaluation.failures)


def test_a_single_file_is_paired_with_its_name_in_a_folder_or_with_any_other_single_file(
    predictions: Path, references: Path
) -> None:
    for case in "ab":
        write(references, case, labels(id6=(5, 15, 3)))
    one = write(predictions, "a", labels(id1=(5, 15, 3)))
    evaluation = evaluate(one, references, {"liver": 6}, prediction_ids=FOUND)
    assert ([r.case for r in evaluation.rows], evaluation.failures) == (["a"], ())
    other = evaluate(one, references / "b.nii.gz", {"liver": 6}, prediction_ids=FOUND)
    assert [r.dsc for r in other.rows] == [1]


def test_inputs_without_anything_to_compare_are_refused(predictions: Path, references: Path) -> None:
    write(predictions, "a", labels(id1=(5, 15, 3)))
    with refused(UnreadableFileError, references):
        evaluate(predictions, references, ORGANS)
    write(references, "b", labels(id6=(5, 15, 3)))
    with refused(InputError, predictions, references):
        evaluate(predictions, references, ORGANS)
    write(references, "a", labels(id6=(5, 15, 3)))
    with refused(LabelError, references, "stomach=9", "6 (in 1 file, 1.3 ml)"):
        evaluate(predictions, references, {"stomach": 9})
    with refused(UsageError, "--always-annotated", "stomach", "liver, spleen"):
        evaluate(predictions, references, ORGANS, always_annotated=["stomach"])
    with refused(UsageError):
        evaluate(predictions, references, {})
    with refused(UsageError, "spleen"):
        evaluate(predictions, references, ORGANS, prediction_ids={"liver": 1})
    write_label_map(predictions / "a.nii", LabelMap(labels(), AFFINE))
    with refused(InputError, predictions):
        evaluate(predictions, references, ORGANS)


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), -1.0])
def test_a_negative_or_infinite_surface_tolerance_is_refused(
    predictions: Path, references: Path, tolerance: float
) -> None:
    with refused(UsageError, "tolerance", tolerance):
        evaluate(predictions, references, {"liver": 1}, nsd_tolerance_mm=tolerance)


def test_csv_json_and_table_contain_all_rows(predictions: Path, references: Path, tmp_path: Path) -> None:
    write(references, "a", labels(id6=(5, 15, 3)))
    write(references, "b", labels(id6=(5, 15, 3), id1=(5, 15, 12)))
    write(references, "c", labels(id6=(5, 15, 3)))
    write(predictions, "a", labels(id1=(7, 17, 3)))
    write(predictions, "b", labels(id1=(5, 15, 3)))
    evaluation = evaluate(predictions, references, ORGANS, prediction_ids=FOUND)
    evaluation.to_csv(tmp_path / "scores.csv")
    evaluation.to_json(tmp_path / "scores.json")

    with (tmp_path / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["case"], line["organ"], line["status"]) for line in lines] == [
        ("a", "liver", "scored"),
        ("a", "spleen", "absent"),
        ("b", "liver", "scored"),
        ("b", "spleen", "missed"),
    ]
    assert float(lines[0]["dsc"]) == pytest.approx(0.8)
    assert lines[1]["dsc"] == lines[3]["hd95_mm"] == ""

    document = json.loads((tmp_path / "scores.json").read_text())
    assert document == evaluation.as_dict() | {"cases": document["cases"]}
    assert [EvaluationRow(**case) for case in document["cases"]] == list(evaluation.rows)
    assert document["without_prediction"] == ["c"]
    assert document["failures"] == []
    assert document["organs"][0]["dsc"]["mean"] == pytest.approx(0.9)

    text = printed(evaluation)
    for part in ("0.800", "0.900 ± 0.141", "mean of 2", "NSD 2 mm", "1 not annotated", "1 missed", "(skipped): 1"):
        assert part in text, part


def test_progress_is_reported(predictions: Path, references: Path) -> None:
    write(references, "a", labels(id6=(5, 15, 3)))
    write(predictions, "a", labels(id1=(5, 15, 3)))
    stream = io.StringIO()
    evaluate(predictions, references, {"liver": 6}, progress=RichProgress(stream))
    assert "evaluate: done" in stream.getvalue()


@pytest.mark.real_ct
def test_partial_clinical_contours_compared_with_themselves(real_ct: Path) -> None:
    organs = {"brainstem": 1, "right_parotid": 3, "larynx": 6, "mandible": 7}
    file = real_ct / "headneck/label/hn_002.nii.gz"
    evaluation = evaluate(file, file, organs, prediction_ids=organs)
    found = {r.organ: (r.status, r.dsc, r.hd95_mm, r.nsd) for r in evaluation.rows}
    perfect = ("scored", 1.0, 0.0, 1.0)
    assert found == dict.fromkeys(organs, perfect) | {"larynx": ("absent", None, None, None)}
