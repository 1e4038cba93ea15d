"""List the backends that can run an encoder on a device, fastest first, and the reasons why others cannot."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoder.engine_files import EngineLibrary, engine_for_gpu
from fseft_edge.runtime.encoder.networks import ARCHITECTURES, IMPORTED
from fseft_edge.runtime.encoder.remembered_speed import remembered_order
from fseft_edge.runtime.errors import EngineError
from fseft_edge.runtime.system.libraries import NOT_INSTALLED, import_library, import_problem, is_installed

BackendName = Literal["torch", "onnxruntime", "openvino", "tensorrt_rtx", "tensorrt"]

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)

NO_PARITY_REPORT: Final = "the bundle contains no parity report for this backend"
"""Obstacle of a backend that was not compared with PyTorch when the bundle was exported."""

# This table only orders the backends of an architecture; ARCHITECTURES lists the architectures that are known.
# Fastest first, measured with `benchmarks/encoder_backends.py`. In float32, PyTorch with oneDNN (channels last)
# computes a network of only convolutions as fast as OpenVINO, and needs two thirds of the memory. Attention is faster
# in engines that fuse operators, because fewer intermediate tensors are written to memory and read again.
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
_DEFAULT_ON_CPU = _ON_CPU["residual_unet"]
"""Order for architectures without an order in the table."""

# PyTorch computes a whole scan plane by plane, each voxel once. The other backends compute chunks of up to 192 planes,
# with up to 96 planes around each side, and take two to three times the memory of PyTorch. For a thorax, which is a
# single chunk, OpenVINO takes half the time of PyTorch in bfloat16 and as much time in float32; ONNX Runtime takes 1.6
# times as much.
_WHOLE_SCANS_ON_CPU: tuple[tuple[BackendName, Precision], ...] = (
    ("torch", "bfloat16"),
    ("torch", "float32"),
    ("openvino", "bfloat16"),
    ("openvino", "float32"),
    ("onnxruntime", "float32"),
)

# Not measured: the order follows from the engines' support of float16 and of fused operators.
_ON_CUDA: tuple[tuple[BackendName, Precision], ...] = (
    ("tensorrt_rtx", "mixed"),
    ("tensorrt", "mixed"),
    ("torch", "mixed"),
    ("tensorrt_rtx", "float32"),
    ("tensorrt", "float32"),
    ("torch", "float32"),
    ("onnxruntime", "float32"),
)

_NO_NETWORK = "the bundle contains only an ONNX graph, because the encoder's network is your own code"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackendChoice:
    """A backend and precision for an encoder.

    Attributes:
        backend: name of the backend.
        precision: precision of the computation.
        obstacle: reason why ``auto`` does not use this choice, or None.
        suits_device: whether the backend can compute on this type of device.
    """

    backend: BackendName
    precision: Precision
    obstacle: str | None
    suits_device: bool = True

    @property
    def usable(self) -> bool:
        """Whether ``auto`` may use this choice."""
        return self.obstacle is None


def backend_choices(
    bundle: EncoderBundle, device: torch.device, backend: str = "auto", precision: str = "auto"
) -> Iterator[BackendChoice]:
    """Yield backends and precisions for an encoder, in the order of preference of ``auto``.

    ``auto`` uses the first usable choice. The function imports a backend's library to check that the library works,
    but only when it yields this backend.

    Args:
        bundle: encoder bundle.
        device: device of the computation.
        backend: yield only choices with this backend; ``auto`` means all backends.
        precision: yield only choices with this precision; ``auto`` means all precisions.
    """

    def wanted(pair: tuple[BackendName, Precision]) -> bool:
        return backend in ("auto", pair[0]) and precision in ("auto", pair[1])

    order = _order(bundle, device)
    for pair in filter(wanted, order):
        yield BackendChoice(*pair, _obstacle(*pair, bundle, device))
    never = f"does not compute on a {'CPU' if device.type == 'cpu' else 'GPU'}"
    for name in BACKENDS:
        if name not in {computes for computes, _ in order} and wanted((name, "float32")):
            yield BackendChoice(name, "float32", never, suits_device=False)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16; without them, bfloat16 is slow or not supported."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16", False))


def _order(bundle: EncoderBundle, device: torch.device) -> list[tuple[BackendName, Precision]]:
    """Return backends and precisions for a device, fastest first.

    The order is that of the speeds measured on this machine, else that of the tables above.
    """
    on_cpu = _ON_CPU.get(bundle.manifest.architecture, _DEFAULT_ON_CPU)
    if bundle.whole_scan is not None:
        on_cpu = _WHOLE_SCANS_ON_CPU
    order = list(on_cpu if device.type == "cpu" else _ON_CUDA)
    remembered = remembered_order(bundle, device)
    if remembered is None:
        return order
    measured = [pair for pair in remembered if pair in order]
    _log.info("order of backends by their measured speed on this machine: %s", ", ".join(map(" ".join, measured)))
    ranked = sorted((pair for pair in order if pair in measured), key=measured.index)
    return ranked + [pair for pair in order if pair not in measured]


def _obstacle(backend: BackendName, precision: Precision, bundle: EncoderBundle, device: torch.device) -> str | None:
    if bundle.manifest.architecture not in ARCHITECTURES:
        return "this version of fseft-edge does not know the encoder's architecture"
    if backend == "torch" and (bundle.graph_only or precision == "float32"):
        return _NO_NETWORK if bundle.graph_only else None
    if backend != "torch" and bundle.graph_in(precision) is None:
        return "the bundle was exported without an ONNX graph in this precision"
    if backend in ("tensorrt_rtx", "tensorrt"):
        return import_problem(backend) or _engine_obstacle(backend, precision, bundle, device)
    return _graph_obstacle(backend, precision, bundle, device)


def _graph_obstacle(
    backend: BackendName, precision: Precision, bundle: EncoderBundle, device: torch.device
) -> str | None:
    """Return the reason why ``auto`` does not use a backend that reads the graph, or PyTorch in mixed precision.

    The library is imported last, because the import takes time.
    """
    if not is_installed(backend):
        return NOT_INSTALLED
    if precision == "bfloat16" and not has_bfloat16(device):
        return "this CPU has no bfloat16 instructions"
    report = bundle.parity(backend, precision)
    if report is not None and report.shortcoming is not None:
        return report.shortcoming
    problem = import_problem(backend)
    if problem is None and backend == "onnxruntime" and device.type == "cuda":
        providers = import_library(backend).get_available_providers()
        problem = None if "CUDAExecutionProvider" in providers else "the installed ONNX Runtime does not support GPUs"
    return problem or (NO_PARITY_REPORT if report is None else None)


def _engine_obstacle(
    library: EngineLibrary, precision: Precision, bundle: EncoderBundle, device: torch.device
) -> str | None:
    """Return the reason why ``auto`` does not use an engine, or None.

    The parity report is read from the engine's file and not from the bundle, because features of an engine depend on
    the GPU.
    """
    version = str(import_library(library).__version__)
    try:
        engine = engine_for_gpu(bundle, library, version, precision, torch.cuda.get_device_capability(device))
    except EngineError as error:
        return str(error)
    report = engine.description.parity
    if report is None:
        return (
            f"{engine.path.name} was not compared with PyTorch on this machine: "
            f"run fseft-edge build-engines {bundle.path} --parity-ct CT"
        )
    return report.shortcoming
