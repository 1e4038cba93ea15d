"""EncoderSession: CT windows in, feature pyramids out, whatever engine computes them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from types import TracebackType
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from fseft_edge.runtime.bundle import EncoderBundle
from fseft_edge.runtime.errors import EnvironmentProblemError, UsageError
from fseft_edge.runtime.memory import resident_bytes
from fseft_edge.runtime.networks.base import FeatureLevel

_log = logging.getLogger(__name__)


class EncoderSession(ABC):
    """An encoder that is loaded and ready. A context manager; closing it frees what the engine holds.

    Attributes:
        backend: the engine's name.
        device: where features are returned.
        max_batch: windows that are encoded at once.
        precision: number format of the computation.
        window: ``[X, Y, Z]`` voxels of a window.
        levels: the feature pyramid, finest first.
    """

    backend: ClassVar[str]

    def __init__(self, bundle: EncoderBundle, device: torch.device, max_batch: int) -> None:
        self.device = device
        self.max_batch = max_batch
        self.precision: Literal["float32"] = bundle.manifest.precision
        self.window: tuple[int, int, int] = bundle.window
        self.levels: tuple[FeatureLevel, ...] = bundle.levels
        self._open = True

    @cached_property
    def held_before(self) -> int:
        """Bytes that the process held when this was first asked for: plans ask before the first window.

        Engines and allocators keep memory of earlier windows and use it again, so later it would count twice.
        """
        return resident_bytes()

    def encode(self, windows: Tensor) -> list[Tensor]:
        """Return the feature pyramid of any number of windows.

        Args:
            windows: float32 ``[n, 1, X, Y, Z]`` on any device, n at least 1, scaled to 0..1 by the grid.

        Returns:
            Per level, finest first, float32 ``[n, C_l, X / s_l, Y / s_l, Z / s_l]`` on the session's device; any memory
            order.

        Raises:
            ValueError: when the windows have another shape or type.
            RuntimeError: when the session is closed.
        """
        if not self._open:
            raise RuntimeError("the encoder session is closed")
        if windows.shape[0] == 0 or windows.shape[1:] != (1, *self.window) or windows.dtype != torch.float32:
            expected = ["n", 1, *self.window]
            raise ValueError(f"windows are {windows.dtype} {list(windows.shape)}, not torch.float32 {expected}")
        with torch.no_grad():
            batches = [self._encode_batch(batch) for batch in windows.split(self.max_batch)]
            return batches[0] if len(batches) == 1 else [torch.cat(level) for level in zip(*batches, strict=True)]

    @abstractmethod
    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        """Return the pyramid of at most ``max_batch`` windows."""

    def close(self) -> None:
        """Free the engine; the session cannot be used any more."""
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_session(
    bundle: EncoderBundle, device: str = "auto", backend: str = "auto", threads: int | None = None
) -> EncoderSession:
    """Return a session for an encoder; nothing is built or converted here.

    Args:
        bundle: the encoder.
        device: ``auto`` (the first NVIDIA GPU that PyTorch sees, else the CPU), ``cpu``, ``cuda`` or ``cuda:n``.
        backend: ``auto`` (the fastest that is installed, runs on the device and passes the bundle's parity gate; why
            others were passed over is logged), ``torch`` or ``onnxruntime``.
        threads: CPU threads of the engine; ``None`` leaves it the number that PyTorch uses.

    Raises:
        UsageError: when device or backend is unknown.
        EnvironmentProblemError: when the device is not there.
        MissingBackendError: when the backend is not installed or does not run on the device.
        EncoderBundleError: when the bundle lacks what the backend needs.
    """
    target = _resolve_device(device)
    if backend == "auto":
        backend = _choose_backend(bundle, target)
    if backend not in _BACKENDS:
        raise UsageError(f"The backend {backend!r} is unknown.", remedy=f"Choose auto, {', '.join(_BACKENDS)}.")
    session = _BACKENDS[backend](bundle, target, threads or torch.get_num_threads())
    _log.info("encoding with %s on %s", session.backend, session.device)
    return session


def _resolve_device(name: str) -> torch.device:
    """Return the device that a user's word means, checked to be there."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (number and not number.isdecimal()) or name.endswith(":")):
        raise UsageError(f"The device {name!r} is unknown.", remedy="Choose auto, cpu, cuda or cuda:n.")
    if name == "cpu":
        return torch.device("cpu")
    index, count = int(number or 0), torch.cuda.device_count()
    if index >= count:
        raise EnvironmentProblemError(
            f"The device {name} was asked for, but PyTorch sees {count} NVIDIA GPUs.",
            remedy="Check the driver and that PyTorch was built for CUDA, or use --device cpu.",
        )
    return torch.device("cuda", index)


def _choose_backend(bundle: EncoderBundle, device: torch.device) -> str:
    """Return the fastest backend that can be used, by what ``benchmarks/encoder_backends.py`` measures."""
    on_cpu = device.type == "cpu"
    for name in _FASTEST_ON_CPU.get(bundle.manifest.architecture, ()) if on_cpu else _FASTEST_ON_CUDA:
        reason = _passed_over(name, bundle)
        if reason is None:
            return name
        _log.info("backend %s passed over: %s", name, reason)
    return "torch"


def _passed_over(name: str, bundle: EncoderBundle) -> str | None:
    """Return why ``auto`` does not take a backend, or ``None`` when it may."""
    if name == "torch":
        return None
    if bundle.graph is None:
        return "the bundle was exported without an ONNX graph"
    if find_spec(name) is None:
        return "not installed"
    report = bundle.manifest.parity.get(name)
    if report is None:
        return "the bundle holds no parity report for it"
    if not report.passed:
        return f"relative error {max(report.relative_error):.1e} exceeds the gate {report.gate:.0e}"
    return None


def _open_torch(bundle: EncoderBundle, device: torch.device, threads: int) -> EncoderSession:
    from fseft_edge.runtime.backends.pytorch import TorchSession  # noqa: PLC0415 - backends import this module

    return TorchSession(bundle, device, threads)


def _open_onnxruntime(bundle: EncoderBundle, device: torch.device, threads: int) -> EncoderSession:
    from fseft_edge.runtime.backends.onnxruntime import OnnxRuntimeSession  # noqa: PLC0415 - likewise

    return OnnxRuntimeSession(bundle, device, threads)


# On a CPU, convolutions alone run fastest in PyTorch with oneDNN (channels last), attention in ONNX Runtime, which
# fuses what PyTorch writes to memory and reads again.
_FASTEST_ON_CPU = {"residual_unet": ("torch", "onnxruntime"), "swin_unetr": ("onnxruntime", "torch")}
_FASTEST_ON_CUDA = ("torch", "onnxruntime")

_BACKENDS: dict[str, Callable[[EncoderBundle, torch.device, int], EncoderSession]] = {
    "torch": _open_torch,
    "onnxruntime": _open_onnxruntime,
}
