"""Choice of a backend: known architectures, and engines on a simulated GPU."""

from __future__ import annotations

import hashlib
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from doubles.errors import refused
from doubles.models import small_contents

from fseft_edge.runtime.encoder import backend_choice
from fseft_edge.runtime.encoder import session as sessions
from fseft_edge.runtime.encoder.backend_choice import backend_choices
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.backends.tensorrt_library import import_library
from fseft_edge.runtime.encoder.bundle import EncoderBundle, ParityReport, Precision
from fseft_edge.runtime.encoder.engine_files import EngineDescription, engine_path, write_description
from fseft_edge.runtime.encoder.networks import ARCHITECTURES
from fseft_edge.runtime.encoder.networks.base import WholeScan
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import EngineError, MissingBackendError, UsageError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
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
    """A bundle with graphs, whose content is not read, on a machine with a simulated RTX 30 GPU."""
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


def of_architecture(bundle: EncoderBundle, architecture: str) -> EncoderBundle:
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"architecture": architecture}))


def test_an_architecture_of_a_newer_version_has_no_backend(bundle: EncoderBundle) -> None:
    unknown = of_architecture(bundle, "net_of_2030")
    assert not any(choice.usable for choice in backend_choices(unknown, CPU))
    for choice in backend_choices(unknown, GPU):
        if choice.suits_device:
            assert "architecture" in str(choice.obstacle)


def test_the_order_of_backends_does_not_make_an_architecture_known(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backend_choice._ON_CPU, "net_of_2030", (("torch", "float32"),))
    (choice,) = backend_choices(of_architecture(bundle, "net_of_2030"), CPU, "torch")
    assert "architecture" in str(choice.obstacle)


def test_a_known_architecture_without_an_order_has_the_default_order(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(backend_choice._ON_CPU, "swin_unetr")
    choices = [choice for choice in backend_choices(of_architecture(bundle, "swin_unetr"), CPU) if choice.suits_device]
    assert [(choice.backend, choice.precision) for choice in choices] == list(backend_choice._DEFAULT_ON_CPU)
    assert [choice.backend for choice in choices if choice.usable] == ["torch"]  # the bundle has no parity reports
    assert not any("architecture" in str(choice.obstacle) for choice in choices)


def test_whole_scans_are_computed_plane_by_plane_unless_another_backend_is_requested(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_choice, "has_bfloat16", lambda device: True)
    passed = {"openvino-bfloat16": PASSED.model_copy(update={"backend": "openvino", "precision": "bfloat16"})}
    windows = replace(bundle, manifest=bundle.manifest.model_copy(update={"parity": passed}))
    whole = replace(windows, manifest=windows.manifest.model_copy(update={"whole_scan": WholeScan(4, 20)}))
    assert [next(backend_choices(tiled, CPU)).backend for tiled in (windows, whole)] == ["openvino", "torch"]
    assert [choice.precision for choice in backend_choices(whole, CPU, "openvino") if choice.usable] == ["bfloat16"]


def test_orders_are_those_of_known_architectures() -> None:
    assert set(backend_choice._ON_CPU) <= set(ARCHITECTURES)


def test_an_engine_that_passed_on_this_gpu_is_the_first_choice(bundle: EncoderBundle) -> None:
    add_engine(bundle)
    first = next(backend_choices(bundle, GPU))
    assert (first.backend, first.precision, first.obstacle) == ("tensorrt_rtx", "mixed", None)


def test_the_obstacle_of_a_missing_engine_contains_the_command_that_builds_it(bundle: EncoderBundle) -> None:
    assert f"fseft-edge build-engines {bundle.path} --target sm_86 --precision mixed" in str(obstacle(bundle))


def test_an_engine_that_was_not_compared_is_skipped(bundle: EncoderBundle) -> None:
    add_engine(bundle, parity=None)
    assert f"fseft-edge build-engines {bundle.path} --parity-ct" in str(obstacle(bundle))


def test_an_engine_that_did_not_pass_is_skipped(bundle: EncoderBundle) -> None:
    add_engine(bundle, parity=PASSED.model_copy(update={"relative_error": (0.1,)}))
    assert "1.0e-01" in str(obstacle(bundle))


def test_a_changed_engine_is_skipped(bundle: EncoderBundle) -> None:
    add_engine(bundle)
    path = engine_path(bundle, "tensorrt_rtx", "mixed", "sm_86")
    path.write_bytes(b"other")
    assert str(path) in str(obstacle(bundle))


@pytest.mark.parametrize("library", ["tensorrt_rtx", "tensorrt"])
def test_a_library_that_is_not_installed_is_skipped(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert obstacle(bundle, library) == "not installed"


def test_an_engine_needs_a_graph_in_its_precision(bundle: EncoderBundle, tmp_path: Path) -> None:
    plain = EncoderBundle.write(tmp_path / "plain.encoder", small_contents(graph=tmp_path / "graph"))
    assert "ONNX graph" in str(obstacle(plain))


def test_torch_in_mixed_precision_needs_a_parity_report(bundle: EncoderBundle) -> None:
    assert "parity report" in str(obstacle(bundle, "torch"))
    assert obstacle(bundle, "torch", "float32") is None


class Plain(EncoderSession):
    """Session that represents PyTorch on the GPU."""

    backend = "torch"

    def _encode_batch(self, windows: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError


def broken(bundle: EncoderBundle, device: torch.device, threads: int, precision: Precision) -> EncoderSession:
    raise EngineError("x.engine cannot be used on this GPU: old cuda driver.", remedy="Update it.")


def test_auto_skips_an_engine_that_cannot_be_opened_and_logs_the_reason(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_engine(bundle)
    monkeypatch.setitem(sessions._OPENERS, "tensorrt_rtx", broken)
    monkeypatch.setitem(sessions._OPENERS, "torch", lambda *settings: Plain(settings[0], settings[1], 1, settings[3]))
    with open_session(bundle) as session:
        assert (session.backend, session.precision) == ("torch", "float32")
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert all(text in warning for text in ("tensorrt_rtx", "mixed", "x.engine", "old cuda driver"))


def test_a_requested_backend_is_not_replaced(bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    add_engine(bundle)
    monkeypatch.setitem(sessions._OPENERS, "tensorrt_rtx", broken)
    with refused(EngineError, "old cuda driver"):
        open_session(bundle, backend="tensorrt_rtx")


def test_opening_a_session_never_builds_an_engine(bundle: EncoderBundle) -> None:
    with refused(EngineError, "tensorrt_rtx-float32-sm_86.engine") as caught:
        open_session(bundle, backend="tensorrt_rtx")
    assert caught.value.exit_code == 4
    assert not (bundle.path / "engines").exists()


def test_the_requested_precision_determines_the_engine(bundle: EncoderBundle) -> None:
    for precision in ("mixed", "float32"):
        with refused(EngineError, f"tensorrt_rtx-{precision}-sm_86"):
            open_session(bundle, backend="tensorrt_rtx", precision=precision)


@pytest.mark.parametrize("library", ["tensorrt_rtx", "tensorrt"])
def test_the_remedy_of_a_missing_library_is_its_installation(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with refused(MissingBackendError, library) as caught:
        open_session(bundle, backend=library)
    assert "pip install 'fseft-edge[" in caught.value.remedy
    assert caught.value.exit_code == 4


def test_engines_cannot_be_used_on_a_cpu(bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "resolve_device", lambda name: torch.device("cpu"))
    with refused(UsageError, "tensorrt_rtx"):
        open_session(bundle, backend="tensorrt_rtx")
