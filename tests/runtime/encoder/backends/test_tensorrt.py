"""Calls of an engine: a simulated library computes on the CPU, in the buffers that it receives.

These tests check that the calls are consistent. tests/gpu checks the real libraries.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from doubles.errors import refused
from torch import Tensor

from fseft_edge.runtime.encoder.backends.tensorrt import EngineRunner
from fseft_edge.runtime.encoder.engine_files import EngineDescription, EngineFile, EngineTensor
from fseft_edge.runtime.errors import EngineError

SHAPES = {"level_1": (3, 2), "windows": (1, 4), "level_0": (2, 4)}
"""Shapes without the batch, in the order of the engine, which differs from the order of the graph."""


class Context:
    """Execution context that fills level l with the sum of the windows plus l."""

    def __init__(self, fails: bool) -> None:
        self.addresses: dict[str, int] = {}
        self.batch = 0
        self.fails = fails

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.batch = shape[0]
        return name == "windows" and shape[1:] == SHAPES[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.batch, *SHAPES[name])

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def values(self, name: str) -> ctypes.Array[ctypes.c_float]:
        size = self.batch * SHAPES[name][0] * SHAPES[name][1]
        return (ctypes.c_float * size).from_address(self.addresses[name])

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        total = sum(self.values("windows"))
        for level in (0, 1):
            values = self.values(f"level_{level}")
            values[:] = [total + level] * len(values)
        return not self.fails


class Library:
    """The part of TensorRT-RTX that the runner uses."""

    def __init__(self, *, fails: bool = False, names: tuple[str, ...] = tuple(SHAPES), kernels: bytes = b"new") -> None:
        self.cache = SimpleNamespace(
            loaded=None, serialize=lambda: kernels, deserialize=lambda blob: blob.startswith(b"good")
        )
        self.ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0})
        self.IRuntimeCache = object
        config = SimpleNamespace(create_runtime_cache=lambda: self.cache, set_runtime_cache=lambda cache: True)
        engine = SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=lambda index: names[index],
            create_runtime_config=lambda: config,
            create_execution_context=lambda config: Context(fails),
        )
        self.Runtime = lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda content: engine if content == b"engine" else None
        )


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineFile:
    """An engine on a machine whose CPU is used as a simulated GPU."""
    stream = SimpleNamespace(cuda_stream=7, wait_stream=lambda other: None)
    gpu = SimpleNamespace(
        device=lambda device: contextlib.nullcontext(),
        synchronize=lambda device: None,
        Stream=lambda device: stream,
        current_stream=lambda device: stream,
    )
    monkeypatch.setattr("fseft_edge.runtime.encoder.backends.tensorrt.torch.cuda", gpu)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    path = tmp_path / "x.engine"
    path.write_bytes(b"engine")
    order = ("windows", "level_0", "level_1")
    description = EngineDescription(
        library="tensorrt_rtx",
        version="1",
        target="sm_86",
        precision="mixed",
        graph_sha256="0",
        max_batch=2,
        tensors=tuple(EngineTensor(name=name, number_format="float32", shape=(-1, *SHAPES[name])) for name in order),
        engine_sha256=hashlib.sha256(b"engine").hexdigest(),
    )
    return EngineFile(path, description)


def runner(library: Library, engine: EngineFile) -> EngineRunner:
    return EngineRunner(library, engine, torch.device("cpu"))  # type: ignore[arg-type]  # the double replaces a module


@pytest.mark.parametrize("count", [1, 2])
def test_levels_are_returned_finest_first_for_windows_of_any_memory_order(engine: EngineFile, count: int) -> None:
    run = runner(Library(), engine)
    windows = torch.arange(4.0 * count).reshape(4, 1, count).permute(2, 1, 0)
    for _ in range(2):
        pyramid = run(windows)
        assert [tuple(level.shape) for level in pyramid] == [(count, 2, 4), (count, 3, 2)]
        assert all(bool((level == windows.sum() + index).all()) for index, level in enumerate(pyramid))


def test_an_engine_that_fails_is_an_error_with_a_remedy(engine: EngineFile) -> None:
    with refused(EngineError, engine.path):
        runner(Library(fails=True), engine)(torch.zeros(1, 1, 4))


def test_a_part_of_a_scan_that_is_too_large_for_the_engine_is_refused(engine: EngineFile) -> None:
    limited = EngineFile(engine.path, engine.description.model_copy(update={"largest": (8, 8, 16)}))
    with refused(EngineError, engine.path, "8 x 8 x 16", "8 x 9 x 16") as caught:
        runner(Library(), limited)(torch.zeros(1, 1, 8, 9, 16))
    assert "--backend torch" in caught.value.remedy


def test_an_engine_with_other_outputs_is_refused(engine: EngineFile) -> None:
    with refused(EngineError, engine.path, "windows, logits"):
        runner(Library(names=("windows", "logits")), engine)


def test_an_engine_that_the_library_cannot_read_is_refused(engine: EngineFile) -> None:
    engine.path.write_bytes(b"cut")
    with refused(EngineError, engine.path):
        runner(Library(), engine)


@pytest.mark.parametrize("before", [None, b"good", b"of another GPU"])
def test_compiled_kernels_are_stored_with_the_engine(engine: EngineFile, before: bytes | None) -> None:
    if before is not None:
        engine.runtime_cache.write_bytes(before)
    run = runner(Library(kernels=b"good, and more"), engine)
    run(torch.zeros(1, 1, 4))
    run.close()
    assert engine.runtime_cache.read_bytes() == b"good, and more"


def test_unchanged_kernels_are_not_written_again(engine: EngineFile) -> None:
    engine.runtime_cache.write_bytes(b"good")
    before = engine.runtime_cache.stat().st_mtime_ns
    runner(Library(kernels=b"good"), engine).close()
    assert engine.runtime_cache.stat().st_mtime_ns == before


def test_a_bundle_that_is_not_writable_is_not_an_error(engine: EngineFile, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner(Library(), engine)

    def read_only(path: Path, content: bytes) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_bytes", read_only)
    run.close()
    assert not engine.runtime_cache.exists()
