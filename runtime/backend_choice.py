"""Which engines can run an encoder on a device, fastest first, and why others cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from fseft_edge.runtime.backends.tensorrt_library import import_library
from fseft_edge.runtime.bundle import EncoderBundle, Precision
from fseft_edge.runtime.engine_files import EngineLibrary, engine_for_gpu
from fseft_edge.runtime.errors import EngineError, MissingBackendError

BackendName = Literal["torch", "onnxruntime", "openvino", "tensorrt_rtx", "tensorrt"]

# Fastest first, by `benchmarks/encoder_backends.py`. Without OpenVINO, convolutions alone run fastest in PyTorch with
# oneDNN (channels last), attention in ONNX Runtime, which fuses what PyTorch writes to memory and reads again.
_OPENVINO: tuple[tuple[BackendName, Precision], ...] = (("openvino", "bfloat16"), ("openvino", "float32"))
_ON_CPU: dict[str, tuple[tuple[BackendName, Precision], ...]] = {
    "residual_unet": (*_OPENVINO, ("torch", "float32"), ("onnxruntime", "float32")),
    "swin_unetr": (*_OPENVINO, ("onnxruntime", "float32"), ("torch", "float32")),
}
# By what the engines do with float16 and with fused operators; not measured, there was no GPU.
_ON_CUDA: tuple[tuple[BackendName, Precision], ...] = (
    ("tensorrt_rtx", "mixed"),
    ("tensorrt", "mixed"),
    ("torch", "mixed"),
    ("tensorrt_rtx", "float32"),
    ("tensorrt", "float32"),
    ("torch", "float32"),
    ("onnxruntime", "float32"),
)


@dataclass(frozen=True)
class BackendChoice:
    """A way to run an encoder.

    Attributes:
        backend: the engine's name.
        precision: what it computes in.
        obstacle: why ``auto`` does not take it, or None.
    """

    backend: BackendName
    precision: Precision
    obstacle: str | None


def backend_choices(bundle: EncoderBundle, device: torch.device) -> Sequence[BackendChoice]:
    """Return every way to run an encoder on a device, fastest first; torch in float32 always works."""
    on_cpu = _ON_CPU.get(bundle.manifest.architecture, _ON_CPU["residual_unet"])
    order = on_cpu if device.type == "cpu" else _ON_CUDA
    return [
        BackendChoice(backend, precision, _obstacle(backend, precision, bundle, device)) for backend, precision in order
    ]


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 itself; where it does not, it is emulated slowly or not at all."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16", False))


def _obstacle(backend: BackendName, precision: Precision, bundle: EncoderBundle, device: torch.device) -> str | None:
    if backend == "torch" and precision == "float32":
        return None
    if backend != "torch" and bundle.graph_in(precision) is None:
        return "the bundle was exported without an ONNX graph for it"
    if find_spec(backend) is None:
        return "not installed"
    if precision == "bfloat16" and not has_bfloat16(torch.device("cpu")):
        return "this CPU has no bfloat16 instructions"
    if backend in ("tensorrt_rtx", "tensorrt"):
        return _engine_obstacle(backend, precision, bundle, device)
    report = bundle.parity(backend, precision)
    return "the bundle holds no parity report for it" if report is None else report.shortcoming


def _engine_obstacle(
    library: EngineLibrary, precision: Precision, bundle: EncoderBundle, device: torch.device
) -> str | None:
    """An engine's features are those of a GPU, so that its own report counts, not one that the bundle could hold."""
    try:
        version = str(import_library(library).__version__)
        capability = torch.cuda.get_device_capability(device)
        engine = engine_for_gpu(bundle, library, version, precision, capability)
    except (MissingBackendError, EngineError) as error:
        return str(error)
    report = engine.description.parity
    if report is None:
        return (
            f"{engine.path.name} was not compared with PyTorch on this machine "
            f"(fseft-edge build-engines {bundle.path} --parity-ct CT)"
        )
    return report.shortcoming
