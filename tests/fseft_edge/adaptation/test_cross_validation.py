"""Cross-validation and the choice of a method, with masks whose DSC is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
from doubles.features import random_features
from numpy.typing import NDArray

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.cross_validation import (
    Candidate,
    OrganScores,
    best_of,
    can_validate,
    candidates,
    cross_validate,
    folds,
)
from fseft_edge.adaptation.size_priors import SizePrior
from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adaptation.training import TrainedAdapter, TrainingSettings
from fseft_edge.adapters.file import PostProcessing
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.evaluation.metrics import dice
from fseft_edge.masks.post_processing import ALL, post_process
from fseft_edge.runtime.encoder.feature_map import FeatureMap
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import LabelMap, Volume

SHAPE = (16, 16, 16)
ORGAN = (slice(2, 12),) * 3  # a cube of 1000 voxels
SETTINGS = AdapterSettings()


def mask_with(dsc: float) -> NDArray[np.uint8]:
    """Return a mask with one component whose DSC with the organ is near ``dsc``: the first voxels of the organ."""
    voxels = round(dsc * 1000 / (2 - dsc))
    cube = np.zeros(1000, np.uint8)
    cube[:voxels] = 1
    mask = np.zeros(SHAPE, np.uint8)
    mask[ORGAN] = cube.reshape(10, 10, 10)
    return mask


@dataclass
class Bench:
    """A replacement of training and segmentation with a given mask for each candidate name; records all calls."""

    masks: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    made: list[tuple[str, int]] = field(default_factory=list)
    expected: list[Sequence[SizePrior | None]] = field(default_factory=list)

    def segment(self, _: object, adapters: Sequence[Any]) -> NDArray[np.uint8]:
        return self.masks[adapters[0]]

    def move(self, adapter: str, _: object, ranges: Sequence[SizePrior | None], **__: object) -> tuple[str, tuple[()]]:
        """Move the threshold of an adapter that has a mask for this case, ``NAME moved``."""
        self.expected.append(ranges)
        moved = f"{adapter} moved"
        return (moved if moved in self.masks else adapter), ()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench()

    def make(candidate: Candidate, support: Sequence[SupportScan], *_: object) -> TrainedAdapter:
        bench.made.append((candidate.name, len(support)))
        return TrainedAdapter(cast("Adapter", candidate.name), (), 1, bfloat16=False)

    monkeypatch.setattr(Candidate, "make", make)
    monkeypatch.setattr("fseft_edge.adaptation.cross_validation.segment_encoded", bench.segment)
    monkeypatch.setattr("fseft_edge.adaptation.cross_validation.can_move_thresholds", lambda _: True)
    monkeypatch.setattr("fseft_edge.adaptation.cross_validation.move_thresholds", bench.move)
    return bench


def scans(count: int) -> list[SupportScan]:
    """Return scans that contain the organ."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[ORGAN] = 1
    ct = Volume(np.where(labels, 50, -1000).astype(np.int16), np.diag([3.0, 3.0, 3.0, 1.0]))
    scan = SupportScan(
        features=cast("FeatureMap", random_features(SHAPE, (1, 2))),
        shape=SHAPE,
        occupancy=Occupancy([labels.astype(np.float32)]),
        annotated=np.array([True]),
        volumes_mm3=(27000.0,),
        grid=Grid.of(ct, Preprocessing(spacing=(3.0, 3.0, 3.0))),
        reference=(LabelMap(labels, ct.affine), (1,)),
    )
    return [scan] * count


def kinds(*names: str) -> list[Candidate]:
    return [Candidate(name, SETTINGS, TrainingSettings()) for name in names]


def test_every_scan_is_left_out_once_in_at_most_ten_folds() -> None:
    assert folds(range(3)) == [[0], [1], [2]]
    parts = folds(range(25))
    assert len(parts) == 10
    assert sorted(index for part in parts for index in part) == list(range(25))


def test_a_fold_leaves_out_all_scans_of_a_group() -> None:
    assert folds([0, 1, 0, 3]) == [[0, 2], [1], [3]]
    assert folds([0, 0, 0]) == [[0, 1, 2]]
    of_scans = [group % 12 for group in range(40)]
    parts = folds(of_scans)
    assert len(parts) == 10
    assert sorted(index for part in parts for index in part) == list(range(40))
    for group in range(12):
        (part,) = (part for part in parts if any(of_scans[index] == group for index in part))
        assert [index for index in range(40) if of_scans[index] == group] == [i for i in part if of_scans[i] == group]


@pytest.mark.parametrize(
    ("annotated", "groups", "possible"),
    [
        ([[True], [True]], [0, 1], True),
        ([[True], [True]], [0, 0], False),
        ([[True], [False]], [0, 1], False),
        ([[True, False], [False, True]], [0, 1], False),
        ([[True, False], [True, True], [False, True]], [0, 0, 2], True),
    ],
)
def test_cross_validation_needs_an_organ_in_two_groups(
    annotated: list[list[bool]], groups: list[int], possible: bool
) -> None:
    assert can_validate([np.array(organs) for organs in annotated], groups) == possible


def test_the_adapter_of_a_fold_is_made_without_the_left_out_group(bench: Bench) -> None:
    bench.masks = {"a": mask_with(0.7), "b": mask_with(0.6)}
    validated = cross_validate(kinds("a")[0], scans(4), [None], groups=[0, 1, 0, 3])
    assert bench.made == [("a", 2), ("a", 3), ("a", 3)]
    assert len(validated.dsc[0]) == 4
    bench.made.clear()
    best_of(kinds("a", "b"), scans(4), [None], groups=[0, 0, 2, 2])
    assert bench.made == [("a", 2), ("b", 2)] * 2


def test_the_adapter_of_a_fold_is_made_without_the_left_out_scan(bench: Bench) -> None:
    bench.masks = {"a": mask_with(0.7)}
    validated = cross_validate(kinds("a")[0], scans(4), [None])
    assert bench.made == [("a", 3)] * 4
    assert validated.dsc == (pytest.approx((0.7,) * 4, abs=1e-3),)


def test_a_threshold_follows_the_size_of_an_organ_if_this_improves_the_dsc(bench: Bench) -> None:
    bench.masks = {"a": mask_with(0.7), "a moved": mask_with(0.72)}
    support = [replace(scan, volumes_mm3=(1000.0 * size,)) for scan, size in zip(scans(3), (20, 30, 50), strict=True)]
    validated = cross_validate(kinds("a")[0], support, [None])
    assert validated.follows_size == (True,)
    assert validated.dsc == (pytest.approx((0.72,) * 3, abs=1e-3),)
    # The expected sizes are those of the other scans.
    found = [(prior.low_ml, prior.high_ml) for (prior,) in bench.expected if prior]
    assert found == [pytest.approx(ends) for ends in ((27, 55), (18, 55), (18, 33))]


@pytest.mark.parametrize("dsc", [0.6, 0.7005])
def test_a_threshold_stays_if_following_the_size_does_not_improve_the_dsc(bench: Bench, dsc: float) -> None:
    bench.masks = {"a": mask_with(0.7), "a moved": mask_with(dsc)}
    validated = cross_validate(kinds("a")[0], scans(3), [None])
    assert validated.follows_size == (False,)
    assert validated.dsc == (pytest.approx((0.7,) * 3, abs=1e-3),)


def test_two_scans_are_not_enough_to_follow_the_size(bench: Bench) -> None:
    bench.masks = {"a": mask_with(0.7), "a moved": mask_with(0.9)}
    assert cross_validate(kinds("a")[0], scans(2), [None]).follows_size == (False,)
    assert cross_validate(kinds("a")[0], scans(3), [None]).follows_size == (True,)


def test_organs_that_compete_do_not_follow_their_sizes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fseft_edge.adaptation.cross_validation.can_move_thresholds", lambda _: False)
    bench.masks = {"a": mask_with(0.7), "a moved": mask_with(0.9)}
    assert cross_validate(kinds("a")[0], scans(3), [None]).follows_size == (False,)
    assert not bench.expected


def test_softmax_is_not_scored_without_a_training_scan_that_annotates_all_organs(bench: Bench) -> None:
    """Softmax trains only on scans that annotate all organs. If the only such scan is left out, it cannot train."""
    bench.masks = {"a": mask_with(0.7)}
    (scan,) = scans(1)
    whole, partial = (
        replace(
            scan, annotated=np.array(annotated), reference=(scan.reference[0], (1, 2)), volumes_mm3=(27000.0, 27000.0)
        )
        for annotated in ([True, True], [True, False])
        if scan.reference
    )
    for activation, scores in (("sigmoid", 3), ("softmax", 2)):
        candidate = Candidate("a", AdapterSettings(activation=activation), TrainingSettings())
        validated = cross_validate(candidate, [whole, partial, partial], [None, None])
        assert [len(organ) for organ in validated.dsc] == [scores, 0]


def test_the_best_candidate_is_chosen_and_a_costlier_one_only_if_it_is_clearly_better(bench: Bench) -> None:
    bench.masks = {"cheap": mask_with(0.7), "costly": mask_with(0.703)}
    assert best_of(kinds("cheap", "costly"), scans(3), [None])[0].candidate.name == "cheap"
    bench.masks["costly"] = mask_with(0.71)
    assert best_of(kinds("cheap", "costly"), scans(3), [None])[0].candidate.name == "costly"


def test_a_candidate_far_below_the_best_is_dropped_after_two_folds(bench: Bench) -> None:
    bench.masks = {"bad": mask_with(0.6), "good": mask_with(0.68), "best": mask_with(0.7)}
    _, validated = best_of(kinds("bad", "good", "best"), scans(5), [None])
    assert [result.candidate.name for result in validated] == ["good", "best"]
    assert [name for name, _ in bench.made].count("bad") == 2
    assert [name for name, _ in bench.made].count("good") == 5


def test_post_processing_is_chosen_if_it_improves_the_dsc_and_the_scores_include_it(bench: Bench) -> None:
    stray = mask_with(0.9)
    stray[14:, 14:] = 1
    bench.masks = {"stray": stray}
    validated = cross_validate(kinds("stray")[0], scans(2), [None])
    assert validated.post_processing == (PostProcessing(largest_component=True),)
    assert validated.dsc == (pytest.approx((0.9, 0.9), abs=1e-3),)


def test_post_processing_with_almost_no_gain_is_not_chosen(bench: Bench) -> None:
    stray = mask_with(0.9)
    stray[15, 15, 15] = 1
    bench.masks = {"stray": stray}
    assert cross_validate(kinds("stray")[0], scans(2), [None]).post_processing == (PostProcessing(),)


def test_scores_are_those_of_the_whole_lattice_and_count_voxels_far_from_the_annotation() -> None:
    random = np.random.default_rng(0)
    reference = np.zeros((30, 20, 25), np.uint8)
    reference[8:14, 6:12, 9:15], reference[14:18, 6:12, 9:15] = 4, 7
    labels = np.zeros(reference.shape, np.uint8)
    labels[7:14, 6:12, 9:14], labels[14:17, 5:12, 9:15] = 1, 2
    labels[10, 8, 11] = 0
    labels[28, 18, 1:4] = 1
    labels[random.random(labels.shape) < 0.01] = 2
    scores = OrganScores(3)
    annotation = LabelMap(reference, np.eye(4))
    scores.add(labels, annotation, (4, 7, 9), np.array([True, True, True]))
    for steps in ALL:
        processed = post_process(labels, [steps] * 3)
        expected = [[dice(processed == organ + 1, reference == value)] for organ, value in ((0, 4), (1, 7))]
        assert scores.of(steps) == [*expected, []]
    scores.add(np.zeros_like(labels), LabelMap(np.zeros_like(reference), np.eye(4)), (4, 7, 9), np.ones(3, bool))
    assert [len(organ) for organ in scores.without_post_processing] == [1, 1, 0]


def test_zero_shot_is_only_a_candidate_if_the_encoder_knows_all_organs() -> None:
    names = [kind.name for kind in candidates(TrainingSettings(), AdapterSettings(), [None])]
    assert names == [
        "linear on the finest level",
        "linear on all levels, ridge 0.01",
        "linear on all levels, ridge 0.001",
        "pointwise on the finest level",
        "pointwise on all levels",
        "spatial on the finest level",
        "spatial on all levels",
    ]
    known = [(cast("Any", None), 0.0)]
    assert candidates(TrainingSettings(), AdapterSettings(), known)[0].name == "zero-shot"
