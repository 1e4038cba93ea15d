"""Calls of ONNX Runtime: PyTorch's tensors are its buffers, on a CPU and, with the same calls, on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from doubles.errors import refused
from doubles.models import small_graph_bytes, windows

from fseft_edge.runtime.encoder.backends import onnxruntime as backend
from fseft_edge.runtime.encoder.backends.onnxruntime import GraphRunner, import_onnxruntime
from fseft_edge.runtime.errors import MissingBackendError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "graph.onnx"
    path.write_bytes(small_graph_bytes())
    return path


@pytest.mark.parametrize("count", [1, 3])
def test_bound_tensors_contain_the_results_of_onnxruntimes_plain_call(graph: Path, count: int) -> None:
    session = import_onnxruntime().InferenceSession(graph, providers=["CPUExecutionProvider"])
    given = windows(count)
    expected = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    found = GraphRunner(graph, CPU, 1)(given)
    assert len(found) == len(expected)
    for level, reference in zip(found, expected, strict=True):
        assert level.dtype == torch.float32
        np.testing.assert_allclose(level.numpy(), reference, rtol=1e-5, atol=1e-6)


def test_features_stay_valid_after_the_next_window_and_without_the_runner(graph: Path) -> None:
    runner = GraphRunner(graph, CPU, 1)
    first = runner(windows(1))
    kept = [level.clone() for level in first]
    second = runner(1 - windows(1))
    del runner
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_windows_may_have_any_memory_order(graph: Path) -> None:
    runner = GraphRunner(graph, CPU, 1)
    given = windows(2)
    turned = given.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    assert not turned.is_contiguous()
    for a, b in zip(runner(given), runner(turned), strict=True):
        assert torch.equal(a, b)


class Stream:
    """A stream of a simulated GPU."""

    cuda_stream = 4711

    def __init__(self, device: torch.device) -> None:
        self.waited_for: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited_for.append(other)


def test_on_a_gpu_the_graph_computes_on_a_separate_stream_without_tf32(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[Any] = []
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def session(path: Path, options: object, providers: list[Any]) -> SimpleNamespace:
        requested.extend(providers)
        return SimpleNamespace(
            get_providers=lambda: names,
            get_inputs=lambda: [SimpleNamespace(name="windows", shape=["n"])],
            get_outputs=list,
        )

    real = import_onnxruntime()
    library = SimpleNamespace(
        SessionOptions=real.SessionOptions,
        RunOptions=real.RunOptions,
        InferenceSession=session,
        get_available_providers=lambda: names,
    )
    monkeypatch.setattr(backend, "import_onnxruntime", lambda: library)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    GraphRunner(graph, torch.device("cuda", 1), 1)
    ((provider, settings),) = requested
    assert provider == "CUDAExecutionProvider"
    assert settings.items() >= {"device_id": 1, "use_tf32": 0, "user_compute_stream": "4711"}.items()
    # Without the CUDA libraries, ONNX Runtime uses the CPU instead of the GPU.
    names.remove("CUDAExecutionProvider")
    library.get_available_providers = lambda: ["CUDAExecutionProvider"]
    with refused(MissingBackendError, "ONNX Runtime"):
        GraphRunner(graph, torch.device("cuda", 1), 1)
