"""Which engines can run an encoder on a device, fastest first, and why others cannot."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch

from fseft_edge.runtime.bundle import EncoderBundle, Precision
from fseft_edge.runtime.libraries import import_library, import_problem
from fseft_edge.runtime.remembered_speed import remembered_order

BackendName = Literal["torch", "onnxruntime", "openvino"]

_BACKENDS: tuple[BackendName, ...] = ("torch", "onnxruntime", "openvino")

# Fastest first, by `benchmarks/encoder_backends.py`. Without OpenVINO, convolutions alone run fastest in PyTorch with
# oneDNN (channels last), attention in ONNX Runtime, which fuses what PyTorch writes to memory and reads again.
_OPENVINO: tuple[tuple[BackendName, Precision], ...] = (("openvino", "bfloat16"), ("openvino", "float32"))
_ON_CPU: dict[str, tuple[tuple[BackendName, Precision], ...]] = {
    "residual_unet": (*_OPENVINO, ("torch", "float32"), ("onnxruntime", "float32")),
    "swin_unetr": (*_OPENVINO, ("onnxruntime", "float32"), ("torch", "float32")),
}
_ON_CUDA: tuple[tuple[BackendName, Precision], ...] = (("torch", "float32"), ("onnxruntime", "float32"))

_log = logging.getLogger(__name__)


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

    @property
    def usable(self) -> bool:
        """Whether ``auto`` may take it."""
        return self.obstacle is None


def backend_choices(bundle: EncoderBundle, device: torch.device) -> list[BackendChoice]:
    """Return every way to run an encoder, in the order in which ``auto`` asks: it takes the first that is usable.

    Libraries are imported to find out whether they work.
    """
    order = _order(bundle, device)
    choices = [BackendChoice(*way, _obstacle(*way, bundle, device)) for way in order]
    never = f"not for {bundle.manifest.architecture} on this {'CPU' if device.type == 'cpu' else 'GPU'}"
    others = [backend for backend in _BACKENDS if backend not in {choice.backend for choice in choices}]
    return choices + [BackendChoice(backend, "float32", never) for backend in others]


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 itself; where it does not, it is emulated slowly or not at all."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16", False))


def _order(bundle: EncoderBundle, device: torch.device) -> list[tuple[BackendName, Precision]]:
    """Return the ways to compute on a device, fastest first: as measured on this machine, else as listed above."""
    on_cpu = _ON_CPU.get(bundle.manifest.architecture, ())
    order = list(on_cpu if device.type == "cpu" else _ON_CUDA)
    remembered = remembered_order(bundle, device)
    if remembered is None:
        return order
    measured = [way for way in remembered if way in order]
    _log.info("backends by their speed on this machine, as remembered: %s", ", ".join(map(" ".join, measured)))
    ranked = sorted((way for way in order if way in measured), key=measured.index)
    return ranked + [way for way in order if way not in measured]


def _obstacle(backend: BackendName, precision: Precision, bundle: EncoderBundle, device: torch.device) -> str | None:
    if backend == "torch":
        known = bundle.manifest.architecture in _ON_CPU
        return None if known else "this version does not know the encoder's architecture"
    if bundle.graph is None:
        return "the bundle was exported without an ONNX graph"
    problem = import_problem(backend)
    if problem is not None:
        return problem
    if backend == "onnxruntime" and device.type == "cuda":
        providers = import_library(backend).get_available_providers()
        if "CUDAExecutionProvider" not in providers:
            return "the installed onnxruntime cannot use the GPU"
    if precision == "bfloat16" and not has_bfloat16(device):
        return "this CPU has no bfloat16 instructions"
    report = bundle.parity(backend, precision)
    return "the bundle holds no parity report for it" if report is None else report.shortcoming
