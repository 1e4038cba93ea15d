"""Engines: really built by TensorRT-RTX, which needs no GPU to build, and never trusted when they do not fit."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from doubles.models import CHANNELS, WINDOW, small_contents

from fseft_edge.export import export
from fseft_edge.export.engines import build_engines, compile_graph, prepare_build
from fseft_edge.export.export import export_encoder
from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.runtime.backends.tensorrt import check_validity
from fseft_edge.runtime.backends.tensorrt_library import collecting_logger, import_library
from fseft_edge.runtime.bundle import EncoderBundle
from fseft_edge.runtime.engine_files import EngineDescription, engine_for_gpu, read_engine
from fseft_edge.runtime.errors import (
    EncoderBundleError,
    EngineError,
    MissingBackendError,
    OutOfSpaceError,
    UsageError,
)
from fseft_edge.runtime.networks.swin_unetr import SwinUnetrFeatures

TARGETS = ["sm_75", "sm_86", "sm_89", "sm_120", "portable"]


@pytest.fixture(scope="module")
def rtx() -> ModuleType:
    return import_library("tensorrt_rtx")


@pytest.fixture(scope="module")
def built(small_graph: Path, small_mixed_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    """A bundle with an engine for every target."""
    path = tmp_path_factory.mktemp("built") / "small.encoder"
    bundle = EncoderBundle.write(path, small_contents(graph=small_graph, mixed_graph=small_mixed_graph))
    build_engines(bundle, TARGETS, max_batch=3)
    return bundle


@pytest.fixture
def bundle(built: EncoderBundle, tmp_path: Path) -> EncoderBundle:
    """A copy, as people copy bundles."""
    shutil.copytree(built.path, tmp_path / "copy.encoder")
    return EncoderBundle.open(tmp_path / "copy.encoder")


def engine(bundle: EncoderBundle, target: str = "sm_86", suffix: str = "engine") -> Path:
    return bundle.path / "engines" / f"tensorrt_rtx-mixed-{target}.{suffix}"


def version() -> str:
    return str(import_library("tensorrt_rtx").__version__)


def read(bundle: EncoderBundle, target: str = "sm_86") -> Path:
    return read_engine(bundle, "tensorrt_rtx", version(), "mixed", target).path


def test_engines_lie_beside_the_bundle_and_not_in_its_manifest(built: EncoderBundle) -> None:
    names = {f"tensorrt_rtx-mixed-{target}.{kind}" for target in TARGETS for kind in ("engine", "json")}
    assert {path.name for path in (built.path / "engines").iterdir()} == names
    assert not any("engine" in name for name in EncoderBundle.open(built.path).manifest.files)


@pytest.mark.parametrize("target", TARGETS)
def test_engine_says_what_it_takes_and_gives(built: EncoderBundle, target: str) -> None:
    described = EngineDescription.model_validate_json(engine(built, target, "json").read_bytes())
    assert (described.library, described.target, described.precision) == ("tensorrt_rtx", target, "mixed")
    assert described.version == version()
    assert described.max_batch == 3
    assert described.graph_sha256 == built.manifest.files["encoder.mixed.onnx"]
    assert [tensor.name for tensor in described.tensors] == ["windows", "level_0", "level_1"]
    assert {tensor.number_format for tensor in described.tensors} == {"float32"}
    assert [tensor.shape for tensor in described.tensors] == [
        (-1, 1, *WINDOW),
        (-1, CHANNELS[0], *WINDOW),
        (-1, CHANNELS[1], *(side // 2 for side in WINDOW)),
    ]
    content = engine(built, target).read_bytes()
    assert all(tensor.name.encode() in content for tensor in described.tensors)


def test_engines_of_different_gpus_differ(built: EncoderBundle) -> None:
    assert len({engine(built, target).read_bytes() for target in TARGETS}) == len(TARGETS)


@pytest.mark.parametrize(
    ("target", "capabilities"), [("sm_75", ["SM75"]), ("sm_120", ["SM120"]), ("portable", [])]
)
def test_build_is_strongly_typed_exact_and_takes_any_batch(
    rtx: ModuleType, small_mixed_graph: Path, target: str, capabilities: list[str]
) -> None:
    build = prepare_build(rtx, small_mixed_graph, target, max_batch=5)
    assert build.network.get_flag(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert not build.config.get_flag(rtx.BuilderFlag.TF32)
    assert [tuple(shape) for shape in build.profile.get_shape("windows")] == [(n, 1, *WINDOW) for n in (1, 5, 5)]
    assert build.config.num_optimization_profiles == 1
    chosen = [build.config.get_compute_capability(index).name for index in range(build.config.num_compute_capabilities)]
    assert chosen == capabilities
    layers = [build.network.get_layer(index) for index in range(build.network.num_layers)]
    convolutions = [layer for layer in layers if layer.type == rtx.LayerType.CONVOLUTION]
    assert convolutions
    assert {layer.get_input(0).dtype for layer in convolutions} == {rtx.float16}


def test_engine_of_the_float32_graph_computes_in_float32(rtx: ModuleType, small_graph: Path) -> None:
    build = prepare_build(rtx, small_graph, "sm_86", max_batch=2)
    layers = [build.network.get_layer(index) for index in range(build.network.num_layers)]
    assert {layer.get_output(0).dtype for layer in layers} == {rtx.float32}
    assert compile_graph(rtx, small_graph, "sm_86", 2)[0]


def test_swin_unetr_builds(rtx: ModuleType, tmp_path: Path) -> None:
    network = SwinUnetrFeatures(12).eval()
    for stage in range(2, 5):  # a plain and a shifted block, every operator in half the time
        network.get_submodule(f"swinViT.layers{stage}.0").blocks = torch.nn.ModuleList()
    write_graph(network, (64, 32, 32), tmp_path / "swin.onnx", "mixed")
    build = prepare_build(rtx, tmp_path / "swin.onnx", "portable", 2)
    layers = [build.network.get_layer(index) for index in range(build.network.num_layers)]
    kinds = {kind: {layer.get_input(0).dtype for layer in layers if layer.type == kind} for kind in
             (rtx.LayerType.SOFTMAX, rtx.LayerType.NORMALIZATION, rtx.LayerType.REDUCE)}
    assert kinds[rtx.LayerType.SOFTMAX] == {rtx.float32}
    assert kinds[rtx.LayerType.REDUCE] == {rtx.float32}
    print(kinds)
    for target in ("sm_75", "portable"):
        content, tensors = compile_graph(rtx, tmp_path / "swin.onnx", target, 2)
        assert len(content) > 1e6
        assert [tensor.name for tensor in tensors] == ["windows", *(f"level_{level}" for level in range(5))]
