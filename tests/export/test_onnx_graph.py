"""Exported ONNX graph of the compact encoder: equality with PyTorch, size, metadata, reproducible bytes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from doubles.models import WINDOW, small_network, windows
from doubles.repository import ROOT
from torch import Tensor, nn

from fseft_edge.export.onnx_graph import graph_of, write_graph
from fseft_edge.runtime.encoder.backends.onnxruntime import GraphRunner
from fseft_edge.runtime.encoder.backends.openvino import CompiledGraph
from fseft_edge.runtime.encoder.networks.base import FeatureLevel, FeatureNetwork


@pytest.mark.parametrize("count", [1, 2, 5])
def test_graph_equals_pytorch_for_any_number_of_windows(small_graph: Path, count: int) -> None:
    features = GraphRunner(small_graph, torch.device("cpu"), 1)(windows(count))
    with torch.no_grad():
        expected = small_network()(windows(count))
    assert len(features) == len(expected)
    for a, b in zip(expected, features, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


def test_same_network_gives_the_same_bytes_and_is_not_changed(small_graph: Path, tmp_path: Path) -> None:
    network = small_network()
    write_graph(network, WINDOW, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == small_graph.read_bytes()
    before = small_network().state_dict()
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_graph_is_valid_and_folded(small_graph: Path) -> None:
    model = onnx.load(small_graph)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    operators = {node.op_type for node in model.graph.node}
    assert operators == {"Conv", "ConvTranspose", "Relu", "Add", "Concat"}
    names = [output.name for output in model.graph.output]
    assert names == ["level_0", "level_1"]


SIZES = [WINDOW, (23, 16, 33), (1, 7, 4)]


@pytest.mark.parametrize("size", SIZES)
def test_graph_of_a_whole_scan_encoder_equals_pytorch_for_any_size(
    small_whole_graph: Path, small_whole_mixed_graph: Path, size: tuple[int, int, int]
) -> None:
    given = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = small_network().in_air()(given)
    cpu = torch.device("cpu")
    for run, bound in (
        (GraphRunner(small_whole_graph, cpu, 1), 1e-5),
        (GraphRunner(small_whole_mixed_graph, cpu, 1), 4 * 2**-10),
        (CompiledGraph(small_whole_graph, 1, "float32"), 1e-5),
    ):
        for a, b in zip(expected, run(given), strict=True):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) <= bound * float(a.abs().max())


def test_one_loaded_graph_computes_windows_of_changing_size(small_whole_graph: Path) -> None:
    for run in (GraphRunner(small_whole_graph, torch.device("cpu"), 1), CompiledGraph(small_whole_graph, 1, "float32")):
        for size in (*SIZES, *SIZES):
            assert [tuple(level.shape[2:]) for level in run(torch.zeros(1, 1, *size))] == [
                size,
                tuple(-(-side // 2) for side in size),
            ]


def test_graph_of_a_whole_scan_encoder_is_valid_and_names_its_sizes(small_whole_graph: Path) -> None:
    model = onnx.load(small_whole_graph)
    onnx.checker.check_model(model, full_check=True)
    operators = {node.op_type for node in model.graph.node}
    convolutions = {"Conv", "ConvTranspose", "Max", "Add", "Sub", "Concat"}
    assert operators == {*convolutions, "Shape", "Slice", "Div", "Tile"}
    sizes = [
        [size.dim_param or size.dim_value for size in tensor.type.tensor_type.shape.dim]
        for tensor in (*model.graph.input, *model.graph.output)
    ]
    assert sizes == [
        ["n", 1, "x", "y", "z"],
        ["n", 4, "x", "y", "z"],
        ["n", 6, "ceil(x/2)", "ceil(y/2)", "ceil(z/2)"],
    ]


def test_a_network_with_operators_that_depend_on_the_window_has_no_graph_of_any_size() -> None:
    with pytest.raises(ValueError, match="ReduceMean"):
        graph_of(NormOnly().eval(), WINDOW, ["level_0"], whole_scan=small_network().whole_scan)


HALF, FULL = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def test_mixed_graph_has_float32_inputs_and_outputs_and_half_the_bytes(
    small_graph: Path, small_mixed_graph: Path
) -> None:
    model = onnx.load(small_mixed_graph)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.name for entry in model.graph.input] == ["windows"]
    assert [entry.name for entry in model.graph.output] == ["level_0", "level_1"]
    ends = [*model.graph.input, *model.graph.output]
    assert {entry.type.tensor_type.elem_type for entry in ends} == {FULL}
    assert {entry.data_type for entry in model.graph.initializer} == {HALF}
    sizes = {
        path: sum(len(e.raw_data) for e in onnx.load(path).graph.initializer)
        for path in (small_graph, small_mixed_graph)
    }
    assert sizes[small_mixed_graph] * 2 == sizes[small_graph]


@pytest.mark.parametrize("count", [1, 3])
def test_mixed_graph_is_close_to_pytorch_for_any_number_of_windows(small_mixed_graph: Path, count: int) -> None:
    features = GraphRunner(small_mixed_graph, torch.device("cpu"), 1)(windows(count))
    with torch.no_grad():
        expected = small_network()(windows(count))
    for a, b in zip(expected, features, strict=True):
        error = float((a - b).abs().max() / a.abs().max())
        assert 2**-13 < error < 4 * 2**-10  # between one and a few rounding errors of an 11-bit mantissa


def test_same_network_gives_the_same_mixed_bytes(small_mixed_graph: Path, tmp_path: Path) -> None:
    network = small_network()
    write_graph(network, WINDOW, tmp_path / "again.onnx", "mixed")
    assert (tmp_path / "again.onnx").read_bytes() == small_mixed_graph.read_bytes()
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("graph", ["small_graph", "small_mixed_graph"])
def test_graph_contains_no_paths_of_the_exporting_machine(graph: str, request: pytest.FixtureRequest) -> None:
    content = request.getfixturevalue(graph).read_bytes()
    assert b"site-packages" not in content
    assert str(Path(torch.__file__).parents[2]).encode() not in content
    assert str(ROOT).encode() not in content


class NormOnly(FeatureNetwork):
    """A network that consists of one instance normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = (FeatureLevel(1, 1),)
        self.norm = nn.InstanceNorm3d(1)

    def forward(self, windows: Tensor) -> list[Tensor]:
        return [self.norm(windows)]


def test_instance_normalisation_is_exact_in_a_window_with_large_constant_regions(tmp_path: Path) -> None:
    window = torch.rand(1, 1, 96, 96, 96, generator=torch.Generator().manual_seed(0))
    window[..., 40:] = 0.3
    network = NormOnly().eval()
    path = tmp_path / "norm.onnx"
    write_graph(network, (96, 96, 96), path)
    expected = nn.functional.instance_norm(window.double())
    for run in (GraphRunner(path, torch.device("cpu"), 1), CompiledGraph(path, 1, "float32")):
        (features,) = run(window)
        assert float((features - expected).abs().max()) <= 1e-6 * float(expected.abs().max()), run
    assert isinstance(network.norm, nn.InstanceNorm3d)


def test_instance_normalisation_of_a_mixed_graph_computes_in_float32(tmp_path: Path) -> None:
    """The squares and sums over a window of this size are far beyond the largest float16, 65504."""
    window = 100 * torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    write_graph(NormOnly().eval(), (32, 32, 32), tmp_path / "norm.onnx", "mixed")
    (features,) = GraphRunner(tmp_path / "norm.onnx", torch.device("cpu"), 1)(window)
    expected = nn.functional.instance_norm(window.half().double())
    assert float((features - expected).abs().max()) <= 2**-10 * float(expected.abs().max())
    kinds = arithmetic_types(tmp_path / "norm.onnx")
    assert kinds["ReduceMean"] == {FULL}
    assert kinds["Mul"] == {FULL}


def arithmetic_types(path: Path) -> dict[str, set[int]]:
    """Return the number formats of the first input of each operator type in a graph."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {entry.name: entry.type.tensor_type.elem_type for entry in (*graph.value_info, *graph.input)}
    types |= {entry.name: entry.data_type for entry in graph.initializer}
    kinds: dict[str, set[int]] = {}
    for node in graph.node:
        if node.input and node.input[0] in types:
            kinds.setdefault(node.op_type, set()).add(types[node.input[0]])
    return kinds
