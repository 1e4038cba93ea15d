"""Export of a checkpoint to an encoder bundle, and its errors."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from doubles.errors import refused
from doubles.models import ORGANS, small_graph_bytes, small_model, small_network, windows

from fseft_edge.export import export
from fseft_edge.export.checkpoints import read_model_file, write_model_file
from fseft_edge.export.export import Tiling, export_encoder
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.networks.residual_unet import ResidualUNet
from fseft_edge.runtime.errors import CheckpointError, UsageError

TILINGS: tuple[Tiling | None, ...] = (None, "whole", "windows")


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    write_model_file(path, small_model())
    return path


def test_bundle_contains_encoder_head_and_a_passed_parity_report(model_file: Path, tmp_path: Path) -> None:
    export_encoder(model_file, model="custom", output=tmp_path / "small.encoder")
    bundle = EncoderBundle.open(tmp_path / "small.encoder")
    manifest = bundle.manifest
    assert manifest.name == "small"
    assert manifest.organs == ORGANS
    assert manifest.checkpoint_sha256 == hashlib.sha256(model_file.read_bytes()).hexdigest()
    assert set(manifest.files) == {
        "encoder.mixed.onnx",
        "encoder.onnx",
        "encoder.safetensors",
        "head.safetensors",
    }
    assert bundle.mixed_graph == tmp_path / "small.encoder" / "encoder.mixed.onnx"
    assert {"onnxruntime", "onnxruntime-mixed", "openvino"} <= manifest.parity.keys()
    assert manifest.parity["openvino"].shortcoming is None
    assert torch.equal(bundle.head_weight(), small_model().head_weight)
    reference = small_network()
    reference.load_state_dict(dict(read_model_file(model_file).encoder))
    with torch.no_grad():
        expected, features = reference(windows(1)), bundle.network()(windows(1))
    assert all(torch.equal(a, b) for a, b in zip(expected, features, strict=True))


@pytest.fixture
def copied_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the exporter, which takes seconds, by a copy of existing graphs."""

    def copy(
        network: object,
        window: object,
        path: Path,
        precision: Literal["float32", "mixed"] = "float32",
        *,
        whole_scan: object,
    ) -> None:
        assert whole_scan == small_network().whole_scan
        path.write_bytes(small_graph_bytes(precision, whole_scan=True))

    monkeypatch.setattr(export, "write_graph", copy)


@pytest.mark.usefixtures("copied_graph")
def test_encoder_id_does_not_depend_on_the_graph(model_file: Path, tmp_path: Path) -> None:
    ids = {
        export_encoder(model_file, model="custom", output=tmp_path / f"{onnx}.encoder", onnx=onnx).encoder_id
        for onnx in (True, False)
    }
    assert len(ids) == 1


def test_export_without_a_graph_does_not_call_the_exporter(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "write_graph", None)
    bundle = export_encoder(model_file, model="custom", output=tmp_path / "s.encoder", onnx=False)
    assert bundle.graph is None
    assert bundle.manifest.parity == {}


@pytest.mark.usefixtures("copied_graph")
def test_export_without_installed_engines_writes_no_parity_reports_of_engines(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fseft_edge.export.parity.find_spec", lambda name: None)
    bundle = export_encoder(model_file, model="custom", output=tmp_path / "s.encoder")
    assert bundle.graph is not None
    assert bundle.manifest.parity.keys() <= {"torch-bfloat16"}  # PyTorch is always installed


def test_tiling_is_part_of_the_encoder(model_file: Path, tmp_path: Path) -> None:
    default, whole, windowed = (
        export_encoder(model_file, model="custom", output=tmp_path / f"{tiling}.encoder", onnx=False, tiling=tiling)
        for tiling in TILINGS
    )
    assert default.whole_scan == whole.whole_scan == small_network().whole_scan
    assert windowed.whole_scan is None
    assert default.encoder_id == whole.encoder_id != windowed.encoder_id


def test_network_that_needs_windows_cannot_compute_a_whole_scan(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResidualUNet, "whole_scan", None)
    bundle = export_encoder(model_file, model="custom", output=tmp_path / "a.encoder", onnx=False)
    assert bundle.whole_scan is None
    with refused(UsageError, "small", "one pass"):
        export_encoder(model_file, model="custom", output=tmp_path / "b.encoder", onnx=False, tiling="whole")
    assert not (tmp_path / "b.encoder").exists()


def test_existing_output_is_refused_and_kept(model_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.encoder"
    output.mkdir()
    (output / "existing").touch()
    with refused(UsageError, output):
        export_encoder(model_file, model="custom", output=output)
    assert [path.name for path in output.iterdir()] == ["existing"]


def test_interrupted_export_leaves_nothing(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fseft_edge.runtime.encoder.bundle.sha256_of_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_encoder(model_file, model="custom", output=tmp_path / "s.encoder", onnx=False)
    assert [path.name for path in tmp_path.iterdir()] == [model_file.name]


def test_parity_volumes_without_a_graph_are_refused(model_file: Path, tmp_path: Path) -> None:
    with refused(UsageError, "--parity-ct", "--no-onnx"):
        export_encoder(
            model_file, model="custom", output=tmp_path / "s", onnx=False, parity_volumes=[tmp_path / "ct.nii.gz"]
        )


def test_checkpoint_of_another_network_is_refused_with_its_keys(tmp_path: Path) -> None:
    weights = {
        "encoder.first.weight": torch.zeros(2),
        "classifier.weight": torch.zeros(29, 48, 1, 1, 1),
        "classifier.bias": torch.zeros(29),
    }
    torch.save(weights, tmp_path / "other.pth")
    with refused(CheckpointError, tmp_path / "other.pth", "encoder.first.weight"):
        export_encoder(tmp_path / "other.pth", model="fseft", output=tmp_path / "s.encoder")
    assert not (tmp_path / "s.encoder").exists()


def test_classifier_of_another_width_is_refused(tmp_path: Path) -> None:
    write_model_file(tmp_path / "m.safetensors", replace(small_model(), head_weight=torch.zeros(2, 9)))
    with refused(CheckpointError, tmp_path / "m.safetensors", [2, 9], [2, 4]):
        export_encoder(tmp_path / "m.safetensors", model="custom", output=tmp_path / "s.encoder")
