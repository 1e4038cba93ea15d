"""Training with several processes equals training with one process: crops, losses and weights."""

from __future__ import annotations

import copy
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from doubles import training_process
from doubles.cohorts import CONFIG, write_cohort
from doubles.errors import refused
from torch import distributed, nn

from fseft_edge.adaptation.losses import adaptation_loss, partial_label_loss
from fseft_edge.export.checkpoints import read_model_file
from fseft_edge.pretraining import Processes, open_processes, pretrain, read_pretraining_config
from fseft_edge.runtime.errors import EnvironmentProblemError, UsageError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_cohort(root)
    return root


def config_file(data: Path, *changes: tuple[str, str]) -> Path:
    """Write the configuration with three crops per step, and a small learning rate that does not amplify rounding."""
    text = CONFIG.replace("crops_per_step = 1", "crops_per_step = 2", 1).replace("1e-2", "1e-4")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = data / "shared.toml"
    path.write_text(text)
    return path


def torchrun(*command: object) -> None:
    """Run a command in two processes that torchrun connects."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(  # noqa: S603 - our own command
        [*launcher, *map(str, command)], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert ended.returncode == 0, ended.stderr


def curve(folder: Path) -> torch.Tensor:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = ("loss", "segmentation", "deep_supervision", "inpainting", "learning_rate")
    return torch.tensor([[float(row[part]) for part in parts] for row in rows], dtype=torch.float64)


def test_training_with_two_processes_equals_training_with_one(data: Path, tmp_path: Path) -> None:
    """With frozen batch statistics, the only difference is the order of additions."""
    path = config_file(data, ("frozen_norm_fraction = 0.34", "frozen_norm_fraction = 1.0"), ("steps = 6", "steps = 3"))
    single = pretrain(read_pretraining_config(path), data_root=data, output=tmp_path / "one", processes=Processes(CPU))
    command = Path(sys.executable).with_name("fseft-edge")
    arguments = ["pretrain", path, "--data-root", data, "--output", tmp_path / "two", "--device", "cpu"]
    torchrun("--no-python", command, *arguments)
    assert curve(tmp_path / "two").shape == (3, 5)
    torch.testing.assert_close(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=2e-6, atol=0)
    one, two = read_model_file(single), read_model_file(tmp_path / "two" / "tiny.safetensors")
    torch.testing.assert_close(two.head_bias, one.head_bias, rtol=0, atol=1e-5)


def test_two_processes_share_batch_statistics_and_dice_and_resume_to_the_same_bytes(data: Path, tmp_path: Path) -> None:
    path = config_file(
        data,
        ("window = [32, 32, 32]", "window = [32, 32, 32]\ngradient_checkpointing = true"),
        ("checkpoint_every = 3", 'checkpoint_every = 3\ndice = "batch"\nrandom = "crop"'),
        ("steps = 6", "steps = 2"),
    )
    single = pretrain(read_pretraining_config(path), data_root=data, output=tmp_path / "one", processes=Processes(CPU))
    torchrun(training_process.__file__, path, data, tmp_path)
    straight, broken = (tmp_path / run / "tiny.safetensors" for run in ("straight", "broken"))
    assert broken.read_bytes() == straight.read_bytes()
    # torch's own batch normalisation has a larger rounding error in the channels-last memory format
    torch.testing.assert_close(curve(tmp_path / "straight"), curve(tmp_path / "one"), rtol=1e-4, atol=0)
    one, two = read_model_file(single), read_model_file(straight)
    for name, value in one.encoder.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(two.encoder[name], value), name
        elif "running" in name:
            torch.testing.assert_close(two.encoder[name], value, rtol=1e-3, atol=1e-4)


def test_shared_batch_normalisation_equals_that_of_torch() -> None:
    norm = nn.BatchNorm3d(3).double()
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    network = nn.Sequential(copy.deepcopy(norm))
    Processes(CPU, count=2).share_statistics(network)
    shared = network[0]
    assert type(shared) is not nn.BatchNorm3d
    shared._processes = Processes(CPU)  # with one process, its sums are those of the batch
    for _ in range(2):
        x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, found = norm(one), shared(two)
        torch.testing.assert_close(found, expected)
        for output in (expected, found):
            (output * torch.arange(6)).square().sum().backward()
        torch.testing.assert_close(two.grad, one.grad)
    torch.testing.assert_close(shared.weight.grad, norm.weight.grad)
    torch.testing.assert_close(shared.bias.grad, norm.bias.grad)
    torch.testing.assert_close(shared.running_mean, norm.running_mean)
    torch.testing.assert_close(shared.running_var, norm.running_var)
    norm.eval(), shared.eval()
    torch.testing.assert_close(shared(x), norm(x))


@pytest.mark.parametrize("loss", [partial_label_loss, adaptation_loss])
def test_the_joint_loss_of_two_halves_equals_the_loss_of_the_whole_batch(loss: object) -> None:
    logits, targets = torch.randn(4, 3, 4, 4, 4), (torch.rand(4, 3, 4, 4, 4) > 0.6).float()
    mask = torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]])
    more = ("sigmoid",) if loss is adaptation_loss else ()
    sums: list[list[torch.Tensor]] = [[], []]
    for half, recorded in zip((slice(0, 2), slice(2, 4)), sums, strict=True):
        loss(logits[half], targets[half], mask[half], *more, total=lambda sum_, to=recorded: to.append(sum_) or sum_)
    both = iter([a + b for a, b in zip(*sums, strict=True)])
    together = loss(logits[:2], targets[:2], mask[:2], *more, total=lambda _: next(both))
    torch.testing.assert_close(together, loss(logits, targets, mask, *more))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with refused(EnvironmentProblemError, 4, 2) as caught:
        open_processes("cuda").__enter__()
    assert "--nproc-per-node 2" in caught.value.remedy


def test_processes_without_a_gpu_are_refused_unless_the_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with refused(EnvironmentProblemError, 4) as caught:
        open_processes("auto").__enter__()
    assert "--device cpu" in caught.value.remedy


def test_the_end_of_another_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_torchelastic_launched", lambda: True)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(distributed, name, lambda *_: None)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    for name, value in {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with open_processes("cpu") as processes:
        assert not processes.first
    with refused(EnvironmentProblemError), open_processes("cpu"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError, match="a bug"), open_processes("cpu"):
        raise RuntimeError("a bug")


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with refused(EnvironmentProblemError, "cuda"):
        open_processes("cuda").__enter__()


def test_more_processes_than_crops_are_refused(data: Path, tmp_path: Path) -> None:
    with refused(UsageError, 4, 3):
        pretrain(
            read_pretraining_config(config_file(data)),
            data_root=data,
            output=tmp_path / "run",
            processes=Processes(CPU, 0, 4),
        )
    assert not (tmp_path / "run").exists()
