"""Engines and mixed precision on a GPU: comparison with PyTorch on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doubles.errors import refused
from doubles.models import small_contents, small_graph_bytes, small_network, windows

from fseft_edge.export.engines import build_engines
from fseft_edge.runtime.encoder.backends.tensorrt_library import import_library
from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoder.engine_files import EngineLibrary, target_of
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import EngineError

LIBRARIES: list[EngineLibrary] = ["tensorrt_rtx", "tensorrt"]
BOUNDS: dict[Precision, float] = {"mixed": 5e-3, "float32": 1e-4}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "graph.onnx").write_bytes(small_graph_bytes())
    (folder / "mixed.onnx").write_bytes(small_graph_bytes("mixed"))
    contents = small_contents(graph=folder / "graph.onnx", mixed_graph=folder / "mixed.onnx")
    return EncoderBundle.write(folder / "small.encoder", contents)


def build(bundle: EncoderBundle, library: EngineLibrary, precision: Precision) -> None:
    """Build for this GPU; skip the test if the library is not installed or does not support the GPU."""
    pytest.importorskip(library, exc_type=ImportError)
    known = getattr(import_library(library), "ComputeCapability", None)
    own = target_of(torch.cuda.get_device_capability())
    if known is not None and own.replace("sm_", "SM") not in known.__members__:
        pytest.skip(f"{library} does not build for {own}")
    build_engines(bundle.path, library=library, precision=precision)


@pytest.mark.gpu
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("precision", ["mixed", "float32"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_features_equal_pytorch(
    bundle: EncoderBundle, library: EngineLibrary, precision: Precision, count: int
) -> None:
    build(bundle, library, precision)
    with open_session(bundle, "cuda", library, precision=precision) as session:
        first, second = session.encode(windows(count)), session.encode(windows(count).cuda())
    with torch.no_grad():
        expected = small_network()(windows(count))
    for a, b, c in zip(expected, first, second, strict=True):
        assert b.device.type == "cuda"
        assert float((a - b.cpu()).abs().max()) <= BOUNDS[precision] * float(a.abs().max())
        assert float((b - c).abs().max()) <= BOUNDS[precision] * float(a.abs().max())


@pytest.mark.gpu
def test_an_engine_for_this_gpu_is_compared_and_its_kernels_are_stored(bundle: EncoderBundle) -> None:
    build(bundle, "tensorrt_rtx", "float32")
    (engine,) = build_engines(bundle.path, library="tensorrt_rtx", precision="float32")
    assert engine.description.parity is not None
    assert engine.description.parity.shortcoming is None
    for _ in range(2):  # the second session reads the kernels that the first session stored
        with open_session(bundle, "cuda", "tensorrt_rtx", precision="float32") as session:
            session.encode(windows(2))
        assert engine.runtime_cache.stat().st_size > 0


@pytest.mark.gpu
def test_an_engine_of_another_gpu_is_refused_by_the_library(bundle: EncoderBundle, tmp_path: Path) -> None:
    own = target_of(torch.cuda.get_device_capability())
    build(bundle, "tensorrt_rtx", "mixed")
    other = "sm_75" if own != "sm_75" else "sm_120"
    (foreign,) = build_engines(bundle.path, [other], library="tensorrt_rtx")
    renamed = foreign.path.with_name(foreign.path.name.replace(other, own))
    renamed.write_bytes(foreign.path.read_bytes())
    description = foreign.description.model_copy(update={"target": own})
    renamed.with_suffix(".json").write_text(description.model_dump_json())
    with refused(EngineError, renamed):
        open_session(bundle, "cuda", "tensorrt_rtx", precision="mixed")


@pytest.mark.gpu
def test_torch_in_mixed_precision_is_close_to_float32(bundle: EncoderBundle) -> None:
    with open_session(bundle, "cuda", "torch", precision="mixed") as session:
        features = session.encode(windows(3))
    with torch.no_grad():
        expected = small_network()(windows(3))
    for a, b in zip(expected, features, strict=True):
        assert b.dtype == torch.float32
        assert float((a - b.cpu()).abs().max()) <= 5e-3 * float(a.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 5])
def test_features_of_onnxruntime_on_the_gpu_equal_pytorch(bundle: EncoderBundle, count: int) -> None:
    library = pytest.importorskip("onnxruntime", exc_type=ImportError)
    if "CUDAExecutionProvider" not in library.get_available_providers():
        pytest.skip("the installed onnxruntime has no CUDA support")
    with open_session(bundle, "cuda", "onnxruntime") as session:
        first, second = session.encode(windows(count)), session.encode(windows(count).cuda())
        with torch.cuda.stream(torch.cuda.Stream()):  # the caller uses another stream than the default
            third = [level.cpu() for level in session.encode(windows(count).cuda())]
    with torch.no_grad():
        expected = small_network()(windows(count))
    for a, b, c, d in zip(expected, first, second, third, strict=True):
        assert b.device.type == c.device.type == "cuda"
        for features in (b.cpu(), c.cpu(), d):
            assert float((a - features).abs().max()) <= BOUNDS["float32"] * float(a.abs().max())
