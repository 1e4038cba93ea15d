"""Encoders with inserts: comparison of all engines with PyTorch, bundles, and model files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from doubles.encoder import scan
from doubles.inserts import SETTINGS, network_with
from doubles.models import small_contents, small_model
from torch import Tensor, nn

from fseft_edge.export.checkpoints import write_model_file
from fseft_edge.export.export import export_encoder
from fseft_edge.export.onnx_graph import graph_of, write_graph, write_model
from fseft_edge.export.parity import GATES, relative_errors
from fseft_edge.runtime.encoder.backends.onnxruntime import GraphRunner
from fseft_edge.runtime.encoder.backends.openvino import CompiledGraph
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.block_inserts import AdaptFormer, BlockInserts, BlockPlace, Compacter
from fseft_edge.runtime.encoder.networks.inserts import insert_parameters
from fseft_edge.runtime.encoder.networks.swin_unetr import SwinUnetrFeatures
from fseft_edge.runtime.encoder.session import open_session

WINDOW = (16, 12, 20)
SWIN_WINDOW = (64, 32, 32)
SETTINGS_WITH = {**SETTINGS["residual_unet"], "inserts": "med-adapter"}


def windows(size: tuple[int, int, int], count: int = 2) -> Tensor:
    return torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(4))


def worst_errors(graph: Path, network: nn.Module, size: tuple[int, int, int]) -> dict[str, float]:
    """Return the largest difference of each engine from PyTorch, relative to the largest feature of the level."""
    with torch.no_grad():
        expected = network(windows(size))
    first = [level[:1] for level in expected]
    return {
        "onnxruntime": max(relative_errors(expected, GraphRunner(graph, torch.device("cpu"), 1)(windows(size)))),
        "openvino": max(relative_errors(first, CompiledGraph(graph, 1, "float32")(windows(size, 1)))),
    }


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return network_with("residual_unet", "med-adapter", trained=True)


@pytest.fixture(scope="module")
def bundle(network: FeatureNetwork, tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    folder = tmp_path_factory.mktemp("inserts")
    write_graph(network, WINDOW, folder / "encoder.onnx")
    contents = small_contents(network=network, settings=SETTINGS_WITH, window=WINDOW, graph=folder / "encoder.onnx")
    return EncoderBundle.write(folder / "tuned.encoder", contents)


def test_engines_compute_med_adapters(network: FeatureNetwork, bundle: EncoderBundle) -> None:
    assert bundle.graph is not None
    assert max(worst_errors(bundle.graph, network, WINDOW).values()) <= GATES["float32"]
    operators = {node.op_type for node in onnx.load(bundle.graph).graph.node}
    # The Fourier transform is computed as matrix products, and its matrices are constants in the graph.
    assert operators == {"Conv", "ConvTranspose", "Relu", "Gelu", "Add", "Concat", "MatMul", "Mul", "Transpose"}


def test_mixed_graph_with_med_adapters_is_close_to_pytorch(network: FeatureNetwork, tmp_path: Path) -> None:
    write_graph(network, WINDOW, tmp_path / "mixed.onnx", "mixed")
    with torch.no_grad():
        expected = network(windows(WINDOW))
    features = GraphRunner(tmp_path / "mixed.onnx", torch.device("cpu"), 1)(windows(WINDOW))
    assert 2**-13 < max(relative_errors(expected, features)) <= GATES["mixed"]


def test_engines_compute_a_transformer_with_inserts(
    compacter_swin: SwinUnetrFeatures, compacter_swin_graph: Path
) -> None:
    assert max(worst_errors(compacter_swin_graph, compacter_swin, SWIN_WINDOW).values()) <= GATES["float32"]


class _Blocks(nn.Module):
    """Inserts of one block without the rest of a network. The axis Z of the input is used as the channels."""

    def __init__(self, kind: type[BlockInserts]) -> None:
        super().__init__()
        self.inserts = kind({BlockPlace(0, 0): 12})
        for parameter in self.inserts.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> list[Tensor]:
        insert = self.inserts.at(BlockPlace(0, 0))
        return [insert.attention_output(x), insert.mlp_output(x, torch.relu(x))]


@pytest.mark.parametrize("kind", [AdaptFormer, Compacter])
def test_engines_compute_inserts_of_blocks(kind: type[BlockInserts], tmp_path: Path) -> None:
    network, size = _Blocks(kind).eval(), (3, 5, 12)
    write_model(graph_of(network, size, ["attention", "mlp"]), tmp_path / "blocks.onnx")
    assert max(worst_errors(tmp_path / "blocks.onnx", network, size).values()) <= GATES["float32"]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_a_bundle_with_inserts_encodes_a_scan(
    network: FeatureNetwork, bundle: EncoderBundle, backend: str, tmp_path: Path
) -> None:
    opened = EncoderBundle.open(bundle.path)
    assert opened.manifest.settings["inserts"] == "med-adapter"
    with open_session(opened, device="cpu", backend=backend, precision="float32") as session:
        features = session.encode(windows(WINDOW))
        with torch.no_grad():
            assert max(relative_errors(network(windows(WINDOW)), features)) <= 1e-5
        encoded = encode_scan(scan(1).volume, bundle=opened, session=session, store=FeatureStore(tmp_path / "store"))
    block = encoded.features.read(0, (20, 40), (16, 32), (20, 24))
    assert block.shape == (4, 20, 16, 4)
    assert block.isfinite().all()
    assert block.std() > 0


def test_a_model_file_with_inserts_is_exported(network: FeatureNetwork, tmp_path: Path) -> None:
    model = small_model()
    description = model.description.model_copy(update={"settings": SETTINGS_WITH})
    write_model_file(tmp_path / "m.safetensors", replace(model, description=description, encoder=network.state_dict()))
    exported = export_encoder(tmp_path / "m.safetensors", model="custom", output=tmp_path / "m.encoder", onnx=False)
    assert insert_parameters(exported.network()) == insert_parameters(network)


def test_inserts_change_the_encoder_id(tmp_path: Path) -> None:
    """The constant is the id of this encoder from a version without inserts; adapter files contain encoder ids."""
    ids = {}
    for kind in (None, "med-adapter"):
        plain = network_with("residual_unet", kind)
        with torch.no_grad():
            for name, values in plain.state_dict().items():
                values.fill_(1 if "num_batches" in name else 0.5)
        settings = SETTINGS["residual_unet"] if kind is None else SETTINGS_WITH
        contents = small_contents(network=plain, settings=settings)
        EncoderBundle.write(tmp_path / str(kind), contents)
        opened = EncoderBundle.open(tmp_path / str(kind))
        ids[kind] = opened.encoder_id
        assert bool(insert_parameters(opened.network())) == (kind is not None)
    assert ids[None] == "83812b47be78a34393bde7b3214aeadedf0752b1631e9b0e14ae295d9a0aa6a9"
    assert ids["med-adapter"] != ids[None]
