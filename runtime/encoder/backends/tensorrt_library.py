"""Import TensorRT-RTX and TensorRT, two libraries with nearly the same Python interface."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

from fseft_edge.runtime.encoder.engine_files import EngineLibrary
from fseft_edge.runtime.errors import MissingBackendError

LIBRARIES: tuple[EngineLibrary, ...] = ("tensorrt_rtx", "tensorrt")
"""TensorRT-RTX is preferred: it builds without a GPU, and adapts an engine to the GPU on which the engine runs."""

_INSTALL: dict[EngineLibrary, str] = {
    "tensorrt_rtx": "Install TensorRT-RTX with `pip install 'fseft-edge[rtx]'`",
    "tensorrt": "Install TensorRT with `pip install 'fseft-edge[tensorrt]'` (if pip cannot download its libraries, "
    "install the wheel from NVIDIA's TensorRT archive)",
}

_log = logging.getLogger(__name__)


def import_library(name: EngineLibrary) -> ModuleType:
    """Return the module of a library.

    Raises:
        MissingBackendError: the library is not installed, or cannot be loaded on this machine.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # the wheel loads its shared library with ctypes, which raises OSError
        raise MissingBackendError(
            f"The backend {name} cannot be loaded: {error}.", remedy=f"{_INSTALL[name]}, or use --backend torch."
        ) from error


def fresh_logger(library: ModuleType) -> Any:  # noqa: ANN401 - its class exists once the library is imported
    """Return the logger for the library's objects, with an empty list ``errors``.

    The function always returns the same logger: the library keeps using the first logger that it received, also after
    the objects of this logger are deleted, and crashes if this logger is deleted.
    """
    logger = _logger(library)
    logger.errors.clear()
    return logger


@functools.cache
def _logger(library: ModuleType) -> Any:  # noqa: ANN401 - its class exists once the library is imported
    interface: Any = library.ILogger

    class Collecting(interface):  # type: ignore[misc]  # the library comes without types
        """Logger that passes all messages on and collects errors."""

        def __init__(self) -> None:
            interface.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in (interface.INTERNAL_ERROR, interface.ERROR):
                self.errors.append(message)
            _log.debug("%s", message)

    return Collecting()


def last_error(logger: Any) -> str:  # noqa: ANN401 - the class of fresh_logger's result has no type
    """Return the last error message of the library, on one line."""
    return " ".join(str(logger.errors[-1]).split()) if logger.errors else "the library gave no reason"
