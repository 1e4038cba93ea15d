"""The U-Net of Models Genesis: its graph, in float32 and in mixed precision, is the network."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from doubles.releases import WIDTH, authors_unet
from torch import Tensor

from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.runtime.encoder.backends.onnxruntime import GraphRunner
from fseft_edge.runtime.encoder.backends.openvino import CompiledGraph
from fseft_edge.runtime.encoder.networks.genesis_unet import GenesisUnetFeatures
from fseft_edge.runtime.encoder.networks.mixed_precision import MixedPrecision

WINDOW = (32, 16, 16)


@pytest.fixture(scope="module")
def network() -> GenesisUnetFeatures:
    built = GenesisUnetFeatures(WIDTH).eval()
    weights = authors_unet(1).state()
    built.load_state_dict({key: weights[key] for key in built.state_dict()})
    return built


@pytest.fixture(scope="module")
def graphs(network: GenesisUnetFeatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genesis")
    write_graph(network, WINDOW, folder / "float32.onnx")
    write_graph(network, WINDOW, folder / "mixed.onnx", "mixed")
    return folder


def windows() -> Tensor:
    """Two windows, the second far darker: what one takes its statistics from must not reach the other."""
    drawn = torch.rand(2, 1, *WINDOW, generator=torch.Generator().manual_seed(0))
    drawn[1] *= 0.1
    return drawn


def errors(network: GenesisUnetFeatures, features: list[Tensor]) -> list[float]:
    with torch.no_grad():
        expected = [torch.cat(level) for level in zip(*(network(w[None]) for w in windows()), strict=True)]
    return [float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, features, strict=True)]


def test_levels_are_what_they_say(network: GenesisUnetFeatures) -> None:
    with torch.no_grad():
        pyramid = network(windows())
    for features, level in zip(pyramid, network.levels, strict=True):
        assert features.shape[1:] == (level.channels, *(side // level.stride for side in WINDOW))


def test_graph_equals_pytorch_window_by_window(network: GenesisUnetFeatures, graphs: Path) -> None:
    assert max(errors(network, GraphRunner(graphs / "float32.onnx", torch.device("cpu"), 1)(windows()))) <= 1e-5
    run = CompiledGraph(graphs / "float32.onnx", 1, "float32")
    features = [torch.cat(level) for level in zip(*(run(w[None]) for w in windows()), strict=True)]
    assert max(errors(network, features)) <= 1e-5


def test_graph_is_valid_and_writes_its_normalisation_out(graphs: Path) -> None:
    model = onnx.load(graphs / "float32.onnx")
    onnx.checker.check_model(model, full_check=True)
    operators = {node.op_type for node in model.graph.node}
    assert "InstanceNormalization" not in operators
    assert "BatchNormalization" not in operators


def test_mixed_graph_is_near_pytorch(network: GenesisUnetFeatures, graphs: Path) -> None:
    found = errors(network, GraphRunner(graphs / "mixed.onnx", torch.device("cpu"), 1)(windows()))
    # The bottleneck of so small a window normalises over 16 voxels, which magnifies rounding.
    assert all(2**-13 < error < 2e-2 for error in found)


def test_norms_stay_float32_in_mixed_precision(network: GenesisUnetFeatures) -> None:
    kinds = {name: parameter.dtype for name, parameter in MixedPrecision(network).named_parameters()}
    norms = {name for name in kinds if ".bn1." in name}
    assert len(norms) == 28
    assert {kinds[name] for name in norms} == {torch.float32}
    assert {kinds[name] for name in kinds.keys() - norms} == {torch.float16}
