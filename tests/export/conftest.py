"""Fixtures for the tests of the export: small networks and their ONNX graphs. Exporting a graph takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doubles.models import small_graph_bytes
from doubles.releases import FEATURE_SIZE
from torch import nn

from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.runtime.encoder.networks.inserts import add_inserts, insert_parameters
from fseft_edge.runtime.encoder.networks.swin_unetr import SwinUnetrFeatures


@pytest.fixture(scope="session")
def small_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network as an ONNX file in float32."""
    path = tmp_path_factory.mktemp("graph") / "encoder.onnx"
    path.write_bytes(small_graph_bytes())
    return path


@pytest.fixture(scope="session")
def small_mixed_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network as an ONNX file in mixed precision."""
    path = tmp_path_factory.mktemp("graph") / "encoder.mixed.onnx"
    path.write_bytes(small_graph_bytes("mixed"))
    return path


@pytest.fixture(scope="session")
def small_whole_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network as an ONNX file in float32 that accepts windows of any size."""
    path = tmp_path_factory.mktemp("graph") / "encoder.onnx"
    path.write_bytes(small_graph_bytes(whole_scan=True))
    return path


@pytest.fixture(scope="session")
def small_whole_mixed_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network as an ONNX file in mixed precision that accepts windows of any size."""
    path = tmp_path_factory.mktemp("graph") / "encoder.mixed.onnx"
    path.write_bytes(small_graph_bytes("mixed", whole_scan=True))
    return path


SWIN_WINDOW = (64, 32, 32)


@pytest.fixture(scope="session")
def shallow_swin() -> SwinUnetrFeatures:
    """SwinUNETR with all its operators in few nodes, because the time of an export depends on the number of nodes.

    The first stage has one plain and one shifted block, the other stages have none. Residual blocks are only in
    encoder1 and decoder1.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = SwinUnetrFeatures(FEATURE_SIZE).eval()
    for stage in range(2, 5):
        network.get_submodule(f"swinViT.layers{stage}.0").blocks = nn.ModuleList()
    for name in ("encoder2", "encoder3", "encoder4", "encoder10"):
        network.set_submodule(name, nn.Identity())
    for level in range(2, 6):
        first = network.get_submodule(f"decoder{level}.conv_block.conv1.conv")
        assert isinstance(first, nn.Conv3d)
        network.set_submodule(f"decoder{level}.conv_block", nn.Conv3d(first.in_channels, first.out_channels, 1))
    return network


@pytest.fixture(scope="session")
def swin_mixed_graph(shallow_swin: SwinUnetrFeatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shallow SwinUNETR as an ONNX file in mixed precision."""
    path = tmp_path_factory.mktemp("swin") / "encoder.mixed.onnx"
    write_graph(shallow_swin, SWIN_WINDOW, path, "mixed")
    return path


@pytest.fixture(scope="session")
def compacter_swin(shallow_swin: SwinUnetrFeatures) -> SwinUnetrFeatures:
    """The shallow SwinUNETR with a Compacter that changes the features."""
    network = SwinUnetrFeatures(FEATURE_SIZE).eval()
    for name, module in shallow_swin.named_children():
        network.set_submodule(name, module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        add_inserts(network, "compacter")
        parameters = dict(network.named_parameters())
        for name in insert_parameters(network):
            parameters[name].data += 0.1 * torch.randn_like(parameters[name])
    return network


@pytest.fixture(scope="session")
def compacter_swin_graph(compacter_swin: SwinUnetrFeatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shallow SwinUNETR with a Compacter as an ONNX file in float32."""
    path = tmp_path_factory.mktemp("swin") / "encoder.onnx"
    write_graph(compacter_swin, SWIN_WINDOW, path)
    return path
