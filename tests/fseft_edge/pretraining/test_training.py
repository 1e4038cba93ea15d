"""The pre-training loop: checkpoints, metrics, initial weights, and refusals."""

from __future__ import annotations

import csv
import dataclasses
import errno
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles.cohorts import write_cohort
from doubles.errors import refused

from fseft_edge.adaptation.losses import partial_label_loss
from fseft_edge.export.checkpoints import read_model_file
from fseft_edge.export.zoo import MODELS
from fseft_edge.pretraining import PretrainingConfig, Processes, pretrain, read_pretraining_config, training
from fseft_edge.pretraining.config import SwinUnetrConfig
from fseft_edge.pretraining.training import learning_rate
from fseft_edge.pretraining.training_cases import Batch, draw_batch, load_cohorts
from fseft_edge.runtime.encoder.bundle import sha256_of_file
from fseft_edge.runtime.encoder.networks.swin_unetr import SwinUnetrFeatures
from fseft_edge.runtime.errors import CheckpointError, MissingBackendError, OutOfSpaceError, UsageError
from fseft_edge.runtime.system.progress import SilentProgress


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_cohort(root)
    return root


def metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def config(data: Path) -> PretrainingConfig:
    return read_pretraining_config(data / "config.toml")


def test_cases_are_those_of_the_list_with_their_annotated_organs(data: Path, config: PretrainingConfig) -> None:
    files, phantoms = load_cohorts(config, data, SilentProgress())
    assert len(files) == 2
    assert files[0].task_mask.tolist() == [True, True, True, True, False]
    assert files[1].task_mask.tolist() == [False, True, True, True, False]
    assert phantoms[0].task_mask.tolist() == [False, False, False, False, True]


def test_halves_divide_an_organ_into_the_patients_right_and_left(data: Path, config: PretrainingConfig) -> None:
    case = load_cohorts(config, data, SilentProgress())[0][0]
    spine, right, left = (case.organ_bits & (1 << bit) != 0 for bit in (1, 2, 3))
    assert np.array_equal(right | left, spine)
    assert not (right & left).any()
    assert np.flatnonzero(right.any((1, 2))).min() > np.flatnonzero(left.any((1, 2))).max()


def test_a_step_always_has_the_same_crops(data: Path, config: PretrainingConfig) -> None:
    cohorts = load_cohorts(config, data, SilentProgress())
    first, second, other = (
        draw_batch(config, cohorts, 4),
        draw_batch(config, cohorts, 4),
        draw_batch(config, cohorts, 5),
    )
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.targets, second.targets)
    assert not torch.equal(first.image, other.image)
    assert first.image.shape == (2, 1, 32, 32, 32)
    assert first.targets.shape == (2, 5, 32, 32, 32)


@pytest.mark.parametrize("dice", ["crop", "batch"])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    data: Path, config: PretrainingConfig, tmp_path: Path, dice: str
) -> None:
    config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"dice": dice, "steps": 4})})
    straight = pretrain(config, data_root=data, output=tmp_path / "straight")
    pretrain(config, data_root=data, output=tmp_path / "broken", stop_after=3)
    resumed = pretrain(config, data_root=data, output=tmp_path / "broken", resume=True)
    assert resumed.read_bytes() == straight.read_bytes()
    assert read_model_file(resumed).description.training["steps"] == 4
    rows, others = (metrics(tmp_path / folder) for folder in ("straight", "broken"))
    assert [row.pop("seconds") > 0 for row in rows] == [True] * 4
    assert [{key: value for key, value in row.items() if key != "seconds"} for row in others] == rows


def test_metrics_contain_losses_and_learning_rate(data: Path, config: PretrainingConfig, tmp_path: Path) -> None:
    pretrain(config, data_root=data, output=tmp_path, stop_after=3)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["loss"] == pytest.approx(row["segmentation"] + row["deep_supervision"] + row["inpainting"])
        assert row["learning_rate"] == learning_rate(config, int(row["step"]) - 1)


def test_rows_beyond_the_checkpoint_are_dropped(data: Path, config: PretrainingConfig, tmp_path: Path) -> None:
    pretrain(config, data_root=data, output=tmp_path, stop_after=3)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,0,0,0,0,0,0\n5,0,")  # a run that was killed while writing
    pretrain(config, data_root=data, output=tmp_path, resume=True)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[3]["loss"] > 0


def test_tensorboard_events_equal_the_table(data: Path, config: PretrainingConfig, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pretrain(config, data_root=data, output=tmp_path, stop_after=4, tensorboard=True)
    pretrain(config, data_root=data, output=tmp_path, resume=True, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "segmentation", "learning_rate"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4, 5, 6]
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx([row[name] for row in metrics(tmp_path)])


def test_missing_tensorboard_is_refused_before_training(
    data: Path, config: PretrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with refused(MissingBackendError, "--tensorboard") as caught:
        pretrain(config, data_root=data, output=tmp_path, tensorboard=True)
    assert "fseft-edge[tensorboard]" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_a_full_disk_names_the_file(
    data: Path, config: PretrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with refused(OutOfSpaceError, "checkpoint.pt"):
        pretrain(config, data_root=data, output=tmp_path / "run", stop_after=1)


def test_an_earlier_run_is_neither_overwritten_nor_resumed_with_another_configuration(
    data: Path, config: PretrainingConfig, tmp_path: Path
) -> None:
    pretrain(config, data_root=data, output=tmp_path, stop_after=1)
    with refused(CheckpointError, "checkpoint.pt") as caught:
        pretrain(config, data_root=data, output=tmp_path)
    assert "--resume" in caught.value.remedy
    with refused(CheckpointError, "checkpoint.pt", "configuration"):
        pretrain(config.model_copy(update={"seed": 8}), data_root=data, output=tmp_path, resume=True)


def test_training_can_start_from_a_model_file(data: Path, config: PretrainingConfig, tmp_path: Path) -> None:
    first = pretrain(config, data_root=data, output=tmp_path / "first", stop_after=1)
    still = config.model_copy(update={"schedule": config.schedule.model_copy(update={"learning_rate": 1e-12})})
    second = pretrain(still, data_root=data, output=tmp_path / "second", initial=first, stop_after=1)
    a, b = read_model_file(first), read_model_file(second)
    torch.testing.assert_close(a.head_weight, b.head_weight, rtol=0, atol=1e-4)
    name = "down.0.first.convolution.weight"
    torch.testing.assert_close(a.encoder[name], b.encoder[name], rtol=0, atol=1e-3)


def test_training_can_start_from_a_published_checkpoint(
    data: Path, config: PretrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = MODELS["fseft"].published
    assert published is not None
    small = published.model_copy(update={"settings": {"feature_size": 12}, "organs": ("spleen", "pancreas")})
    monkeypatch.setitem(MODELS, "fseft", dataclasses.replace(MODELS["fseft"], published=small))
    weights = SwinUnetrFeatures(12).state_dict()
    head = {"classifier.weight": torch.rand(2, 12, 1, 1, 1), "classifier.bias": torch.rand(2)}
    checkpoint = tmp_path / "fseft.pth"
    torch.save({"net": {f"module.{key}": value for key, value in (weights | head).items()}}, checkpoint)
    swin = SwinUnetrConfig(architecture="swin_unetr", feature_size=12, window=(64, 64, 64))
    config = config.model_copy(update={"encoder": swin})
    started = pretrain(
        config, data_root=data, output=tmp_path / "run", initial=checkpoint, initial_model="fseft", stop_after=0
    )
    model = read_model_file(started)
    assert model.description.architecture == "swin_unetr"
    assert model.description.settings == {"feature_size": 12}
    for key, value in weights.items():
        torch.testing.assert_close(model.encoder[key], value, rtol=1e-3, atol=1e-6)
    assert torch.equal(model.head_weight[4], head["classifier.weight"][0].flatten())
    assert float(model.head_bias[4]) == float(head["classifier.bias"][0])


def test_training_can_start_from_a_self_supervised_transformer(
    data: Path, config: PretrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the transformer are those of the file; the other weights are random and depend on the seed."""
    published = MODELS["selfsup"].published
    assert published is not None
    small = published.model_copy(update={"settings": {"feature_size": 12}})
    monkeypatch.setitem(MODELS, "selfsup", dataclasses.replace(MODELS["selfsup"], published=small))
    transformer = {k: v for k, v in SwinUnetrFeatures(12).state_dict().items() if k.startswith("swinViT.")}
    torch.save({"state_dict": transformer}, tmp_path / "model_swinvit.pt")
    swin = SwinUnetrConfig(architecture="swin_unetr", feature_size=12, window=(64, 64, 64))
    started = [
        read_model_file(
            pretrain(
                config.model_copy(update={"encoder": swin, "seed": seed}),
                data_root=data,
                output=tmp_path / f"{initial_model}{seed}",
                initial=tmp_path / "model_swinvit.pt" if initial_model else None,
                initial_model=initial_model,
                stop_after=0,
            )
        ).encoder
        for seed, initial_model in ((1, "selfsup"), (2, "selfsup"), (2, None))
    ]
    for key, value in started[0].items():
        if key in transformer:
            torch.testing.assert_close(value, transformer[key], rtol=1e-3, atol=1e-6)
        assert torch.equal(value, started[1][key]) == (key in transformer or value.ndim < 2), key
        if key not in transformer:
            assert torch.equal(started[1][key], started[2][key]), key


def test_weights_of_another_architecture_are_refused(data: Path, config: PretrainingConfig, tmp_path: Path) -> None:
    swin = SwinUnetrConfig(architecture="swin_unetr", feature_size=12, window=(64, 64, 64))
    with refused(CheckpointError, "residual_unet", "swin_unetr"):
        pretrain(
            config.model_copy(update={"encoder": swin}), data_root=data, output=tmp_path, initial_model="edge_base"
        )


def test_a_resumed_run_keeps_its_initial_weights(data: Path, config: PretrainingConfig, tmp_path: Path) -> None:
    first, other = (
        pretrain(config.model_copy(update={"seed": seed}), data_root=data, output=tmp_path / f"{seed}", stop_after=1)
        for seed in (1, 2)
    )
    run = tmp_path / "run"
    pretrain(config, data_root=data, output=run, initial=first, stop_after=1)
    with refused(CheckpointError, "checkpoint.pt", "--initial"):
        pretrain(config, data_root=data, output=run, initial=other, resume=True, stop_after=1)
    path = pretrain(config, data_root=data, output=run, resume=True, stop_after=1)
    assert read_model_file(path).description.training["initial_sha256"] == sha256_of_file(first)


def test_a_run_that_diverges_ends_and_keeps_its_checkpoint(
    data: Path, config: PretrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(config, data_root=data, output=tmp_path, stop_after=1)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    loss = partial_label_loss
    monkeypatch.setattr(training, "partial_label_loss", lambda *given, **named: loss(*given, **named) * float("inf"))
    with refused(CheckpointError, "step 2"):
        pretrain(config, data_root=data, output=tmp_path, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_crops_that_a_thread_makes_in_advance_belong_to_their_steps(data: Path, config: PretrainingConfig) -> None:
    cohorts = load_cohorts(config, data, SilentProgress())
    gpu = Processes(torch.device("cuda"), rank=1, count=2)
    ahead = list(training._batches(config, cohorts, range(2, 5), gpu))
    assert len(ahead) == 3
    for step, batch in zip(range(2, 5), ahead, strict=True):
        assert torch.equal(batch.image, draw_batch(config, cohorts, step).image[1:])
    assert list(training._batches(config, cohorts, range(2, 2), gpu)) == []


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_without_bfloat16_computes_in_float32_with_a_warning(
    config: PretrainingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has: bool
) -> None:
    config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"bfloat16": True})})
    monkeypatch.setattr(training, "has_bfloat16", lambda device: has)
    state = training._initial_state(config, None, None, Processes(torch.device("cpu")))
    with caplog.at_level(logging.WARNING):
        step = training._Step(state, config, Processes(torch.device("cuda")))
    assert step._bfloat16 == has
    assert ("bfloat16" in caplog.text) == (not has)


def test_a_model_without_its_checkpoint_is_refused(data: Path, config: PretrainingConfig, tmp_path: Path) -> None:
    with refused(UsageError, "fseft"):
        pretrain(config, data_root=data, output=tmp_path, initial_model="fseft")


def test_a_swin_unetr_is_trained_with_gradient_checkpointing(config: PretrainingConfig) -> None:
    swin = SwinUnetrConfig(architecture="swin_unetr", feature_size=12, window=(64, 64, 64), gradient_checkpointing=True)
    schedule = config.schedule.model_copy(update={"steps": 1, "deep_supervision": ()})
    changed = config.model_copy(update={"encoder": swin, "schedule": schedule, "dataset": config.dataset[1:]})
    processes = Processes(torch.device("cpu"))
    state = training._initial_state(changed, None, None, processes)
    image = torch.rand(1, 1, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = Batch(image, image, (image > 0.5).float().expand(-1, 5, -1, -1, -1), torch.ones(1, 5))
    metrics_of_step = training._Step(state, changed, processes).take(iter([batch]))
    assert state.network.encoder.gradient_checkpointing
    assert state.step == 1
    assert 0 < metrics_of_step.loss < 10
    assert metrics_of_step.deep_supervision == 0


def test_the_learning_rate_rises_linearly_and_falls_to_zero(config: PretrainingConfig) -> None:
    rates = [learning_rate(config, step) for step in range(config.schedule.steps)]
    assert rates[0] == pytest.approx(0.005)
    assert max(rates) == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.005 * (1 + np.cos(np.pi * 3 / 4)))
