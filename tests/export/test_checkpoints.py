"""Model files and published checkpoints: what is read back, and what is refused."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
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
    """Unpickling this makes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.victim,))


def test_model_file_returns_what_was_written(tmp_path: Path) -> None:
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


def test_model_file_refuses_weights_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    model = small_model()
    encoder = {**model.encoder, "down.0.first.convolution.weight": torch.full((CHANNELS[0], 1, 3, 3, 3), 1e6)}
    with pytest.raises(CheckpointError, match=r"down\.0\.first\.convolution\.weight"):
        write_model_file(tmp_path / "x", ModelFile(model.description, encoder, model.head_weight, model.head_bias))
    assert list(tmp_path.iterdir()) == []


def test_model_file_refuses_a_head_of_other_organs(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(CheckpointError, match="2 organs"):
        write_model_file(
            tmp_path / "x", ModelFile(model.description, model.encoder, model.head_weight[:1], model.head_bias)
        )


def test_truncated_model_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    write_model_file(path, small_model())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"small\.safetensors is truncated"):
        read_model_file(path)


def test_missing_model_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model file at"):
        read_model_file(tmp_path / "none.safetensors")


def test_other_safetensors_file_is_no_model_file(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a model file"):
        read_model_file(tmp_path / "other.safetensors")


def test_model_file_of_an_unknown_schema_names_it(tmp_path: Path) -> None:
    path = tmp_path / "future.safetensors"
    write_model_file(path, small_model())
    description = json.loads(small_model().description.model_dump_json()) | {"schema_version": 7}
    save_file(load_file(path), path, metadata={"fseft_edge_model": json.dumps(description)})
    with pytest.raises(CheckpointError, match="schema 7"):
        read_model_file(path)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "net", "model", "module."])
def test_checkpoint_is_found_in_its_usual_wrappings(tmp_path: Path, wrap: str) -> None:
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
def test_score_as_a_numpy_number_beside_the_weights_is_read_over(tmp_path: Path, home: bytes) -> None:
    """As MONAI's research code stores its best score; NumPy 1 called the place of its numbers differently."""
    torch.save({"state_dict": {"a": torch.ones(1)}, "best_acc": np.float64(0.8)}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as source, zipfile.ZipFile(tmp_path / "c.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.multiarray", home))
    assert torch.equal(read_checkpoint(tmp_path / "c.pt")["a"], torch.ones(1))


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_that_would_execute_code_is_refused_and_does_not(tmp_path: Path, zipped: bool) -> None:
    content = {"state_dict": {"a": torch.zeros(1)}, "extra": Executes(tmp_path / "executed")}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"c\.pth holds more than weights.*execute code"):
        read_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_plain_pickle_is_refused_and_executes_nothing(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "c.pth").write_bytes(pickle.dumps(Executes(tmp_path / "executed"), protocol))
    with pytest.raises(CheckpointError, match=r"c\.pth"):
        read_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_checkpoint_says_so(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "c.pth"
    torch.save({"a": torch.randn(4000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"c\.pth is truncated or no checkpoint"):
        read_checkpoint(path)


def test_text_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "c.pth").write_text("<html>404</html>")
    with pytest.raises(CheckpointError, match=r"c\.pth is truncated or no checkpoint"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("content", [{}, {"a": 1}, [torch.zeros(1)], torch.zeros(1)])
def test_checkpoint_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        read_checkpoint(tmp_path / "c.pth")


def test_missing_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "none.pth")


def test_weights_of_another_network_are_named_and_nothing_is_loaded() -> None:
    network = small_network(0)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    weights = dict(small_network(1).state_dict())
    del weights["up.0.bias"]
    weights["foreign.weight"] = torch.zeros(1)
    weights["up.1.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as caught:
        load_weights(network, weights, source="c.pth")
    message = str(caught.value)
    assert "c.pth" in message
    assert "1 missing (up.0.bias)" in message
    assert "1 unexpected (foreign.weight)" in message
    assert "1 of another shape (up.1.bias [5] instead of [6])" in message
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


def test_long_list_of_missing_weights_is_cut() -> None:
    network = small_network()
    first = next(iter(network.state_dict()))
    with pytest.raises(CheckpointError) as caught:
        load_weights(network, {}, source="c.pth")
    assert f"{len(network.state_dict())} missing ({first}, " in caught.value.message
    assert caught.value.message.count(", ") < 6
