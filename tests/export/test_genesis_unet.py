"""The U-Net of Models Genesis: comparison of its graphs, in float32 and in mixed precision, with PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from doubles.releases import WIDTH, authors_unet
from torch import Tensor

from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.runtime.encoder.backends.onnxruntime import GraphRunner
from fseft_edge.runtime.encoder.backends.openvino import CompiledGraph
from fseft_edge.runtime.encoder.networks import genesis_unet
from fseft_edge.runtime.encoder.networks.genesis_unet import GenesisUnetFeatures
from fseft_edge.runtime.encoder.networks.mixed_precision import MixedPrecision

WINDOW = (32, 16, 16)


def built() -> GenesisUnetFeatures:
    network = GenesisUnetFeatures(WIDTH).eval()
    weights = authors_unet(1).state()
    network.load_state_dict({key: weights[key] for key in network.state_dict()})
    return network


def windows() -> Tensor:
    """Return two windows, the second far darker, so that shared statistics would change the features of both."""
    drawn = torch.rand(2, 1, *WINDOW, generator=torch.Generator().manual_seed(0))
    drawn[1] *= 0.1
    return drawn


@dataclass(frozen=True)
class Exported:
    """Graphs of a network, and PyTorch's features of each window."""

    float32: Path
    mixed: Path
    expected: list[Tensor]

    def errors(self, features: list[Tensor]) -> list[float]:
        """Return the largest difference from PyTorch for each level, relative to the largest feature."""
        return [float((a - b).abs().max() / a.abs().max()) for a, b in zip(self.expected, features, strict=True)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The U-Net with the two finest of its four levels: all operators in fewer nodes, so that the export is faster."""
    folder = tmp_path_factory.mktemp("genesis")
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(genesis_unet, "_LEVELS", genesis_unet._LEVELS[:2])
        network = built()
        write_graph(network, WINDOW, folder / "float32.onnx")
        write_graph(network, WINDOW, folder / "mixed.onnx", "mixed")
        expected = [torch.cat(level) for level in zip(*(network(w[None]) for w in windows()), strict=True)]
    return Exported(folder / "float32.onnx", folder / "mixed.onnx", expected)


def test_graph_equals_pytorch_window_by_window(exported: Exported) -> None:
    assert max(exported.errors(GraphRunner(exported.float32, torch.device("cpu"), 1)(windows()))) <= 1e-5
    run = CompiledGraph(exported.float32, 1, "float32")
    features = [torch.cat(level) for level in zip(*(run(w[None]) for w in windows()), strict=True)]
    assert max(exported.errors(features)) <= 1e-5


def test_graph_is_valid_and_contains_no_normalisation_operators(exported: Exported) -> None:
    model = onnx.load(exported.float32)
    onnx.checker.check_model(model, full_check=True)
    operators = {node.op_type for node in model.graph.node}
    assert "InstanceNormalization" not in operators
    assert "BatchNormalization" not in operators


def test_mixed_graph_is_close_to_pytorch(exported: Exported) -> None:
    found = exported.errors(GraphRunner(exported.mixed, torch.device("cpu"), 1)(windows()))
    assert all(2**-13 < error < 5e-3 for error in found), found


def test_levels_have_the_declared_strides_and_channels() -> None:
    network = built()
    assert [level.stride for level in network.levels] == [1, 2, 4, 8]
    with torch.no_grad():
        pyramid = network(windows())
    for features, level in zip(pyramid, network.levels, strict=True):
        assert features.shape[1:] == (level.channels, *(side // level.stride for side in WINDOW))


def test_normalisations_stay_float32_in_mixed_precision() -> None:
    kinds = {name: parameter.dtype for name, parameter in MixedPrecision(built()).named_parameters()}
    norms = {name for name in kinds if ".bn1." in name}
    assert len(norms) == 28
    assert {kinds[name] for name in norms} == {torch.float32}
    assert {kinds[name] for name in kinds.keys() - norms} == {torch.float16}
