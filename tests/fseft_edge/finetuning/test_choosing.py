"""Whether fine-tuning does better than an adapter: validation and choice."""

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
from doubles.models import small_contents
from doubles.tuning_site import LIVER, SHORT, SPLEEN, TuningSite, tuning_site

from fseft_edge.adaptation.cross_validation import OrganScores
from fseft_edge.adapters.file import AdapterFile
from fseft_edge.finetuning.choosing import better_tuning, default_candidates, try_finetuning, tuning_beside, why_not
from fseft_edge.finetuning.finetune import TuningSupport, check_tunable
from fseft_edge.finetuning.settings import TuningSettings
from fseft_edge.finetuning.training import DivergedError, TunedNetwork
from fseft_edge.finetuning.tuning_file import TuningFile, read_tuning
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.errors import OutOfMemoryError, UsageError
from fseft_edge.runtime.scans.organs import OrganLabel


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> TuningSite:
    return tuning_site(tmp_path_factory.mktemp("site"))


def test_scans_left_out_are_scored_by_a_network_that_never_saw_them(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[list[int]] = []
    tuned = TuningSupport.tuned

    def noted(support: TuningSupport, settings: TuningSettings, among: Sequence[int], *rest: Any, **more: Any) -> Any:
        taught.append(list(among))
        return tuned(support, settings, among, *rest, **more)

    monkeypatch.setattr(TuningSupport, "tuned", noted)
    file = site.finetune(TuningSettings("bitfit", **SHORT), tmp_path / "v.tuning", validate=True)
    assert [len(organ.left_out_dsc) for organ in file.description.organs] == [2, 2]
    assert all(0 <= score <= 1 for organ in file.description.organs for score in organ.left_out_dsc)
    assert taught == [[1], [0], [0, 1]]


def test_one_scan_cannot_be_validated_and_that_is_said(
    site: TuningSite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        settings = TuningSettings("bitfit", **SHORT)
        file = site.finetune(settings, tmp_path / "v.tuning", validate=True, cases=["case_1"])
    assert file.description.organs[0].left_out_dsc == ()
    assert "nothing can be validated" in caplog.text


def adapter_with(scores: float | None, tmp_path: Path, site: TuningSite) -> AdapterFile:
    """An adapter with the same score for all that was left out; None where nothing was."""
    file = write_random_adapter(tmp_path / "a.adapter", site.bundle, ("liver", "spleen"))
    left_out = () if scores is None else (scores, scores)
    organs = tuple(organ.model_copy(update={"left_out_dsc": left_out}) for organ in file.description.organs)
    return replace(file, description=file.description.model_copy(update={"organs": organs}))


@pytest.mark.parametrize(
    ("scores", "known", "why"),
    [
        (0.5, (True, False), None),
        (0.5, (False, False), None),
        (0.9, (True, False), "finds every organ"),
        (0.5, (True, True), "knows every organ"),
        (None, (True, False), "nothing can be compared"),
    ],
)
def test_fine_tuning_is_tried_where_an_adapter_falls_short_of_a_new_organ(
    site: TuningSite, tmp_path: Path, scores: float | None, known: tuple[bool, bool], why: str | None
) -> None:
    reason = why_not(adapter_with(scores, tmp_path, site), known)
    assert reason is None if why is None else why in (reason or "")


GOOD = TuningSettings("full", steps=25, crops=2, crop=32, bfloat16=False, rate=1e-2)


def all_new(site: TuningSite) -> TuningSupport:
    """Both scans, and an encoder that knows none of the organs."""
    return replace(site.support(), rows=[None, None])


def within(minutes: float) -> float:
    return time.monotonic() + 60 * minutes


def test_the_better_one_is_taken(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On scans left out "full" is right in every voxel of the spleen, which is new, and the others in none."""

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
    assert "full is not worth it: DSC 1.000 of new organs on scans left out, 1.010 wanted" in caplog.text


@pytest.mark.parametrize(("adapters", "taken"), [((1.0, 0.9), True), ((1.0, 0.97), False)])
def test_new_organs_decide_unless_the_known_ones_lose_more(
    site: TuningSite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapters: tuple[float, float],
    taken: bool,
) -> None:
    """Fine-tuning finds all of the new organ, and loses a few hundredths of the known one."""

    def scored(scores: OrganScores, support: Any, settings: TuningSettings, left_out: Sequence[int], **_: Any) -> None:
        for index in left_out:
            labels = support.annotated[index][1]
            liver = labels.array == LIVER.label
            liver[np.nonzero(liver.any((1, 2)))[0][:6]] = False
            mask = np.uint8(1) * liver + np.uint8(2) * (labels.array == SPLEEN.label)
            scores.add(mask, labels, [LIVER.label, SPLEEN.label], np.array([True, True]))

    monkeypatch.setattr("fseft_edge.finetuning.choosing.add_fold", scored)
    file = adapter_with(0.0, tmp_path, site)
    organs = tuple(
        organ.model_copy(update={"left_out_dsc": (score, score)})
        for organ, score in zip(file.description.organs, adapters, strict=True)
    )
    file = replace(file, description=file.description.model_copy(update={"organs": organs}))
    chosen = better_tuning(file, site.support(), [TuningSettings("bitfit", **SHORT)], deadline=within(30))
    assert (chosen is not None) == taken
    if chosen is not None:
        known, new = (organ.left_out_dsc for organ in chosen.description.organs)
        assert new == (1.0, 1.0)
        assert all(0.9 < score < 0.97 for score in known)


def test_what_runs_out_of_memory_is_given_up_and_what_was_found_before_is_kept(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = TuningSupport.tuned

    def greedy(support: TuningSupport, settings: TuningSettings, *rest: Any, **more: Any) -> Any:
        if settings.method == "lora":
            raise OutOfMemoryError("Memory ran out.", remedy="Buy some.")
        return tuned(support, settings, *rest, **more)

    monkeypatch.setattr(TuningSupport, "tuned", greedy)
    with caplog.at_level(logging.WARNING):
        chosen = better_tuning(
            adapter_with(0.0, tmp_path, site),
            all_new(site),
            [GOOD, replace(GOOD, method="lora")],
            deadline=within(30),
        )
    assert chosen is not None
    assert chosen.description.method == "full"
    assert "lora was given up: Memory ran out." in caplog.text


def test_a_final_training_that_fails_leaves_the_adapter_alone(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = TuningSupport.tuned

    def fails_on_all(
        support: TuningSupport, settings: TuningSettings, among: Sequence[int], *rest: Any, **more: Any
    ) -> Any:
        if len(among) == 2:
            raise DivergedError("It diverged.", remedy="Check the scans.")
        return tuned(support, settings, among, *rest, **more)

    monkeypatch.setattr(TuningSupport, "tuned", fails_on_all)
    with caplog.at_level(logging.WARNING):
        chosen = better_tuning(adapter_with(0.0, tmp_path, site), all_new(site), [GOOD], deadline=within(30))
    assert chosen is None
    assert "full was given up: It diverged." in caplog.text


def test_what_is_compared_is_post_processed_on_both_sides(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are the spleen and a heap of voxels apart from it, which the largest component leaves out."""

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


def test_what_diverges_is_given_up(site: TuningSite, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wild = replace(GOOD, rate=1e30)
    with caplog.at_level(logging.WARNING):
        chosen = better_tuning(adapter_with(0.0, tmp_path, site), site.support(), [wild], deadline=within(30))
    assert chosen is None
    assert "is not finite" in caplog.text


def test_what_is_too_slow_is_given_up_after_a_few_steps(
    site: TuningSite, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[None] = []
    forward = TunedNetwork.forward

    def counted(network: TunedNetwork, windows: torch.Tensor) -> torch.Tensor:
        steps.append(None)
        return forward(network, windows)

    monkeypatch.setattr(TunedNetwork, "forward", counted)
    slow = replace(GOOD, steps=10_000_000, crops=1)
    with caplog.at_level(logging.WARNING):
        chosen = better_tuning(adapter_with(0.0, tmp_path, site), site.support(), [slow], deadline=within(1))
    assert chosen is None
    assert "3 trainings do not fit into the time" in caplog.text
    assert len(steps) == 2


def trial(site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> TuningFile | None:
    """Try one quick candidate beside an adapter that finds nothing."""
    monkeypatch.setattr("fseft_edge.finetuning.choosing.default_candidates", lambda bundle, common: [GOOD])
    return try_finetuning(
        adapter_with(0.0, tmp_path, site),
        *(site.bundle.path, site.root / "images", site.root / "labels", [OrganLabel("hepar", LIVER.label), SPLEEN]),
        **{"output": tmp_path / "a.adapter", "minutes": 30, "device": "cpu", **more},
    )


def test_what_does_better_is_written_beside_the_adapter(
    site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = adapter_with(0.0, tmp_path, site) and (tmp_path / "a.adapter").read_bytes()
    found = trial(site, tmp_path, monkeypatch)
    assert found is not None
    assert read_tuning(tmp_path / "a.tuning").description.losses == found.description.losses
    assert (tmp_path / "a.adapter").read_bytes() == before


def test_a_tuning_takes_the_place_of_nothing(site: TuningSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.adapter"):
        tuning_beside(tmp_path / "a.tuning")
    (tmp_path / "a.tuning").touch()
    with pytest.raises(UsageError, match="already exists"):
        trial(site, tmp_path, monkeypatch)


def test_why_fine_tuning_is_not_tried_is_said(
    site: TuningSite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = try_finetuning(
            adapter_with(0.0, tmp_path, site),
            *(site.bundle.path, site.root / "images", site.root / "labels", [LIVER]),
            output=tmp_path / "a.adapter",
            minutes=1,
            device="cpu",
        )
    assert found is None
    assert "knows every organ" in caplog.text


def test_what_is_tried_fits_the_encoder(site: TuningSite, tmp_path: Path) -> None:
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
