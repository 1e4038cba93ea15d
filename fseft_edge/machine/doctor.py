"""Diagnosis of what this machine can run and what to install: the Python function behind ``fseft-edge doctor``.

:func:`fseft_edge.runtime.encoder.backend_choice.backend_choices` decides which backend can be used, here and for
``auto``. PyTorch is imported inside functions, because it may be the broken library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fseft_edge._version import __version__
from fseft_edge.runtime.errors import EncoderBundleError
from fseft_edge.runtime.system.libraries import (
    BUILT_WITHOUT_CUDA,
    NOT_INSTALLED,
    WHEELS,
    Library,
    cuda_problem,
    import_problem,
    library,
)
from fseft_edge.runtime.system.machine import Machine, this_machine

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.backend_choice import BackendChoice

SCHEMA_VERSION: Final = 1

_EXTRAS: Final = {"tensorrt_rtx": "rtx"}
_CPU_EXTRA = "pip install 'fseft-edge[cpu]'"
_GPU_EXTRA = "pip install 'fseft-edge[gpu]'"
_REPLACE_TORCH = "pip uninstall torch; pip install torch"
_CUDA_TORCH = f"{_REPLACE_TORCH}  (from a package index that has the CUDA build, see docs/install.md)"


@dataclass(frozen=True)
class BackendOnDevice:
    """Whether a backend can run an encoder on a device.

    Attributes:
        backend: name of the backend.
        device: ``cpu`` or ``cuda:n``.
        precision: number format of the computation.
        reason: reason why the backend cannot be used; None if it can be used.
        chosen: whether ``auto`` uses this backend on this device.
        remedy: step that makes the backend usable; None if there is no such step.
    """

    backend: str
    device: str
    precision: str
    reason: str | None
    chosen: bool
    remedy: str | None


@dataclass(frozen=True)
class EncoderDiagnosis:
    """An encoder bundle and the backends on each device; without a usable PyTorch there is no diagnosis of encoders."""

    path: str
    name: str
    encoder_id: str
    tiling: str
    backends: tuple[BackendOnDevice, ...]


@dataclass(frozen=True)
class Advice:
    """A problem of this machine, and the command or step that solves it."""

    problem: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """Diagnosis of this machine.

    Attributes:
        version: version of fseft-edge.
        machine: hardware and operating system.
        libraries: libraries of the backends.
        cuda_problem: reason why PyTorch cannot use an NVIDIA GPU; None if it can.
        encoders: diagnosis of each given bundle.
        advice: what to install or repair.
    """

    version: str
    machine: Machine
    libraries: tuple[Library, ...]
    cuda_problem: str | None
    encoders: tuple[EncoderDiagnosis, ...]
    advice: tuple[Advice, ...]

    def as_dict(self) -> dict[str, object]:
        """Return all fields and the schema version, ready for JSON."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def diagnose(encoders: Sequence[str | Path] = ()) -> Diagnosis:
    """Return what this machine can run, and what to install.

    Args:
        encoders: encoder bundles for which the usable backends are listed.

    Raises:
        EncoderBundleError: an encoder bundle cannot be read.
    """
    machine = this_machine()
    libraries = tuple(library(module) for module in WHEELS)
    cuda = cuda_problem()
    by_module = {found.module: found for found in libraries}
    usable_torch = by_module["torch"].state == "ready"
    diagnosed = tuple(_encoder(Path(path), machine) for path in encoders) if usable_torch else ()
    advice = tuple(_advice(machine, by_module, cuda))
    return Diagnosis(__version__, machine, libraries, cuda, diagnosed, advice)


def _encoder(path: Path, machine: Machine) -> EncoderDiagnosis:
    import torch  # noqa: PLC0415 - may be broken; the caller has checked it

    from fseft_edge.export.built_in import open_encoder  # noqa: PLC0415 - imports torch
    from fseft_edge.runtime.encoder.backend_choice import backend_choices  # noqa: PLC0415 - imports torch

    try:
        bundle = open_encoder(path)
    except OSError as error:
        raise EncoderBundleError(
            f"The encoder bundle {path} cannot be read: {error}.",
            remedy="Check the permissions of the folder and its disk.",
        ) from error
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    rows = []
    for device in devices:
        choices = list(backend_choices(bundle, device))
        first = next((choice for choice in choices if choice.usable), None)
        rows += [
            BackendOnDevice(
                choice.backend,
                str(device),
                choice.precision,
                choice.obstacle,
                choice == first,
                _choice_remedy(choice, bundle.graph is not None, machine),
            )
            for choice in choices
        ]
    return EncoderDiagnosis(str(path), bundle.manifest.name, bundle.encoder_id, bundle.tiling, tuple(rows))


def _choice_remedy(choice: BackendChoice, has_graph: bool, machine: Machine) -> str | None:
    """Return the step that makes a backend usable; None if it is usable, or if no step helps on this device."""
    from fseft_edge.runtime.encoder.backend_choice import NO_PARITY_REPORT  # noqa: PLC0415 - imports torch

    if choice.usable:
        return None
    problem = import_problem(_module(choice.backend))
    if problem is not None:
        return _install(_module(choice.backend), machine)
    if not has_graph:
        return "Export the encoder again with its ONNX graph."
    if choice.obstacle == NO_PARITY_REPORT:
        return f"Export the encoder again on a machine on which {choice.backend} is installed."
    return None


def _advice(machine: Machine, libraries: dict[str, Library], cuda: str | None) -> Iterator[Advice]:
    torch = libraries["torch"]
    if torch.state != "ready":
        yield Advice(f"PyTorch is {_state(torch)}, so no backend can be used.", _REPLACE_TORCH)
    if cuda is not None and torch.state == "ready" and (machine.driver or machine.gpus):
        driver = f"The NVIDIA driver {machine.driver} is loaded" if machine.driver else "This machine has an NVIDIA GPU"
        yield Advice(
            f"{driver}, but {cuda}.",
            _CUDA_TORCH
            if cuda.endswith(BUILT_WITHOUT_CUDA)
            else "Update the driver, or install a version of PyTorch that supports this driver.",
        )
    if torch.state == "ready":
        yield from _backend_advice(machine, libraries)


def _backend_advice(machine: Machine, libraries: dict[str, Library]) -> Iterator[Advice]:
    """Yield the problems of the libraries of all backends of this version."""
    from fseft_edge.runtime.encoder.session import backend_names  # noqa: PLC0415 - imports torch

    gpu = bool(machine.gpus or machine.driver)
    runtime = libraries["onnxruntime"]
    if len(runtime.wheels) > 1:
        yield Advice(
            f"{' and '.join(runtime.wheels)} are both installed, and each overwrites files of the other.",
            f"pip uninstall {' '.join(runtime.wheels)}; {_install('onnxruntime', machine)}",
        )
    elif gpu and runtime.state == "ready" and "CUDAExecutionProvider" not in runtime.offers:
        yield Advice("The installed onnxruntime cannot use the NVIDIA GPU.", f"pip uninstall onnxruntime; {_GPU_EXTRA}")
    for name in backend_names():
        found = libraries.get(_module(name))
        if found is None or found.module == "torch" or found.state == "ready":
            continue
        if found.module.startswith("tensorrt") and not gpu:
            continue
        what = "cannot be imported" if found.state == "broken" else "is not installed"
        why = f" ({found.problem})" if found.state == "broken" else ""
        yield Advice(f"The backend {name} {what}{why}.", _install(found.module, machine))


def _install(module: str, machine: Machine) -> str:
    """Return the command that installs the library of a backend."""
    if module == "onnxruntime":
        return _GPU_EXTRA if machine.gpus or machine.driver else _CPU_EXTRA
    return f"pip install 'fseft-edge[{_EXTRAS.get(module, module)}]'"


def _module(backend: str) -> str:
    return backend.replace("-", "_")


def _state(found: Library) -> str:
    return NOT_INSTALLED if found.state == "missing" else f"broken ({found.problem})"
