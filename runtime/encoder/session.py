"""Open an encoder session: choose the backend, the device and the precision that compute the features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from fseft_edge.runtime.encoder.backend_choice import BackendChoice, BackendName, backend_choices
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.errors import EnvironmentProblemError, UsageError
from fseft_edge.runtime.system.threads import limit_threads

_log = logging.getLogger(__name__)


def open_session(
    bundle: EncoderBundle,
    device: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    precision: Precision | Literal["auto"] = "auto",
) -> EncoderSession:
    """Return an open session for an encoder. This function does not build or convert anything.

    Args:
        bundle: encoder bundle.
        device: ``auto`` (the first NVIDIA GPU that PyTorch finds, else the CPU), ``cpu``, ``cuda`` or ``cuda:n``.
        backend: ``torch``, ``onnxruntime``, ``openvino``, ``tensorrt_rtx``, ``tensorrt``, or ``auto``. ``auto`` uses
            the fastest backend that is installed, runs on the device and passes the bundle's parity gate. Skipped
            backends are logged with a reason; a backend that cannot be opened is also skipped.
        threads: number of CPU threads of the engine; ``None`` means the number that PyTorch uses.
        precision: ``auto`` (the fastest precision that passes the parity gate, else float32), or one precision. A named
            precision is always used; a warning is logged if it did not pass the parity gate.

    Raises:
        UsageError: device, backend or precision is unknown, or the backend does not compute in the precision.
        EnvironmentProblemError: the device does not exist.
        MissingBackendError: the backend is not installed or does not run on the device.
        EncoderBundleError: the bundle does not contain the files that the backend needs.
        EngineError: the backend has no engine that this GPU can use.
    """
    target = resolve_device(device)
    if backend != "auto" and backend not in _OPENERS:
        raise UsageError(f"The backend {backend!r} is unknown.", remedy=f"Choose one of auto, {', '.join(_OPENERS)}.")
    refused: list[BackendChoice] = []
    for choice in backend_choices(bundle, target, backend, precision):
        if not choice.usable:
            _log.info("backend %s in %s skipped: %s", choice.backend, choice.precision, choice.obstacle)
            refused.append(choice)
            continue
        try:
            return _opened(choice, bundle, target, threads)
        except EnvironmentProblemError as error:
            if backend != "auto" or choice.backend == "torch":
                raise
            _log.warning("backend %s in %s skipped: %s", choice.backend, choice.precision, error)
    return _opened(_last_resort(refused, backend, precision), bundle, target, threads)


def _opened(choice: BackendChoice, bundle: EncoderBundle, device: torch.device, threads: int | None) -> EncoderSession:
    session = _OPENERS[choice.backend](bundle, device, threads or torch.get_num_threads(), choice.precision)
    session.keep_arithmetic()
    _log.info("encoding with %s in %s on %s", session.backend, session.precision, session.device)
    return session


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends of this version."""
    return tuple(_OPENERS)


def resolve_device(name: str) -> torch.device:
    """Return the device for a name given by the user, after checking that the device exists.

    Every computation begins here, so the number of threads is limited here
    (:func:`fseft_edge.runtime.system.threads.limit_threads`).

    Raises:
        UsageError: the name is unknown.
        EnvironmentProblemError: the device does not exist.
    """
    limit_threads()
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (number and not number.isdecimal()) or name.endswith(":")):
        raise UsageError(f"The device {name!r} is unknown.", remedy="Choose one of auto, cpu, cuda or cuda:n.")
    if name == "cpu":
        return torch.device("cpu")
    index, count = int(number or 0), torch.cuda.device_count()
    if index >= count:
        raise EnvironmentProblemError(
            f"The device {name} does not exist: PyTorch finds {count} NVIDIA GPUs.",
            remedy="Check the NVIDIA driver and that PyTorch was built for CUDA, or use --device cpu.",
        )
    return torch.device("cuda", index)


def _last_resort(refused: Sequence[BackendChoice], backend: str, precision: str) -> BackendChoice:
    """Return the choice to try if all choices have an obstacle: the requested backend and precision, else float32.

    If the session cannot be opened, opening raises an error with the reason.

    Raises:
        UsageError: no choice can compute on this type of device.
    """
    fitting = [choice for choice in refused if choice.suits_device]
    if not fitting:
        subject = "No backend can compute" if backend == "auto" else f"The backend {backend} cannot compute"
        in_precision = "" if precision == "auto" else f" in {precision}"
        raise UsageError(
            f"{subject}{in_precision} on this device.",
            remedy="Leave out --backend and --precision; `fseft-edge doctor` lists the backends that can be used.",
        )
    if precision == "auto":
        exact = "torch" if backend == "auto" else backend
        fitting = [choice for choice in fitting if (choice.backend, choice.precision) == (exact, "float32")] or fitting
    elif precision != "float32":
        _log.warning("%s in %s is used as requested, although %s", fitting[0].backend, precision, fitting[0].obstacle)
    return fitting[0]


def _open_torch(bundle: EncoderBundle, device: torch.device, threads: int, precision: Precision) -> EncoderSession:
    from fseft_edge.runtime.encoder.backends.pytorch import TorchSession  # noqa: PLC0415 - loaded on use

    return TorchSession(bundle, device, threads, precision)


def _open_onnxruntime(bundle: EncoderBundle, device: torch.device, threads: int, _: Precision) -> EncoderSession:
    from fseft_edge.runtime.encoder.backends.onnxruntime import OnnxRuntimeSession  # noqa: PLC0415 - loaded on use

    return OnnxRuntimeSession(bundle, device, threads)


def _open_openvino(bundle: EncoderBundle, device: torch.device, threads: int, precision: Precision) -> EncoderSession:
    from fseft_edge.runtime.encoder.backends.openvino import OpenVinoSession  # noqa: PLC0415 - loaded on use

    return OpenVinoSession(bundle, device, threads, precision)


def _open_tensorrt_rtx(bundle: EncoderBundle, device: torch.device, _: int, precision: Precision) -> EncoderSession:
    from fseft_edge.runtime.encoder.backends.tensorrt import TensorRtRtxSession  # noqa: PLC0415 - loaded on use

    return TensorRtRtxSession(bundle, device, precision)


def _open_tensorrt(bundle: EncoderBundle, device: torch.device, _: int, precision: Precision) -> EncoderSession:
    from fseft_edge.runtime.encoder.backends.tensorrt import TensorRtSession  # noqa: PLC0415 - loaded on use

    return TensorRtSession(bundle, device, precision)


_OPENERS: dict[BackendName, Callable[[EncoderBundle, torch.device, int, Precision], EncoderSession]] = {
    "torch": _open_torch,
    "onnxruntime": _open_onnxruntime,
    "openvino": _open_openvino,
    "tensorrt_rtx": _open_tensorrt_rtx,
    "tensorrt": _open_tensorrt,
}
