"""Cross-validation and the choice of a method, on masks of which the DSC is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
from doubles.features import random_features
from numpy.typing import NDArray

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.cross_validation import Candidate, best_of, candidates, folds, leave_one_out
from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adaptation.training import TrainedAdapter, TrainingSettings
from fseft_edge.adapters.file import PostProcessing
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.runtime.encoder.feature_map import FeatureMap
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import LabelMap, Volume

SHAPE = (16, 16, 16)
ORGAN = (slice(2, 12),) * 3  # a cube of 1000 voxels
SETTINGS = AdapterSettings()


def found(dsc: float) -> NDArray[np.uint8]:
    """Return a mask in one piece whose DSC with the organ is near ``dsc``: the organ's first voxels."""
    voxels = round(dsc * 1000 / (2 - dsc))
    cube = np.zeros(1000, np.uint8)
    cube[:voxels] = 1
    mask = np.zeros(SHAPE, np.uint8)
    mask[ORGAN] = cube.reshape(10, 10, 10)
    return mask


@dataclass
class Bench:
    """Stands for training and segmentation: each candidate's mask is given by name, and calls are counted."""

    masks: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    made: list[tuple[str, int]] = field(default_factory=list)

    def segment(self, _: object, adapters: Sequence[Any]) -> NDArray[np.uint8]:
        return self.masks[adapters[0]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench()

    def make(candidate: Candidate, support: Sequence[SupportScan], *_: object) -> TrainedAdapter:
        bench.made.append((candidate.name, len(support)))
        return TrainedAdapter(cast("Adapter", candidate.name), (), 1, bfloat16=False)

    monkeypatch.setattr(Candidate, "make", make)
    monkeypatch.setattr("fseft_edge.adaptation.cross_validation.segment_encoded", bench.segment)
    return bench


def scans(count: int) -> list[SupportScan]:
    """Return scans that show the organ."""
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


def test_every_scan_is_left_out_once_alone_or_of_many_in_ten_groups() -> None:
    assert folds(3) == [[0], [1], [2]]
    groups = folds(25)
    assert len(groups) == 10
    assert sorted(index for group in groups for index in group) == list(range(25))


def test_scores_are_of_adapters_made_without_the_scan(bench: Bench) -> None:
    bench.masks = {"a": found(0.7)}
    validated = leave_one_out(kinds("a")[0], scans(4), [None])
    assert bench.made == [("a", 3)] * 4
    assert validated.dsc == (pytest.approx((0.7,) * 4, abs=1e-3),)


def test_softmax_is_not_scored_on_what_it_could_not_learn_without_the_scan(bench: Bench) -> None:
    """It learns from scans that show every organ: without the only such scan, nothing."""
    bench.masks = {"a": found(0.7)}
    (scan,) = scans(1)
    whole, partial = (
        replace(scan, annotated=np.array(annotated), reference=(scan.reference[0], (1, 2)))
        for annotated in ([True, True], [True, False])
        if scan.reference
    )
    for activation, scores in (("sigmoid", 3), ("softmax", 2)):
        candidate = Candidate("a", AdapterSettings(activation=activation), TrainingSettings())
        validated = leave_one_out(candidate, [whole, partial, partial], [None, None])
        assert [len(organ) for organ in validated.dsc] == [scores, 0]


def test_the_best_is_taken_and_a_dearer_one_only_if_it_is_worth_it(bench: Bench) -> None:
    bench.masks = {"cheap": found(0.7), "dear": found(0.703)}
    assert best_of(kinds("cheap", "dear"), scans(3), [None])[0].candidate.name == "cheap"
    bench.masks["dear"] = found(0.71)
    assert best_of(kinds("cheap", "dear"), scans(3), [None])[0].candidate.name == "dear"


def test_what_is_far_behind_after_two_folds_is_given_up(bench: Bench) -> None:
    bench.masks = {"hopeless": found(0.6), "behind": found(0.68), "best": found(0.7)}
    _, validated = best_of(kinds("hopeless", "behind", "best"), scans(5), [None])
    assert [result.candidate.name for result in validated] == ["behind", "best"]
    assert [name for name, _ in bench.made].count("hopeless") == 2
    assert [name for name, _ in bench.made].count("behind") == 5


def test_post_processing_is_chosen_where_it_helps_and_counts_in_the_score(bench: Bench) -> None:
    stray = found(0.9)
    stray[14:, 14:] = 1
    bench.masks = {"stray": stray}
    validated = leave_one_out(kinds("stray")[0], scans(2), [None])
    assert validated.post_processing == (PostProcessing(largest_component=True),)
    assert validated.dsc == (pytest.approx((0.9, 0.9), abs=1e-3),)


def test_post_processing_that_gains_next_to_nothing_is_not_chosen(bench: Bench) -> None:
    stray = found(0.9)
    stray[15, 15, 15] = 1
    bench.masks = {"stray": stray}
    assert leave_one_out(kinds("stray")[0], scans(2), [None]).post_processing == (PostProcessing(),)


def test_zero_shot_is_no_choice_where_the_encoder_does_not_know_an_organ() -> None:
    names = [kind.name for kind in candidates(TrainingSettings(), AdapterSettings(), [None])]
    assert names == [
        "linear on last",
        "linear on pyramid, ridge 0.01",
        "linear on pyramid, ridge 0.001",
        "pointwise on last",
        "pointwise on pyramid",
        "spatial on last",
        "spatial on pyramid",
    ]
    known = [(cast("Any", None), 0.0)]
    assert candidates(TrainingSettings(), AdapterSettings(), known)[0].name == "zero-shot"
