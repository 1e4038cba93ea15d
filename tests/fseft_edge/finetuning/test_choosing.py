"""The choice between an adapter and fine-tuning by cross-validation."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.encoder import write_random_adapter
from doubles.errors import refused
from doubles.models import small_contents
from doubles.tuning_site import LIVER, SHORT, SPLEEN, TuningSite, tuning_site

from fseft_edge.adaptation.cross_validation import OrganScores
from fseft_edge.adaptation.patients import Grouping
from fseft_edge.adaptation.support_set import annotated_volumes_ml, annotation_hash
from fseft_edge.adapters.file import AdapterFile, AdapterOrgan, write_adapter
from fseft_edge.finetuning.choosing import better_tuning, default_candidates, try_finetuning, why_not
from fseft_edge.finetuning.finetune import TuningSupport, check_tunable, cross_validate
from fseft_edge.finetuning.settings import TuningSettings
from fseft_edge.finetuning.training import DivergedError, TunedNetwork
from fseft_edge.finetuning.tuning_file import TuningFile, read_tuning
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.errors import OutOfMemoryError, UsageError
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.system.progress import SilentProgress


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> TuningSite:
    return tuning_site(tmp_path_factory.mktemp("site"))


def test_left_out_scans_are_scored_by_a_network_that_was_not_trained_on_them(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[list[int]] = []
    tuned = TuningSupport.tuned

    def recorded(
        support: TuningSupport, settings: TuningSettings, among: Sequence[int], *rest: Any, **more: Any
    ) -> Any:
        trained_on.append(list(among))
        return tuned(support, settings, among, *rest, **more)

    monkeypatch.setattr(TuningSupport, "tuned", recorded)
    file = site.finetune(TuningSettings("bitfit", **SHORT), tmp_path / "v.tuning", validate=True)
    assert [len(organ.left_out_dsc) for organ in file.description.organs] == [2, 2]
    assert all(0 <= score <= 1 for organ in file.description.organs for score in organ.left_out_dsc)
    assert trained_on == [[1], [0], [0, 1]]


def test_cross_validation_of_one_scan_is_skipped_with_a_warning(
    site: TuningSite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        settings = TuningSettings("bitfit", **SHORT)
        file = site.finetune(settings, tmp_path / "v.tuning", validate=True, cases=["case_1"])
    assert file.description.organs[0].left_out_dsc == ()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_all_scans_of_a_patient_are_left_out_together(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folds: list[Sequence[int]] = []

    def recorded(scores: OrganScores, support: Any, settings: Any, left_out: Sequence[int], **_: Any) -> None:
        folds.append(left_out)
        perfect_fold(scores, support, settings, left_out)

    monkeypatch.setattr("fseft_edge.finetuning.choosing.add_fold", recorded)
    monkeypatch.setattr("fseft_edge.finetuning.finetune.add_fold", recorded)
    support = site.support()
    three = replace(
        support,
        annotated=[*support.annotated, support.annotated[0]],
        cases=[*support.cases, support.cases[0]],
        volumes_ml=[*support.volumes_ml, support.volumes_ml[0]],
        hu=[*support.hu, support.hu[0]],
        identities=[*support.identities, support.identities[0]],
        groups=Grouping((0, 1, 0), by_patient=True),
        rows=[None, None],
    )
    cross_validate(three, FULL, SilentProgress())
    assert folds == [[0, 2], [1]]
    folds.clear()
    tuning = better_tuning(adapter_with(0.0, tmp_path, site), three, [FULL], deadline=within(30))
    assert folds == [[0, 2], [1]]
    assert tuning is not None
    assert tuning.description.support_groups == 2
    assert len(tuning.description.support_annotations) == 3
    one_patient = {"case_1": "anna", "case_2": "anna"}
    folds.clear()
    site.finetune(TuningSettings("bitfit", **SHORT), tmp_path / "v.tuning", validate=True, groups=one_patient)
    assert folds == []
    assert "two patients" in caplog.text


def written(path: Path, site: TuningSite, scores: float | None, *names: str, **more: Any) -> AdapterFile:
    """Write an adapter of the site's scans with this score for every left-out scan of every organ; None for none."""
    file = write_random_adapter(path, site.bundle, names or ("liver", "spleen"))
    volumes = [annotated_volumes_ml(labels, [LIVER, SPLEEN]) for _, labels in site.support().annotated]
    organs = tuple(
        organ.model_copy(
            update={"left_out_dsc": () if scores is None else (scores, scores), "support_volumes_ml": ml, **more}
        )
        for organ, ml in zip(file.description.organs, zip(*volumes, strict=True), strict=False)
    )
    file = replace(file, description=file.description.model_copy(update={"organs": organs}))
    write_adapter(path, file)
    return file


def adapter_with(scores: float | None, tmp_path: Path, site: TuningSite) -> tuple[AdapterOrgan, ...]:
    return written(tmp_path / "a.adapter", site, scores).description.organs


@pytest.mark.parametrize(
    ("scores", "known", "tried"),
    [
        (0.5, (True, False), True),
        (0.5, (False, False), True),
        (0.9, (True, False), False),
        (0.5, (True, True), False),
    ],
    ids=["poor on one new organ", "poor on two new organs", "good", "no new organ"],
)
def test_fine_tuning_is_tried_if_the_adapter_is_poor_on_a_new_organ(
    site: TuningSite, tmp_path: Path, scores: float, known: tuple[bool, bool], tried: bool
) -> None:
    reason = why_not(adapter_with(scores, tmp_path, site), known)
    assert (reason is None) == tried
    assert tried or reason


FULL = TuningSettings("full", **SHORT)


def all_new(site: TuningSite) -> TuningSupport:
    """Return the support set of both scans, with an encoder that has no classifier for any organ."""
    return replace(site.support(), rows=[None, None])


def within(minutes: float) -> float:
    return time.monotonic() + 60 * minutes


def perfect_fold(
    scores: OrganScores, support: Any, settings: TuningSettings, left_out: Sequence[int], **_: Any
) -> None:
    """Add perfect scores for the left-out scans, without any training."""
    for index in left_out:
        labels = support.annotated[index][1]
        mask = np.uint8(1) * (labels.array == LIVER.label) + np.uint8(2) * (labels.array == SPLEEN.label)
        scores.add(mask, labels, [LIVER.label, SPLEEN.label], np.array([True, True]))


def test_the_best_candidate_is_chosen(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On left-out scans, "full" segments the new organ (spleen) perfectly, and the other methods miss it."""

    def scored(scores: OrganScores, support: Any, settings: TuningSettings, left_out: Sequence[int], **_: Any) -> None:
        for index in left_out:
            labels = support.annotated[index][1]
            mask = np.uint8(2) * (labels.array == (SPLEEN.label if settings.method == "full" else 255))
            scores.add(mask, labels, [LIVER.label, SPLEEN.label], np.array([False, True]))

    monkeypatch.setattr("fseft_edge.finetuning.choosing.add_fold", scored)
    support, settings = site.support(), TuningSettings("bitfit", **SHORT)
    candidates = [settings, replace(settings, method="full"), replace(settings, method="affine")]
    chosen = better_tuning(adapter_with(0.5, tmp_path, site), support, candidates, deadline=within(30))
    assert chosen is not None
    assert chosen.description.method == "full"
    assert chosen.description.organs[1].left_out_dsc == (1.0, 1.0)
    with caplog.at_level(logging.WARNING):
        assert better_tuning(adapter_with(0.99, tmp_path, site), support, candidates[1:2], deadline=within(30)) is None
    assert all(text in caplog.text for text in ("full", "1.000", "1.010"))  # the DSC and the required DSC


@pytest.mark.parametrize(("adapters", "chosen"), [((1.0, 0.9), True), ((1.0, 0.97), False)])
def test_new_organs_decide_unless_known_organs_become_worse_by_more(
    site: TuningSite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapters: tuple[float, float],
    chosen: bool,
) -> None:
    """Fine-tuning segments the new organ perfectly, and the DSC of the known organ is lower by a few hundredths."""

    def scored(scores: OrganScores, support: Any, settings: TuningSettings, left_out: Sequence[int], **_: Any) -> None:
        for index in left_out:
            labels = support.annotated[index][1]
            liver = labels.array == LIVER.label
            liver[np.nonzero(liver.any((1, 2)))[0][:6]] = False
            mask = np.uint8(1) * liver + np.uint8(2) * (labels.array == SPLEEN.label)
            scores.add(mask, labels, [LIVER.label, SPLEEN.label], np.array([True, True]))

    monkeypatch.setattr("fseft_edge.finetuning.choosing.add_fold", scored)
    organs = [
        organ.model_copy(update={"left_out_dsc": (score, score)})
        for organ, score in zip(adapter_with(0.0, tmp_path, site), adapters, strict=True)
    ]
    tuning = better_tuning(organs, site.support(), [TuningSettings("bitfit", **SHORT)], deadline=within(30))
    assert (tuning is not None) == chosen
    if tuning is not None:
        known, new = (organ.left_out_dsc for organ in tuning.description.organs)
        assert new == (1.0, 1.0)
        assert all(0.9 < score < 0.97 for score in known)


def test_a_candidate_that_runs_out_of_memory_is_stopped_and_an_earlier_one_is_kept(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = TuningSupport.tuned

    def greedy(support: TuningSupport, settings: TuningSettings, *rest: Any, **more: Any) -> Any:
        if settings.method == "lora":
            raise OutOfMemoryError("Memory ran out.", remedy="Buy some.")
        return tuned(support, settings, *rest, **more)

    def fold(scores: OrganScores, support: Any, settings: TuningSettings, left_out: Sequence[int], **_: Any) -> None:
        if settings.method == "lora":
            support.tuned(settings, [0], SilentProgress())
        perfect_fold(scores, support, settings, left_out)

    monkeypatch.setattr(TuningSupport, "tuned", greedy)
    monkeypatch.setattr("fseft_edge.finetuning.choosing.add_fold", fold)
    with caplog.at_level(logging.WARNING):
        chosen = better_tuning(
            adapter_with(0.0, tmp_path, site),
            all_new(site),
            [FULL, replace(FULL, method="lora")],
            deadline=within(30),
        )
    assert chosen is not None
    assert chosen.description.method == "full"
    assert all(text in caplog.text for text in ("lora", "Memory ran out."))


def test_a_final_training_that_fails_gives_no_tuning(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def diverges(*_: Any, **__: Any) -> Any:
        raise DivergedError("It diverged.", remedy="Check the scans.")

    monkeypatch.setattr(TuningSupport, "tuned", diverges)
    monkeypatch.setattr("fseft_edge.finetuning.choosing.add_fold", perfect_fold)
    with caplog.at_level(logging.WARNING):
        chosen = better_tuning(adapter_with(0.0, tmp_path, site), all_new(site), [FULL], deadline=within(30))
    assert chosen is None
    assert all(text in caplog.text for text in ("full", "It diverged."))


def test_adapter_and_fine_tuning_are_compared_after_post_processing(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks contain the spleen and a separate block of voxels, which the largest component does not include."""

    def scored(scores: OrganScores, support: Any, settings: TuningSettings, left_out: Sequence[int], **_: Any) -> None:
        for index in left_out:
            labels = support.annotated[index][1]
            mask = np.uint8(2) * (labels.array == SPLEEN.label)
            mask[:6, :6, :8] = 2
            scores.add(mask, labels, [LIVER.label, SPLEEN.label], np.array([False, True]))
        assert scores.mean < 0.9

    monkeypatch.setattr("fseft_edge.finetuning.choosing.add_fold", scored)
    settings = TuningSettings("bitfit", **SHORT)
    chosen = better_tuning(adapter_with(0.9, tmp_path, site), site.support(), [settings], deadline=within(30))
    assert chosen is not None
    assert chosen.description.organs[1].post_processing.largest_component
    assert chosen.description.organs[1].left_out_dsc == (1.0, 1.0)


def test_a_candidate_that_diverges_is_stopped(
    site: TuningSite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wild = replace(FULL, steps=25, rate=1e30)
    with caplog.at_level(logging.WARNING):
        chosen = better_tuning(adapter_with(0.0, tmp_path, site), site.support(), [wild], deadline=within(30))
    assert chosen is None
    assert "finite" in caplog.text


def test_a_candidate_that_is_too_slow_is_stopped_after_a_few_steps(
    site: TuningSite, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[None] = []
    forward = TunedNetwork.forward

    def counted(network: TunedNetwork, windows: torch.Tensor) -> torch.Tensor:
        steps.append(None)
        return forward(network, windows)

    monkeypatch.setattr(TunedNetwork, "forward", counted)
    slow = replace(FULL, steps=10_000_000)
    with caplog.at_level(logging.WARNING):
        chosen = better_tuning(adapter_with(0.0, tmp_path, site), site.support(), [slow], deadline=within(1))
    assert chosen is None
    assert "3 trainings" in caplog.text
    assert len(steps) == 2


def trial(site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> TuningFile | None:
    """Try one candidate with perfect scores against an adapter, by default one with a DSC of 0 for both organs."""
    monkeypatch.setattr("fseft_edge.finetuning.choosing.default_candidates", lambda bundle, common: [FULL])
    monkeypatch.setattr("fseft_edge.finetuning.choosing.add_fold", perfect_fold)
    if not (tmp_path / "a.adapter").exists():
        written(tmp_path / "a.adapter", site, 0.0, "hepar", "spleen")
    return try_finetuning(
        tmp_path / "a.adapter",
        *(site.bundle.path, site.root / "images", site.root / "labels"),
        **{"organs": [OrganLabel("hepar", LIVER.label), SPLEEN], "output": tmp_path / "a.tuning"}
        | {"minutes": 30, "device": "cpu", **more},
    )


def test_a_better_tuning_is_written(site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trial(site, tmp_path, monkeypatch)
    assert found is not None
    assert read_tuning(tmp_path / "a.tuning").description.losses == found.description.losses


def test_a_tuning_that_must_surpass_an_adapter_replaces_no_file(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tuning").touch()
    with refused(UsageError, tmp_path / "a.tuning"):
        trial(site, tmp_path, monkeypatch)
    with refused(UsageError, tmp_path / "b.adapter", ".tuning"):
        trial(site, tmp_path, monkeypatch, output=tmp_path / "b.adapter")


def test_the_adapter_must_have_the_organs_the_scans_and_scores_to_compare_with(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.adapter"
    written(path, site, 0.0)
    with refused(UsageError, path, "liver, spleen", "hepar, spleen"):
        trial(site, tmp_path, monkeypatch)
    written(path, site, None, "hepar", "spleen")
    with refused(UsageError, path, "left-out"):
        trial(site, tmp_path, monkeypatch)
    written(path, site, 0.0, "hepar", "spleen", support_volumes_ml=(1.0, 2.0))
    with refused(UsageError, path, "annotations"):
        trial(site, tmp_path, monkeypatch)
    written(path, site, 0.0, "hepar", "spleen")
    with refused(UsageError, path, "annotations"):
        trial(site, tmp_path, monkeypatch, cases=["case_1"])
    assert not (tmp_path / "a.tuning").exists()


def test_the_annotations_and_groups_of_the_adapter_are_compared_by_their_content(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fseft_edge.finetuning.choosing.better_tuning", lambda *_, **__: None)
    organs = [OrganLabel("hepar", LIVER.label), SPLEEN]
    file = written(tmp_path / "a.adapter", site, 0.0, "hepar", "spleen")
    hashes = tuple(annotation_hash(labels, organs) for _, labels in site.support().annotated)
    by_patient = {"case_1": "anna", "case_2": "bo"}

    def stored(annotations: tuple[str, ...], groups: int | None) -> None:
        update = {"support_annotations": annotations, "support_groups": groups}
        write_adapter(tmp_path / "a.adapter", replace(file, description=file.description.model_copy(update=update)))

    stored(hashes, None)
    assert trial(site, tmp_path, monkeypatch) is None
    assert not caplog.records
    with refused(UsageError, tmp_path / "a.adapter", "single scans", "2 groups"):
        trial(site, tmp_path, monkeypatch, groups=by_patient)
    stored(hashes, 2)
    assert trial(site, tmp_path, monkeypatch, groups=by_patient) is None
    with refused(UsageError, tmp_path / "a.adapter", "single scans", "2 groups"):
        trial(site, tmp_path, monkeypatch)
    stored(hashes[::-1], None)  # the volumes are those of the scans, the annotations are not
    with refused(UsageError, tmp_path / "a.adapter", "annotations"):
        trial(site, tmp_path, monkeypatch)
    stored((), None)
    assert trial(site, tmp_path, monkeypatch) is None
    assert "older version" in caplog.text


def test_the_organs_may_be_named_in_another_order_than_in_the_adapter(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        "fseft_edge.finetuning.choosing.better_tuning",
        lambda adapter, *_, **__: seen.append([organ.name for organ in adapter]),
    )
    assert trial(site, tmp_path, monkeypatch, organs=[SPLEEN, OrganLabel("hepar", LIVER.label)]) is None
    assert seen == [["spleen", "hepar"]]
    assert not (tmp_path / "a.tuning").exists()


def test_the_reason_for_not_trying_fine_tuning_is_logged(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path / "a.adapter", site, 0.0, "liver")
    with caplog.at_level(logging.WARNING):
        assert trial(site, tmp_path, monkeypatch, organs=[LIVER]) is None
    assert "every organ" in caplog.text


def test_default_candidates_can_be_used_with_the_encoder(site: TuningSite, tmp_path: Path) -> None:
    common = TuningSettings("full", seed=4, steps=7)

    def tried(bundle: EncoderBundle) -> list[tuple[str, str]]:
        kinds = default_candidates(bundle, common)
        assert {(kind.seed, kind.steps) for kind in kinds} == {(4, 7)}
        for kind in kinds:
            check_tunable(bundle, [LIVER], kind)
        return [(kind.method, kind.of_decoder) for kind in kinds]

    assert tried(site.bundle) == [("affine", "tuned"), ("full", "tuned")]
    swin = build_network("swin_unetr", feature_size=12)
    kind: dict[str, Any] = {"network": swin, "architecture": "swin_unetr", "settings": {"feature_size": 12}}
    whole = EncoderBundle.write(tmp_path / "s.encoder", small_contents(**kind))
    assert tried(whole) == [("lora", "frozen"), ("full", "tuned")]
    parts = (*swin.bridge_parts, *swin.decoder_parts)
    transformer = EncoderBundle.write(tmp_path / "t.encoder", small_contents(**kind, untrained=parts))
    assert tried(transformer) == [("lora", "new"), ("full", "tuned")]
