"""What several tests of the export share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doubles.models import WINDOW, small_network

from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.runtime.encoder.networks.swin_unetr import SwinUnetrFeatures


@pytest.fixture(scope="session")
def small_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network as an ONNX file; exporting takes seconds."""
    path = tmp_path_factory.mktemp("graph") / "encoder.onnx"
    write_graph(small_network(), WINDOW, path)
    return path


@pytest.fixture(scope="session")
def small_mixed_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network as an ONNX file in mixed precision."""
    path = tmp_path_factory.mktemp("graph") / "encoder.mixed.onnx"
    write_graph(small_network(), WINDOW, path, "mixed")
    return path


SWIN_WINDOW = (64, 32, 32)


@pytest.fixture(scope="session")
def shallow_swin() -> SwinUnetrFeatures:
    """SwinUNETR-48 with a plain and a shifted block in its first stage and none in the others: all its operators."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = SwinUnetrFeatures(48).eval()
    for stage in range(2, 5):
        network.get_submodule(f"swinViT.layers{stage}.0").blocks = torch.nn.ModuleList()
    return network


@pytest.fixture(scope="session")
def swin_mixed_graph(shallow_swin: SwinUnetrFeatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It as an ONNX file in mixed precision for windows of 64x32x32; exporting takes most of a minute."""
    path = tmp_path_factory.mktemp("swin") / "encoder.mixed.onnx"
    write_graph(shallow_swin, SWIN_WINDOW, path, "mixed")
    return path
