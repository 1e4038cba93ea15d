"""What several tests of the export share."""

from __future__ import annotations

from pathlib import Path

import pytest
from doubles.models import WINDOW, small_network

from fseft_edge.export.onnx_graph import write_graph


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
