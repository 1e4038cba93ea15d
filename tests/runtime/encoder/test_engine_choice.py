"""Engines among the backends of a GPU: when they are taken, and what happens when they are not. No GPU is needed."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from doubles.models import small_contents

from fseft_edge.runtime.encoder import session as sessions
from fseft_edge.runtime.encoder.backend_choice import backend_choices
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.backends.tensorrt_library import import_library
from fseft_edge.runtime.encoder.bundle import EncoderBundle, ParityReport, Precision
from fseft_edge.runtime.encoder.engine_files import EngineDescription, engine_path, write_description
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import EngineError, MissingBackendError, UsageError

GPU = torch.device("cuda", 0)
PASSED = ParityReport(
    backend="tensorrt_rtx",
    precision="mixed",
    version="1",
    source="ct",
    windows=2,
    gate=5e-3,
    relative_error=(1e-3,),
    mask_dsc=1.0,
)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncoderBundle:
    """A bundle with graphs (what they hold is not looked at), on a machine that says it has an RTX 30 GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(sessions, "resolve_device", lambda name: GPU)
    for name in ("graph", "mixed"):
        (tmp_path / name).write_text(name)
    contents = small_contents(graph=tmp_path / "graph", mixed_graph=tmp_path / "mixed")
    return EncoderBundle.write(tmp_path / "small.encoder", contents)


def add_engine(bundle: EncoderBundle, precision: Precision = "mixed", parity: ParityReport | None = PASSED) -> None:
    path = engine_path(bundle, "tensorrt_rtx", precision, "sm_86")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"engine")
    graph = bundle.graph_in(precision)
    assert graph is not None
    described = EngineDescription(
        library="tensorrt_rtx",
        version=import_library("tensorrt_rtx").__version__,
        target="sm_86",
        precision=precision,
        graph_sha256=hashlib.sha256(graph.read_bytes()).hexdigest(),
        max_batch=2,
        tensors=(),
        engine_sha256=hashlib.sha256(b"engine").hexdigest(),
        parity=parity,
    )
    write_description(path, described)


def obstacle(bundle: EncoderBundle, backend: str = "tensorrt_rtx", precision: str = "mixed") -> str | None:
    (found,) = [
        choice.obstacle
        for choice in backend_choices(bundle, GPU)
        if (choice.backend, choice.precision) == (backend, precision)
    ]
    return found


def test_an_engine_that_passed_on_this_gpu_comes_first(bundle: EncoderBundle) -> None:
    add_engine(bundle)
    first = next(backend_choices(bundle, GPU))
    assert (first.backend, first.precision, first.obstacle) == ("tensorrt_rtx", "mixed", None)


def test_without_an_engine_the_way_to_one_is_named(bundle: EncoderBundle) -> None:
    found = str(obstacle(bundle))
    assert "There is no engine" in found
    assert f"fseft-edge build-engines {bundle.path} --target sm_86 --precision mixed" in found


def test_an_engine_that_was_not_compared_is_passed_over(bundle: EncoderBundle) -> None:
    add_engine(bundle, parity=None)
    assert f"was not compared with PyTorch on this machine (fseft-edge build-engines {bundle.path}" in str(
        obstacle(bundle)
    )


def test_an_engine_that_did_not_pass_is_passed_over(bundle: EncoderBundle) -> None:
    add_engine(bundle, parity=PASSED.model_copy(update={"relative_error": (0.1,)}))
    assert "1.0e-01 exceeds the gate" in str(obstacle(bundle))


def test_a_changed_engine_is_passed_over(bundle: EncoderBundle) -> None:
    add_engine(bundle)
    engine_path(bundle, "tensorrt_rtx", "mixed", "sm_86").write_bytes(b"other")
    assert "truncated or has changed" in str(obstacle(bundle))


@pytest.mark.parametrize("library", ["tensorrt_rtx", "tensorrt"])
def test_a_library_that_is_not_installed_is_passed_over(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert obstacle(bundle, library) == "not installed"


def test_a_bundle_without_a_mixed_graph_says_so(bundle: EncoderBundle, tmp_path: Path) -> None:
    plain = EncoderBundle.write(tmp_path / "plain.encoder", small_contents(graph=tmp_path / "graph"))
    assert obstacle(plain) == "the bundle was exported without an ONNX graph for it"


def test_mixed_torch_needs_a_report_of_its_own(bundle: EncoderBundle) -> None:
    assert obstacle(bundle, "torch") == "the bundle holds no parity report for it"
    assert obstacle(bundle, "torch", "float32") is None


class Plain(EncoderSession):
    """Stands for PyTorch on the GPU."""

    backend = "torch"

    def _encode_batch(self, windows: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError


def broken(bundle: EncoderBundle, device: torch.device, threads: int, precision: Precision) -> EncoderSession:
    raise EngineError("x.engine cannot be used on this GPU: old cuda driver.", remedy="Update it.")


def test_auto_goes_on_where_an_engine_does_not_open_and_says_so(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_engine(bundle)
    monkeypatch.setitem(sessions._BACKENDS, "tensorrt_rtx", broken)
    monkeypatch.setitem(sessions._BACKENDS, "torch", lambda *settings: Plain(settings[0], settings[1], 1, settings[3]))
    with open_session(bundle) as session:
        assert (session.backend, session.precision) == ("torch", "float32")
    assert "backend tensorrt_rtx in mixed passed over: x.engine cannot be used on this GPU: old cuda" in caplog.text


def test_what_was_asked_for_by_name_is_not_replaced(bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    add_engine(bundle)
    monkeypatch.setitem(sessions._BACKENDS, "tensorrt_rtx", broken)
    with pytest.raises(EngineError, match="old cuda driver"):
        open_session(bundle, backend="tensorrt_rtx")


def test_opening_never_builds(bundle: EncoderBundle) -> None:
    with pytest.raises(EngineError, match="There is no engine") as caught:
        open_session(bundle, backend="tensorrt_rtx")
    assert caught.value.exit_code == 4
    assert not (bundle.path / "engines").exists()


def test_the_precision_asked_for_decides_which_engine_is_meant(
    bundle: EncoderBundle, caplog: pytest.LogCaptureFixture
) -> None:
    for precision in ("mixed", "float32"):
        with pytest.raises(EngineError, match=f"tensorrt_rtx-{precision}-sm_86"):
            open_session(bundle, backend="tensorrt_rtx", precision=precision)


@pytest.mark.parametrize("library", ["tensorrt_rtx", "tensorrt"])
def test_a_missing_library_says_what_to_install(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingBackendError, match="pip install 'fseft-edge") as caught:
        open_session(bundle, backend=library)
    assert caught.value.exit_code == 4


def test_on_a_cpu_there_are_no_engines(bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "resolve_device", lambda name: torch.device("cpu"))
    with pytest.raises(UsageError, match="tensorrt_rtx does not compute on this device"):
        open_session(bundle, backend="tensorrt_rtx")
