"""Which engines can run an encoder on a device, fastest first, and why others cannot."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoder.engine_files import EngineLibrary, engine_for_gpu
from fseft_edge.runtime.encoder.networks import IMPORTED
from fseft_edge.runtime.encoder.remembered_speed import remembered_order
from fseft_edge.runtime.errors import EngineError
from fseft_edge.runtime.system.libraries import import_library, import_problem

BackendName = Literal["torch", "onnxruntime", "openvino", "tensorrt_rtx", "tensorrt"]

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)

# Fastest first, by `benchmarks/encoder_backends.py`. In float32, convolutions alone run as fast in PyTorch with oneDNN
# (channels last) as in OpenVINO, in two thirds of the memory. Attention runs faster where operators are fused, so that
# less is written to memory and read again.
_ON_CPU: dict[str, tuple[tuple[BackendName, Precision], ...]] = {
    "residual_unet": (
        ("openvino", "bfloat16"),
        ("torch", "float32"),
        ("openvino", "float32"),
        ("onnxruntime", "float32"),
    ),
    "swin_unetr": (
        ("openvino", "bfloat16"),
        ("openvino", "float32"),
        ("onnxruntime", "float32"),
        ("torch", "float32"),
    ),
    "genesis_unet": (
        ("openvino", "bfloat16"),
        ("openvino", "float32"),
        ("onnxruntime", "float32"),
        ("torch", "float32"),
    ),
    IMPORTED: (
        ("openvino", "bfloat16"),
        ("openvino", "float32"),
        ("onnxruntime", "float32"),
        ("torch", "float32"),
    ),
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

_NO_NETWORK = "the encoder's network is code that no bundle holds: only its ONNX graph is there"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackendChoice:
    """A way to run an encoder.

    Attributes:
        backend: the engine's name.
        precision: what it computes in.
        obstacle: why ``auto`` does not take it, or None.
        suits_device: whether the engine computes on such a device at all.
    """

    backend: BackendName
    precision: Precision
    obstacle: str | None
    suits_device: bool = True

    @property
    def usable(self) -> bool:
        """Whether ``auto`` may take it."""
        return self.obstacle is None


def backend_choices(
    bundle: EncoderBundle, device: torch.device, backend: str = "auto", precision: str = "auto"
) -> Iterator[BackendChoice]:
    """Yield the ways to run an encoder, in the order in which ``auto`` asks: it takes the first that is usable.

    A library is imported to find out whether it works, when its turn comes.

    Args:
        bundle: the encoder.
        device: where.
        backend: this one alone, or ``auto`` for all.
        precision: this one alone, or ``auto``.
    """

    def wanted(way: tuple[BackendName, Precision]) -> bool:
        return backend in ("auto", way[0]) and precision in ("auto", way[1])

    order = _order(bundle, device)
    for way in filter(wanted, order):
        yield BackendChoice(*way, _obstacle(*way, bundle, device))
    never = f"does not compute on a {'CPU' if device.type == 'cpu' else 'GPU'}"
    for name in BACKENDS:
        if name not in {computes for computes, _ in order} and wanted((name, "float32")):
            yield BackendChoice(name, "float32", never, suits_device=False)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 itself; where it does not, it is emulated slowly or not at all."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16", False))


def _order(bundle: EncoderBundle, device: torch.device) -> list[tuple[BackendName, Precision]]:
    """Return the ways to compute on a device, fastest first: as measured on this machine, else as listed above."""
    on_cpu = _ON_CPU.get(bundle.manifest.architecture, _ON_CPU["residual_unet"])
    order = list(on_cpu if device.type == "cpu" else _ON_CUDA)
    remembered = remembered_order(bundle, device)
    if remembered is None:
        return order
    measured = [way for way in remembered if way in order]
    _log.info("backends by their speed on this machine, as remembered: %s", ", ".join(map(" ".join, measured)))
    ranked = sorted((way for way in order if way in measured), key=measured.index)
    return ranked + [way for way in order if way not in measured]


def _obstacle(backend: BackendName, precision: Precision, bundle: EncoderBundle, device: torch.device) -> str | None:
    if bundle.manifest.architecture not in _ON_CPU:
        return "this version does not know the encoder's architecture"
    if backend == "torch" and (bundle.graph_only or precision == "float32"):
        return _NO_NETWORK if bundle.graph_only else None
    if backend != "torch" and bundle.graph_in(precision) is None:
        return "the bundle was exported without an ONNX graph for it"
    problem = _library_obstacle(backend, precision, device)
    if problem is not None:
        return problem
    if backend in ("tensorrt_rtx", "tensorrt"):
        return _engine_obstacle(backend, precision, bundle, device)
    report = bundle.parity(backend, precision)
    return "the bundle holds no parity report for it" if report is None else report.shortcoming


def _library_obstacle(backend: BackendName, precision: Precision, device: torch.device) -> str | None:
    problem = import_problem(backend)
    if problem is None and backend == "onnxruntime" and device.type == "cuda":
        providers = import_library(backend).get_available_providers()
        return None if "CUDAExecutionProvider" in providers else "the installed onnxruntime cannot use the GPU"
    if problem is None and precision == "bfloat16" and not has_bfloat16(device):
        return "this CPU has no bfloat16 instructions"
    return problem


def _engine_obstacle(
    library: EngineLibrary, precision: Precision, bundle: EncoderBundle, device: torch.device
) -> str | None:
    """An engine's features are those of a GPU, so that its own report counts, not one that the bundle could hold."""
    version = str(import_library(library).__version__)
    try:
        engine = engine_for_gpu(bundle, library, version, precision, torch.cuda.get_device_capability(device))
    except EngineError as error:
        return str(error)
    report = engine.description.parity
    if report is None:
        return (
            f"{engine.path.name} was not compared with PyTorch on this machine "
            f"(fseft-edge build-engines {bundle.path} --parity-ct CT)"
        )
    return report.shortcoming
