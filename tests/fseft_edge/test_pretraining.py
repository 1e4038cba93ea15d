from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles.cohorts import write_cohort

from fseft_edge.export.checkpoints import read_model_file
from fseft_edge.pretraining import PretrainingPlan, pretrain, read_plan
from fseft_edge.pretraining.cohort import draw_batch, load_cohorts
from fseft_edge.pretraining.training import learning_rate
from fseft_edge.report.progress import SilentProgress
from fseft_edge.runtime.errors import CheckpointError, OutOfSpaceError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_cohort(root)
    return root


@pytest.fixture(scope="module")
def plan(data: Path) -> PretrainingPlan:
    return read_plan(data / "plan.toml")


def test_cases_follow_the_split_and_only_annotated_organs_count(data: Path, plan: PretrainingPlan) -> None:
    files, phantoms = load_cohorts(plan, data, SilentProgress())
    assert len(files) == 2
    assert files[0].task_mask.tolist() == [True, True, True, True, False]
    assert files[1].task_mask.tolist() == [False, True, True, True, False]
    assert phantoms[0].task_mask.tolist() == [False, False, False, False, True]


def test_halves_divide_an_organ_into_the_patients_right_and_left(data: Path, plan: PretrainingPlan) -> None:
    case = load_cohorts(plan, data, SilentProgress())[0][0]
    spine, right, left = (case.organs & (1 << bit) != 0 for bit in (1, 2, 3))
    assert np.array_equal(right | left, spine)
    assert not (right & left).any()
    assert np.flatnonzero(right.any((1, 2))).min() > np.flatnonzero(left.any((1, 2))).max()


def test_a_step_always_shows_the_same_crops(data: Path, plan: PretrainingPlan) -> None:
    cohorts = load_cohorts(plan, data, SilentProgress())
    first, second, other = draw_batch(plan, cohorts, 4), draw_batch(plan, cohorts, 4), draw_batch(plan, cohorts, 5)
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.targets, second.targets)
    assert not torch.equal(first.image, other.image)
    assert first.image.shape == (2, 1, 32, 32, 32)
    assert first.targets.shape == (2, 5, 32, 32, 32)


@pytest.mark.parametrize("dice", ["crop", "batch"])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    data: Path, plan: PretrainingPlan, tmp_path: Path, dice: str
) -> None:
    plan = plan.model_copy(update={"schedule": plan.schedule.model_copy(update={"dice": dice})})
    straight = pretrain(plan, data_root=data, output=tmp_path / "straight")
    pretrain(plan, data_root=data, output=tmp_path / "broken", stop_after=4)
    resumed = pretrain(plan, data_root=data, output=tmp_path / "broken", resume=True)
    assert resumed.read_bytes() == straight.read_bytes()
    assert read_model_file(resumed).description.training["steps"] == 6
    assert len(json.loads((tmp_path / "straight" / "losses.json").read_text())) == 6


def test_a_full_disk_is_named(
    data: Path, plan: PretrainingPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OutOfSpaceError, match=r"checkpoint\.pt"):
        pretrain(plan, data_root=data, output=tmp_path / "run", stop_after=1)


def test_an_earlier_run_is_not_overwritten_and_not_mixed_with_another_plan(
    data: Path, plan: PretrainingPlan, tmp_path: Path
) -> None:
    pretrain(plan, data_root=data, output=tmp_path, stop_after=1)
    with pytest.raises(CheckpointError, match="--resume"):
        pretrain(plan, data_root=data, output=tmp_path)
    with pytest.raises(CheckpointError, match="another plan"):
        pretrain(plan.model_copy(update={"seed": 8}), data_root=data, output=tmp_path, resume=True)


def test_training_can_start_from_a_model_file(data: Path, plan: PretrainingPlan, tmp_path: Path) -> None:
    first = pretrain(plan, data_root=data, output=tmp_path / "first", stop_after=1)
    still = plan.model_copy(update={"schedule": plan.schedule.model_copy(update={"learning_rate": 1e-12})})
    second = pretrain(still, data_root=data, output=tmp_path / "second", initial=first, stop_after=1)
    a, b = read_model_file(first), read_model_file(second)
    torch.testing.assert_close(a.head_weight, b.head_weight, rtol=0, atol=1e-4)
    name = "down.0.first.convolution.weight"
    torch.testing.assert_close(a.encoder[name], b.encoder[name], rtol=0, atol=1e-3)


def test_the_rate_warms_up_and_falls_to_nothing(plan: PretrainingPlan) -> None:
    rates = [learning_rate(plan, step) for step in range(plan.schedule.steps)]
    assert rates[0] == pytest.approx(0.005)
    assert max(rates) == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.005 * (1 + np.cos(np.pi * 3 / 4)))
