"""The libraries that backends compute with: installed or not, working or broken, which version, what they offer."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Final, Literal

WHEELS: Final[dict[str, tuple[str, ...]]] = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
}
"""By module, the distributions that may hold it."""

NOT_INSTALLED: Final = "not installed"

_TELEMETRY: Final = "openvino_telemetry"


@dataclass(frozen=True)
class Library:
    """A library, asked.

    Attributes:
        module: name that it is imported by.
        wheels: the installed distributions that hold it; two that overwrite one another are a mistake.
        version: of the first of them, or what the module says.
        state: whether it is there and can be imported.
        problem: why not.
        offers: what it can do here, e.g. its execution providers.
    """

    module: str
    wheels: tuple[str, ...]
    version: str | None
    state: Literal["ready", "missing", "broken"]
    problem: str | None = None
    offers: tuple[str, ...] = ()


def import_library(module: str) -> ModuleType:
    """Return a library, imported; onnxruntime and openvino without the telemetry that they would set up.

    Since 1.29, ONNX Runtime reports its use over the network unless it is told not to before it is imported; it
    decides once for the process. OpenVINO's conversion tools report through a package of their own.
    """
    if module == "onnxruntime":
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    if module != "openvino" or module in sys.modules or _TELEMETRY in sys.modules:
        return import_module(module)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # marks it as not there: a stub that sends nothing serves
    try:
        return import_module(module)
    finally:
        del sys.modules[_TELEMETRY]


@functools.cache
def openvino_core() -> Any:  # noqa: ANN401 - of a library that may not be there
    """Return the process's one OpenVINO, which stays until the process ends.

    Each gives the thread a stack for signals of its own and, when it goes, the stack that was there before. Of two that
    go in the order they came, the second gives back the first one's, which is freed: the next signal, such as Ctrl-C,
    then ends the process in a segmentation fault (OpenVINO 2026.4).
    """
    return import_library("openvino").Core()


def import_problem(module: str) -> str | None:
    """Return why a module cannot be used, or ``None`` when it can; it is imported to find out.

    ``auto`` asks this before it takes a backend, so that a broken library costs speed and not the work.
    """
    try:
        if find_spec(module) is None:
            return NOT_INSTALLED
    except (ImportError, ValueError):  # ValueError: a module in memory without a specification, which is no library
        return NOT_INSTALLED
    try:
        import_library(module)
    except Exception as error:  # a broken library fails in any way
        return f"broken: {_first_line(error)}"
    return None


def library(module: str) -> Library:
    """Return what can be said of a library."""
    installed = {wheel: number for wheel in WHEELS[module] if (number := _version(wheel))}
    number = next(iter(installed.values()), None)
    problem = import_problem(module)
    if problem is not None:
        state: Literal["missing", "broken"] = "missing" if problem == NOT_INSTALLED else "broken"
        return Library(module, tuple(installed), number, state, problem.removeprefix("broken: "))
    try:
        imported = import_library(module)
        offers = tuple(_OFFERS[module](imported)) if module in _OFFERS else ()
    except Exception as error:  # likewise
        return Library(module, tuple(installed), number, "broken", _first_line(error))
    return Library(module, tuple(installed), number or getattr(imported, "__version__", None), "ready", None, offers)


def installed_versions() -> dict[str, str]:
    """Return the version of everything that a backend's speed depends on, by distribution; nothing is imported."""
    names = ("fseft-edge", *(wheel for wheels in WHEELS.values() for wheel in wheels))
    return {name: number for name in names if (number := _version(name))}


def cuda_problem() -> str | None:
    """Return why PyTorch cannot use an NVIDIA GPU, or ``None`` when it can."""
    problem = import_problem("torch")
    if problem is not None:
        return f"PyTorch is {problem}"
    torch: Any = import_module("torch")
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # drivers fail in many ways
        return f"PyTorch ({torch.__version__}) cannot start CUDA: {_first_line(error)}"
    return None if torch.cuda.device_count() else "PyTorch sees no GPU"


def _torch_offers(torch: Any) -> list[str]:  # noqa: ANN401 - a library
    return [f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"]


def _onnxruntime_offers(onnxruntime: Any) -> list[str]:  # noqa: ANN401 - likewise
    return [str(provider) for provider in onnxruntime.get_available_providers()]


def _openvino_offers(_: Any) -> list[str]:  # noqa: ANN401 - likewise
    capabilities = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["bfloat16 on this CPU" if "BF16" in capabilities else "no bfloat16 on this CPU"]


_OFFERS: dict[str, Callable[[Any], list[str]]] = {
    "torch": _torch_offers,
    "onnxruntime": _onnxruntime_offers,
    "openvino": _openvino_offers,
}


def _version(wheel: str) -> str | None:
    try:
        return version(wheel)
    except PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    """Return an error's message without the pages that some libraries add."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
