"""State of the libraries of the inference backends: installed, working, version, and capabilities on this machine."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
"""For each module, the names of the distributions that can contain it."""

NOT_INSTALLED: Final = "not installed"

BUILT_WITHOUT_CUDA: Final = "was built without CUDA"
"""End of the reason of :func:`cuda_problem` if the installed PyTorch is a build for CPUs."""

_TELEMETRY: Final = "openvino_telemetry"


@dataclass(frozen=True)
class Library:
    """State of one library on this machine.

    Attributes:
        module: import name of the library.
        wheels: installed distributions that contain the module. More than one is an installation error, because their
            files overwrite one another.
        version: version of the first distribution, or the ``__version__`` of the module.
        state: ``ready`` if the library can be imported, else ``missing`` or ``broken``.
        problem: reason why the library is not ready; None if the library is ready.
        offers: capabilities of the library on this machine, for example its execution providers.
    """

    module: str
    wheels: tuple[str, ...]
    version: str | None
    state: Literal["ready", "missing", "broken"]
    problem: str | None = None
    offers: tuple[str, ...] = ()


def import_library(module: str) -> ModuleType:
    """Import a library and return the module. The telemetry of onnxruntime and openvino is switched off.

    Since version 1.29, ONNX Runtime reports its use over the network unless an environment variable is set before the
    first import in a process. The conversion tools of OpenVINO report through the separate package
    ``openvino_telemetry``.
    """
    if module == "onnxruntime":
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    if module != "openvino" or module in sys.modules:
        return import_module(module)
    with without(_TELEMETRY):  # OpenVINO uses a stub
        return import_module(module)


@contextmanager
def without(module: str) -> Iterator[None]:
    """Hide a module in the body of the ``with`` statement, so that a library that can do without it does not load it.

    A module that is already loaded stays visible.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # the import of such a module fails
    try:
        yield
    finally:
        del sys.modules[module]


@contextmanager
def deferred(module: str) -> Iterator[None]:
    """Put a stand-in in the place of a module in the body of the ``with`` statement.

    A library that is imported in the body gets the stand-in, and loads the module when it reads one of its attributes.
    Later imports load the module itself. A module that is already loaded is left as it is.
    """
    if module in sys.modules:
        yield
        return
    stand_in = sys.modules[module] = _StandIn(module)
    try:
        yield
    finally:
        if sys.modules.get(module) is stand_in:
            del sys.modules[module]


class _StandIn(ModuleType):
    """A module whose attributes are those of the module of the same name, which is loaded at the first of them."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of any module
        if name.startswith("__"):  # asked of every loaded module, for example by `inspect`
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


@functools.cache
def openvino_core() -> Any:  # noqa: ANN401 - the type belongs to an optional library
    """Return the only OpenVINO ``Core`` of this process. The object exists until the process ends.

    Each ``Core`` installs a new signal stack for the thread and restores the previous stack when the ``Core`` is
    deleted. If two cores are deleted in the order of their creation, the second restores the stack of the first, which
    is already freed. The next signal, such as Ctrl-C, then causes a segmentation fault (OpenVINO 2026.4).
    """
    return import_library("openvino").Core()


def is_installed(module: str) -> bool:
    """Return whether a module can be found. Nothing is imported, so the module may still be broken."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: a module in memory has no import specification
        return False


def import_problem(module: str) -> str | None:
    """Return the reason why a module cannot be used, or None if it can. This function imports the module.

    The backend choice ``auto`` calls this function first, so that it skips a broken library and uses a slower backend.
    """
    if not is_installed(module):
        return NOT_INSTALLED
    try:
        import_library(module)
    except Exception as error:  # the import of a broken library can raise any exception
        return f"broken: {_first_line(error)}"
    return None


def library(module: str) -> Library:
    """Return the state of a library."""
    installed = {wheel: number for wheel in WHEELS[module] if (number := _version(wheel))}
    number = next(iter(installed.values()), None)
    problem = import_problem(module)
    if problem is not None:
        state: Literal["missing", "broken"] = "missing" if problem == NOT_INSTALLED else "broken"
        return Library(module, tuple(installed), number, state, problem.removeprefix("broken: "))
    try:
        imported = import_library(module)
        offers = tuple(_OFFERS[module](imported)) if module in _OFFERS else ()
    except Exception as error:  # a broken library can raise any exception
        return Library(module, tuple(installed), number, "broken", _first_line(error))
    return Library(module, tuple(installed), number or getattr(imported, "__version__", None), "ready", None, offers)


def installed_versions() -> dict[str, str]:
    """Return the version of each installed distribution that affects the speed of a backend. Nothing is imported."""
    names = ("fseft-edge", *(wheel for wheels in WHEELS.values() for wheel in wheels))
    return {name: number for name in names if (number := _version(name))}


def cuda_problem() -> str | None:
    """Return the reason why PyTorch cannot use an NVIDIA GPU, or None if it can."""
    problem = import_problem("torch")
    if problem is not None:
        return f"PyTorch is {problem}"
    torch: Any = import_module("torch")
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) {BUILT_WITHOUT_CUDA}"
    try:
        torch.cuda.init()
    except Exception as error:  # PyTorch raises several kinds of exception
        return f"PyTorch ({torch.__version__}) cannot start CUDA: {_first_line(error)}"
    return None if torch.cuda.device_count() else "PyTorch finds no GPU"


def _torch_offers(torch: Any) -> list[str]:  # noqa: ANN401 - the argument is a module
    return [f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"]


def _onnxruntime_offers(onnxruntime: Any) -> list[str]:  # noqa: ANN401 - the argument is a module
    return [str(provider) for provider in onnxruntime.get_available_providers()]


def _openvino_offers(_: Any) -> list[str]:  # noqa: ANN401 - the argument is a module
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
    """Return the first line of an error message, because some libraries add long explanations."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
