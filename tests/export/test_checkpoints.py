"""Reading and writing model files and published checkpoints."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles.errors import refused
from doubles.models import CHANNELS, small_model, small_network
from safetensors.torch import load_file, save_file

from fseft_edge.export.checkpoints import (
    ModelFile,
    load_weights,
    read_checkpoint,
    read_model_file,
    write_model_file,
)
from fseft_edge.runtime.errors import CheckpointError


class Executes:
    """Unpickling this object creates a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.victim,))


def test_model_file_returns_the_written_model(tmp_path: Path) -> None:
    model = small_model()
    write_model_file(tmp_path / "small.safetensors", model)
    read = read_model_file(tmp_path / "small.safetensors")
    assert read.description == model.description
    assert read.encoder.keys() == model.encoder.keys()
    for key, value in model.encoder.items():
        expected = value.half().float() if value.ndim > 1 else value
        assert torch.equal(read.encoder[key], expected), key
    assert torch.equal(read.head_weight, model.head_weight)
    assert torch.equal(read.head_bias, model.head_bias)


def test_model_file_of_the_same_model_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_model_file(tmp_path / name, small_model())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_model_file_refuses_weights_beyond_half_precision(tmp_path: Path) -> None:
    model = small_model()
    encoder = {**model.encoder, "down.0.first.convolution.weight": torch.full((CHANNELS[0], 1, 3, 3, 3), 1e6)}
    with refused(CheckpointError, "down.0.first.convolution.weight"):
        write_model_file(tmp_path / "x", ModelFile(model.description, encoder, model.head_weight, model.head_bias))
    assert list(tmp_path.iterdir()) == []


def test_model_file_refuses_a_head_of_other_organs(tmp_path: Path) -> None:
    model = small_model()
    with refused(CheckpointError, 2):
        write_model_file(
            tmp_path / "x", ModelFile(model.description, model.encoder, model.head_weight[:1], model.head_bias)
        )


def test_truncated_model_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    write_model_file(path, small_model())
    path.write_bytes(path.read_bytes()[:-100])
    with refused(CheckpointError, path):
        read_model_file(path)


def test_missing_model_file_is_refused(tmp_path: Path) -> None:
    with refused(CheckpointError, tmp_path / "none.safetensors"):
        read_model_file(tmp_path / "none.safetensors")


def test_other_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with refused(CheckpointError, tmp_path / "other.safetensors"):
        read_model_file(tmp_path / "other.safetensors")


def test_model_file_with_an_unknown_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "future.safetensors"
    write_model_file(path, small_model())
    description = json.loads(small_model().description.model_dump_json()) | {"schema_version": 7}
    save_file(load_file(path), path, metadata={"fseft_edge_model": json.dumps(description)})
    with refused(CheckpointError, path, 7):
        read_model_file(path)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "net", "model", "module."])
def test_state_dict_is_found_in_all_usual_forms_of_a_checkpoint(tmp_path: Path, wrap: str) -> None:
    weights = {"a.weight": torch.arange(3.0)}
    content = {
        "plain": weights,
        "module.": {f"module.{key}": value for key, value in weights.items()},
    }.get(wrap, {"epoch": 3, wrap: weights})
    torch.save(content, tmp_path / "c.pth")
    read = read_checkpoint(tmp_path / "c.pth")
    assert read.keys() == weights.keys()
    assert torch.equal(read["a.weight"], weights["a.weight"])


def test_checkpoint_may_be_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "c.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "c.safetensors")["a"], torch.arange(3.0))


@pytest.mark.parametrize("home", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_checkpoint_may_contain_a_numpy_number(tmp_path: Path, home: bytes) -> None:
    """MONAI's research code stores the best score as a NumPy number; NumPy 1 has another name for its module."""
    torch.save({"state_dict": {"a": torch.ones(1)}, "best_acc": np.float64(0.8)}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as source, zipfile.ZipFile(tmp_path / "c.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.multiarray", home))
    assert torch.equal(read_checkpoint(tmp_path / "c.pt")["a"], torch.ones(1))


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_with_code_is_refused_and_the_code_is_not_executed(tmp_path: Path, zipped: bool) -> None:
    content = {"state_dict": {"a": torch.zeros(1)}, "extra": Executes(tmp_path / "executed")}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    with refused(CheckpointError, tmp_path / "c.pth") as caught:
        read_checkpoint(tmp_path / "c.pth")
    assert "safetensors" in caught.value.remedy  # and not: download the file again
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_plain_pickle_is_refused_and_executes_nothing(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "c.pth").write_bytes(pickle.dumps(Executes(tmp_path / "executed"), protocol))
    with refused(CheckpointError, tmp_path / "c.pth"):
        read_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_checkpoint_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "c.pth"
    torch.save({"a": torch.randn(4000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with refused(CheckpointError, path):
        read_checkpoint(path)


def test_text_file_is_refused_as_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "c.pth").write_text("<html>404</html>")
    with refused(CheckpointError, tmp_path / "c.pth"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("content", [{}, {"a": 1}, [torch.zeros(1)], torch.zeros(1)])
def test_checkpoint_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "c.pth")
    with refused(CheckpointError, tmp_path / "c.pth"):
        read_checkpoint(tmp_path / "c.pth")


def test_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with refused(CheckpointError, tmp_path / "none.pth"):
        read_checkpoint(tmp_path / "none.pth")


def test_error_lists_wrong_weights_and_nothing_is_loaded() -> None:
    network = small_network(0)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    weights = dict(small_network(1).state_dict())
    del weights["up.0.bias"]
    weights["foreign.weight"] = torch.zeros(1)
    weights["up.1.bias"] = torch.zeros(5)
    with refused(CheckpointError, "c.pth", "up.0.bias", "foreign.weight", "up.1.bias", [5], [6]):
        load_weights(network, weights, source="c.pth")
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


def test_error_lists_only_the_first_of_many_missing_weights() -> None:
    network = small_network()
    names = list(network.state_dict())
    with refused(CheckpointError, "c.pth", len(names), names[0]) as caught:
        load_weights(network, {}, source="c.pth")
    assert sum(name in caught.value.message for name in names) < 6
