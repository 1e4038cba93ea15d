"""TensorRT-RTX and TensorRT: two libraries with one Python interface, but for a few names."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

from fseft_edge.runtime.encoder.engine_files import EngineLibrary
from fseft_edge.runtime.errors import MissingBackendError

LIBRARIES: tuple[EngineLibrary, ...] = ("tensorrt_rtx", "tensorrt")
"""The first is preferred: it needs no GPU to build, and adapts an engine to the GPU where it runs."""

_INSTALL: dict[EngineLibrary, str] = {
    "tensorrt_rtx": "Install it with `pip install 'fseft-edge[rtx]'`",
    "tensorrt": "Install it with `pip install 'fseft-edge[tensorrt]'`; where pip cannot fetch its libraries, take the "
    "wheel from NVIDIA's TensorRT archive",
}

_log = logging.getLogger(__name__)


def import_library(name: EngineLibrary) -> ModuleType:
    """Return the library.

    Raises:
        MissingBackendError: when it is not installed, or not for this machine.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # the library within the wheel is loaded by ctypes
        raise MissingBackendError(
            f"The backend {name} cannot be loaded: {error}.", remedy=f"{_INSTALL[name]}, or use --backend torch."
        ) from error


def fresh_logger(library: ModuleType) -> Any:  # noqa: ANN401 - its class exists once the library is imported
    """Return the logger for the library's objects, its ``errors`` emptied.

    It is the same one every time: the library goes on using the first logger that it was given, for its own messages,
    after the objects that it was given for are gone, and crashes where the logger is gone too.
    """
    logger = _logger(library)
    logger.errors.clear()
    return logger


@functools.cache
def _logger(library: ModuleType) -> Any:  # noqa: ANN401 - likewise
    interface: Any = library.ILogger

    class Collecting(interface):  # type: ignore[misc]  # the library comes without types
        """Passes messages on, and keeps errors."""

        def __init__(self) -> None:
            interface.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in (interface.INTERNAL_ERROR, interface.ERROR):
                self.errors.append(message)
            _log.debug("%s", message)

    return Collecting()


def last_error(logger: Any) -> str:  # noqa: ANN401 - made by fresh_logger
    """Return what the library said when something failed, on one line."""
    return " ".join(str(logger.errors[-1]).split()) if logger.errors else "it gave no reason"
