"""Engines and mixed precision run on a GPU, against PyTorch on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doubles.models import WINDOW, small_contents, small_network, windows

from fseft_edge.export.engines import build_engines
from fseft_edge.export.onnx_graph import write_graph
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
    write_graph(small_network(), WINDOW, folder / "graph.onnx")
    write_graph(small_network(), WINDOW, folder / "mixed.onnx", "mixed")
    contents = small_contents(graph=folder / "graph.onnx", mixed_graph=folder / "mixed.onnx")
    return EncoderBundle.write(folder / "small.encoder", contents)


def build(bundle: EncoderBundle, library: EngineLibrary, precision: Precision) -> None:
    """Build for this GPU; the test is skipped where the library is not installed or does not know the GPU."""
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
def test_features_are_those_of_pytorch(
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
def test_an_engine_built_here_is_compared_here_and_its_kernels_are_kept(bundle: EncoderBundle) -> None:
    build(bundle, "tensorrt_rtx", "float32")
    (engine,) = build_engines(bundle.path, library="tensorrt_rtx", precision="float32")
    assert engine.description.parity is not None
    assert engine.description.parity.shortcoming is None
    for _ in range(2):  # the second session reads what the first one wrote
        with open_session(bundle, "cuda", "tensorrt_rtx", precision="float32") as session:
            session.encode(windows(2))
        assert engine.runtime_cache.stat().st_size > 0


@pytest.mark.gpu
def test_an_engine_of_another_gpu_is_refused_by_the_library(bundle: EncoderBundle, tmp_path: Path) -> None:
    own = target_of(torch.cuda.get_device_capability())
    build(bundle, "tensorrt_rtx", "mixed")
    other = "sm_75" if own != "sm_75" else "sm_120"
    (foreign,) = build_engines(bundle.path, [other], library="tensorrt_rtx")
    passed_off = foreign.path.with_name(foreign.path.name.replace(other, own))
    passed_off.write_bytes(foreign.path.read_bytes())
    description = foreign.description.model_copy(update={"target": own})
    passed_off.with_suffix(".json").write_text(description.model_dump_json())
    with pytest.raises(EngineError, match="cannot be used on this GPU"):
        open_session(bundle, "cuda", "tensorrt_rtx", precision="mixed")


@pytest.mark.gpu
def test_torch_in_mixed_precision_is_near_float32(bundle: EncoderBundle) -> None:
    with open_session(bundle, "cuda", "torch", precision="mixed") as session:
        features = session.encode(windows(3))
    with torch.no_grad():
        expected = small_network()(windows(3))
    for a, b in zip(expected, features, strict=True):
        assert b.dtype == torch.float32
        assert float((a - b.cpu()).abs().max()) <= 5e-3 * float(a.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnxruntime_returns_the_features_of_pytorch_on_the_gpu(bundle: EncoderBundle, count: int) -> None:
    library = pytest.importorskip("onnxruntime", exc_type=ImportError)
    if "CUDAExecutionProvider" not in library.get_available_providers():
        pytest.skip("the installed onnxruntime is the one without CUDA")
    with open_session(bundle, "cuda", "onnxruntime") as session:
        first, second = session.encode(windows(count)), session.encode(windows(count).cuda())
        with torch.cuda.stream(torch.cuda.Stream()):  # a caller that is on a stream of its own
            third = [level.cpu() for level in session.encode(windows(count).cuda())]
    with torch.no_grad():
        expected = small_network()(windows(count))
    for a, b, c, d in zip(expected, first, second, third, strict=True):
        assert b.device.type == c.device.type == "cuda"
        for features in (b.cpu(), c.cpu(), d):
            assert float((a - features).abs().max()) <= BOUNDS["float32"] * float(a.abs().max())
