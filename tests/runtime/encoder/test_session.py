"""EncoderSession: common behaviour of all backends, and choice of the backend."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from doubles.errors import refused
from doubles.libraries import fake_library
from doubles.models import WINDOW, small_contents, small_graph_bytes, small_network, windows

from fseft_edge.runtime.encoder import backend_choice
from fseft_edge.runtime.encoder.backend_choice import BackendChoice, backend_choices
from fseft_edge.runtime.encoder.backends import pytorch
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle, ParityReport
from fseft_edge.runtime.encoder.remembered_speed import remember
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import EncoderBundleError, EnvironmentProblemError, MissingBackendError, UsageError
from fseft_edge.runtime.system.libraries import openvino_core

BACKENDS = ["torch", "onnxruntime", "openvino"]
PASSED = ParityReport(backend="onnxruntime", version="1", source="noise", windows=1, gate=1e-4, relative_error=(1e-6,))
FASTEST = PASSED.model_copy(update={"backend": "openvino", "precision": "bfloat16", "mask_dsc": 1.0})
PARITY = {
    "onnxruntime": PASSED,
    "openvino": PASSED.model_copy(update={"backend": "openvino"}),
    "openvino-bfloat16": FASTEST,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    folder = tmp_path_factory.mktemp("session")
    (folder / "graph.onnx").write_bytes(small_graph_bytes())
    contents = small_contents(graph=folder / "graph.onnx", parity=PARITY)
    return EncoderBundle.write(folder / "small.encoder", contents)


@pytest.fixture(params=BACKENDS)
def session(request: pytest.FixtureRequest, bundle: EncoderBundle) -> Iterator[EncoderSession]:
    with open_session(bundle, device="cpu", backend=request.param, precision="float32") as opened:
        yield opened


def described_as(bundle: EncoderBundle, **changes: object) -> EncoderBundle:
    return replace(bundle, manifest=bundle.manifest.model_copy(update=changes))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_features_equal_plain_pytorch(session: EncoderSession, count: int, max_batch: int) -> None:
    session.max_batch = max_batch
    features = session.encode(windows(count))
    with torch.no_grad():
        expected = small_network()(windows(count))
    for level, a, b in zip(session.levels, expected, features, strict=True):
        assert b.shape == (count, level.channels, *(side // level.stride for side in WINDOW))
        assert b.dtype == torch.float32
        assert b.device == session.device
        assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


def test_attributes_of_a_session(session: EncoderSession, bundle: EncoderBundle) -> None:
    assert session.backend in BACKENDS
    assert session.device == torch.device("cpu")
    assert session.precision == "float32"
    assert session.window == bundle.window
    assert session.levels == bundle.levels
    assert session.max_batch >= 1


def test_windows_may_have_any_memory_order(session: EncoderSession) -> None:
    turned = windows(2).permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    for a, b in zip(session.encode(windows(2)), session.encode(turned), strict=True):
        assert torch.equal(a, b)


def test_encoding_again_gives_the_same_bits(session: EncoderSession) -> None:
    first, second = session.encode(windows(1)), session.encode(windows(1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_features_can_be_used_in_training(session: EncoderSession) -> None:
    feature = session.encode(windows(1))[0]
    weight = torch.ones(feature.shape[1], requires_grad=True)
    (feature * weight[:, None, None, None]).sum().backward()
    assert weight.grad is not None
    assert not feature.requires_grad


@pytest.mark.parametrize(
    "wrong",
    [windows(0), windows(1)[0], windows(1)[..., :8], windows(1).double(), windows(1).expand(1, 2, *WINDOW)],
    ids=["none", "no batch", "shape", "type", "channels"],
)
def test_windows_of_another_shape_or_type_are_refused(session: EncoderSession, wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"torch.float32 \['n', 1, 16, 16, 16\]"):
        session.encode(wrong)


def test_closed_session_is_refused(session: EncoderSession) -> None:
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.encode(windows(1))


def test_torch_session_restores_the_number_of_threads(bundle: EncoderBundle) -> None:
    before = torch.get_num_threads()
    with open_session(bundle, device="cpu", backend="torch", threads=before + 1) as session:
        session.encode(windows(1))
    assert torch.get_num_threads() == before


def test_network_without_onednn_gives_the_same_features(bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(bundle, device="cpu", backend="torch") as session:
        expected = session.encode(windows(1))
    monkeypatch.setattr(pytorch.torch.backends.mkldnn, "is_available", lambda: False)
    with open_session(bundle, device="cpu", backend="torch") as session:
        for a, b in zip(expected, session.encode(windows(1)), strict=True):
            assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


@pytest.mark.parametrize(
    ("device", "backend"), [("gpu", "torch"), ("cuda:", "torch"), ("cuda:x", "torch"), ("cpu", "tf")]
)
def test_unknown_device_or_backend_is_a_usage_error(bundle: EncoderBundle, device: str, backend: str) -> None:
    with refused(UsageError, repr(backend if device == "cpu" else device)):
        open_session(bundle, device=device, backend=backend)


@pytest.mark.parametrize(("device", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 2)])
def test_missing_gpu_is_an_environment_problem(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, device: str, count: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with refused(EnvironmentProblemError, device, count) as caught:
        open_session(bundle, device=device)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("backend", "precision", "bfloat16", "missing", "taken"),
    [
        ("auto", "auto", True, (), ("openvino", "bfloat16")),
        ("auto", "auto", False, (), ("torch", "float32")),
        ("auto", "auto", True, ("openvino-bfloat16",), ("torch", "float32")),
        ("auto", "float32", True, (), ("torch", "float32")),
        ("openvino", "auto", False, (), ("openvino", "float32")),
        ("openvino", "auto", True, ("openvino-bfloat16", "openvino"), ("openvino", "float32")),
        ("openvino", "bfloat16", True, ("openvino-bfloat16",), ("openvino", "bfloat16")),
        ("onnxruntime", "auto", True, (), ("onnxruntime", "float32")),
    ],
)
def test_the_fastest_choice_that_passes_its_gate_is_used_unless_another_is_requested(
    bundle: EncoderBundle,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    precision: Literal["auto", "float32", "bfloat16"],
    bfloat16: bool,
    missing: tuple[str, ...],
    taken: tuple[str, str],
) -> None:
    monkeypatch.setattr("fseft_edge.runtime.encoder.backend_choice.has_bfloat16", lambda _: bfloat16)
    parity = {name: report for name, report in PARITY.items() if name not in missing}
    opened = recorded_backends(monkeypatch)
    open_session(described_as(bundle, parity=parity), "cpu", backend, precision=precision)
    assert opened == [taken]


def test_a_requested_precision_that_did_not_pass_its_gate_is_used_with_a_warning(
    bundle: EncoderBundle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fseft_edge.runtime.encoder.backend_choice.has_bfloat16", lambda _: True)
    failed = {**PARITY, "openvino-bfloat16": FASTEST.model_copy(update={"mask_dsc": 0.9})}
    opened = recorded_backends(monkeypatch)
    open_session(described_as(bundle, parity=failed), "cpu", "openvino", precision="bfloat16")
    assert opened == [("openvino", "bfloat16")]
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert all(text in warning for text in ("openvino", "bfloat16", "0.9000"))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_precision_that_no_backend_supports_is_a_usage_error(bundle: EncoderBundle, backend: str) -> None:
    with refused(UsageError, "mixed"):
        open_session(bundle, "cpu", backend, precision="mixed")


def test_onnxruntime_is_used_without_its_telemetry(bundle: EncoderBundle, tmp_path: Path) -> None:
    """With telemetry, ONNX Runtime writes an identifier and a session file to one of these folders."""
    code = (
        "import sys, torch; from pathlib import Path;"
        "from fseft_edge.runtime.encoder.backends.onnxruntime import GraphRunner;"
        "GraphRunner(Path(sys.argv[1]), torch.device('cpu'), 1)(torch.zeros(1, 1, 16, 16, 16))"
    )
    folders = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), str(tmp_path))
    reporting = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    subprocess.run(  # noqa: S603 - a fixed script
        [sys.executable, "-c", code, str(bundle.graph)], check=True, env={**reporting, **folders}
    )
    assert list(tmp_path.rglob("*")) == []


def test_openvino_is_imported_without_its_telemetry() -> None:
    code = (
        "import sys; from fseft_edge.runtime.system.libraries import openvino_core; openvino_core();"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - a fixed script
    assert done.stdout.strip() == "[]"


def test_a_signal_does_not_crash_the_process_after_two_openvino_sessions_were_closed(bundle: EncoderBundle) -> None:
    code = (
        "import gc, signal, sys; from pathlib import Path; from fseft_edge.runtime.encoder.backends.openvino import *;"
        "first, second = (CompiledGraph(Path(sys.argv[1]), 1, 'float32') for _ in range(2)); del first; gc.collect();"
        "del second; gc.collect(); signal.signal(signal.SIGUSR1, lambda *_: print('received'));"
        "signal.raise_signal(signal.SIGUSR1)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle.graph)], capture_output=True, text=True, check=False)  # noqa: S603 - a fixed script
    assert (done.returncode, done.stdout.strip()) == (0, "received"), done.stderr


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_remedy_of_a_missing_library_is_its_installation(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setitem(sys.modules, backend, None)
    monkeypatch.setattr("fseft_edge.runtime.encoder.backends.openvino.openvino_core", openvino_core.__wrapped__)
    with refused(MissingBackendError, backend) as caught:
        open_session(bundle, device="cpu", backend=backend)
    assert f"pip install 'fseft-edge[{'cpu' if backend == 'onnxruntime' else 'openvino'}]'" in caught.value.remedy
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_bundle_without_a_graph_is_refused_by_backends_that_need_a_graph(tmp_path: Path, backend: str) -> None:
    bundle = EncoderBundle.write(tmp_path / "small.encoder", small_contents())
    with refused(EncoderBundleError, bundle.path, "ONNX"):
        open_session(bundle, device="cpu", backend=backend)


def test_without_openvino_auto_uses_onnxruntime_for_attention(bundle: EncoderBundle) -> None:
    attention = described_as(bundle, architecture="swin_unetr", parity={"onnxruntime": PASSED})
    with open_session(attention, device="cpu") as session:
        assert session.backend == "onnxruntime"


@pytest.mark.parametrize(
    ("changes", "installed", "reason"),
    [
        ({"parity": {}}, True, "no parity report"),
        ({"parity": {"onnxruntime": PASSED.model_copy(update={"relative_error": (0.5,)})}}, True, "5.0e-01"),
        ({"files": {}}, True, "ONNX graph"),
        ({}, False, "not installed"),
    ],
)
def test_auto_skips_unusable_backends_and_logs_the_reasons(
    bundle: EncoderBundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, object],
    installed: bool,
    reason: str,
) -> None:
    chosen: list[EncoderBundle] = []
    monkeypatch.setitem(
        sys.modules["fseft_edge.runtime.encoder.session"]._OPENERS,
        "torch",
        lambda opened, device, threads, _: chosen.append(opened) or pytorch.TorchSession(bundle, device, threads),
    )
    if not installed:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    attention = described_as(bundle, architecture="swin_unetr", **{"parity": {"onnxruntime": PASSED}, **changes})
    with caplog.at_level(logging.INFO), open_session(attention, device="cpu") as session:
        assert session.backend == "torch"
    assert chosen == [attention]
    (skipped,) = (message for message in caplog.messages if message.startswith("backend onnxruntime in float32"))
    assert reason in skipped


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
INTERNALS = sys.modules["fseft_edge.runtime.encoder.session"]


@pytest.mark.parametrize("architecture", ["residual_unet", "swin_unetr"])
@pytest.mark.parametrize("parity", [{}, {"onnxruntime": PASSED}, PARITY], ids=["none", "onnxruntime", "all"])
def test_auto_uses_the_first_usable_choice(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, architecture: str, parity: dict[str, ParityReport]
) -> None:
    opened = recorded_backends(monkeypatch)
    described = described_as(bundle, architecture=architecture, parity=parity)
    open_session(described, device="cpu")
    usable = [(choice.backend, choice.precision) for choice in backend_choices(described, CPU) if choice.usable]
    assert opened == usable[:1]


def recorded_backends(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Replace all backends by functions that record backend and precision, and return the list of the records."""
    opened: list[tuple[str, str]] = []

    def record(name: str, bundle: EncoderBundle, device: torch.device, threads: int, precision: str) -> SimpleNamespace:
        opened.append((name, precision))
        return SimpleNamespace(backend=name, device=device, precision=precision, keep_arithmetic=lambda: None)

    for name in BACKENDS:
        monkeypatch.setitem(INTERNALS._OPENERS, name, partial(record, name))
    return opened


def test_a_requested_backend_does_not_import_other_libraries(bundle: EncoderBundle) -> None:
    code = (
        "import sys; from pathlib import Path; from fseft_edge.runtime.encoder.bundle import EncoderBundle;"
        "from fseft_edge.runtime.encoder.session import open_session; bundle = EncoderBundle.open(Path(sys.argv[1]));"
        "open_session(bundle, 'cpu', 'torch').close(); print({'openvino', 'onnxruntime'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle.path)], capture_output=True, text=True, check=True)  # noqa: S603 - a fixed script
    assert done.stdout.strip() == "set()"


def test_choices_list_every_backend_with_its_obstacle(bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fseft_edge.runtime.encoder.backend_choice.has_bfloat16", lambda _: False)
    missing = "the bundle contains no parity report for this backend"
    assert list(backend_choices(described_as(bundle, parity={}), CPU)) == [
        BackendChoice("openvino", "bfloat16", "this CPU has no bfloat16 instructions"),
        BackendChoice("torch", "float32", None),
        BackendChoice("openvino", "float32", missing),
        BackendChoice("onnxruntime", "float32", missing),
        BackendChoice("tensorrt_rtx", "float32", "does not compute on a CPU", suits_device=False),
        BackendChoice("tensorrt", "float32", "does not compute on a CPU", suits_device=False),
    ]


def test_every_backend_has_a_function_that_opens_its_session() -> None:
    assert set(INTERNALS._OPENERS) == set(backend_choice.BACKENDS)


def test_an_onnxruntime_without_cuda_cannot_be_used_on_a_gpu(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for providers, reason in (
        ("['CPUExecutionProvider']", "the installed ONNX Runtime does not support GPUs"),
        ("['CUDAExecutionProvider', 'CPUExecutionProvider']", None),
    ):
        source = f"def get_available_providers(): return {providers}"
        fake_library(monkeypatch, tmp_path / str(reason), "onnxruntime", source)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        assert BackendChoice("onnxruntime", "float32", reason) in backend_choices(bundle, GPU)


def test_auto_skips_a_broken_library(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fake_library(monkeypatch, tmp_path, "onnxruntime", "raise ImportError('libonnx.so: not there')")
    attention = described_as(bundle, architecture="swin_unetr", parity={"onnxruntime": PASSED})
    with caplog.at_level(logging.INFO), refused(EncoderBundleError):
        open_session(attention, device="cpu")  # fails because the weights do not match the architecture
    (skipped,) = (message for message in caplog.messages if message.startswith("backend onnxruntime in float32"))
    assert "broken: libonnx.so: not there" in skipped


def test_auto_prefers_backends_that_were_measured_to_be_faster(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fastest, second = ("onnxruntime", "float32"), ("torch", "float32")
    remember(bundle, CPU, {fastest: 1.0, second: 2.0, ("abacus", "float32"): 0.1})
    with caplog.at_level(logging.INFO), open_session(bundle, device="cpu") as session:
        assert session.backend == "onnxruntime"
    assert "onnxruntime float32, torch float32" in caplog.text
    choices = [(choice.backend, choice.precision) for choice in backend_choices(bundle, CPU)]
    assert choices[:4] == [fastest, second, ("openvino", "bfloat16"), ("openvino", "float32")]
    without_parity = described_as(bundle, parity={})
    with open_session(without_parity, device="cpu") as session:
        assert session.backend == "torch"
