"""Backends tensorrt_rtx and tensorrt: run an existing engine on an NVIDIA GPU.

Windows and features stay on the GPU: PyTorch's tensors are the buffers of the engine. This code has not been run on a
GPU yet.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.backends.tensorrt_library import fresh_logger, import_library, last_error
from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoder.engine_files import EngineFile, EngineLibrary, engine_for_gpu
from fseft_edge.runtime.errors import EngineError, OutOfSpaceError
from fseft_edge.runtime.system.atomic import atomic_path

_log = logging.getLogger(__name__)


class _EngineSession(EncoderSession):
    """Session that computes features with an engine of TensorRT-RTX or TensorRT."""

    library: ClassVar[EngineLibrary]

    def __init__(self, bundle: EncoderBundle, device: torch.device, precision: Precision) -> None:
        library = import_library(self.library)
        capability = torch.cuda.get_device_capability(device)
        engine = engine_for_gpu(bundle, self.library, str(library.__version__), precision, capability)
        super().__init__(bundle, device, engine.description.max_batch, precision)
        self._runner: EngineRunner | None = EngineRunner(library, engine, device)

    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        assert self._runner is not None  # noqa: S101 - encode() refuses a closed session
        return self._runner(windows)

    def close(self) -> None:
        """Free the engine. The session cannot be used after this call."""
        super().close()
        if self._runner is not None:
            self._runner.close()
        self._runner = None


class TensorRtRtxSession(_EngineSession):
    """Session that computes features with TensorRT-RTX."""

    backend: ClassVar[str] = "tensorrt_rtx"
    library: ClassVar[EngineLibrary] = "tensorrt_rtx"


class TensorRtSession(_EngineSession):
    """Session that computes features with TensorRT."""

    backend: ClassVar[str] = "tensorrt"
    library: ClassVar[EngineLibrary] = "tensorrt"


class EngineRunner:
    """An engine that is loaded on a GPU.

    Args:
        library: library that built the engine, imported.
        engine: engine file that :func:`fseft_edge.runtime.encoder.engine_files.read_engine` has checked.
        device: NVIDIA GPU.

    Raises:
        EngineError: the library cannot use the engine on this machine (another GPU, an old driver, not enough memory).
    """

    def __init__(self, library: ModuleType, engine: EngineFile, device: torch.device) -> None:
        # Python frees attributes in the order of their creation. The context must be freed first, because it uses the
        # other objects without keeping a reference.
        self._context: Any = None
        self._device, self._path, self._largest = device, engine.path, engine.description.largest
        self._names = [tensor.name for tensor in engine.description.tensors]
        content = engine.path.read_bytes()
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)  # creates PyTorch's CUDA context, in which the library works
            logger = fresh_logger(library)
            runtime = library.Runtime(logger)
            check_validity(library, runtime, engine.path, content)
            loaded = runtime.deserialize_cuda_engine(content)
            if loaded is None:
                raise _unusable(engine.path, last_error(logger))
            names = [loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)]
            if sorted(names) != sorted(self._names):
                raise _unusable(engine.path, f"the engine has the unexpected inputs and outputs {', '.join(names)}")
            self._cache = _KernelCache(loaded, engine.runtime_cache) if hasattr(library, "IRuntimeCache") else None
            self._context = self._cache.context(loaded) if self._cache else loaded.create_execution_context()
            if self._context is None:
                raise _unusable(engine.path, last_error(logger))
            self._stream = torch.cuda.Stream(device)
        self._logger, self._loaded = logger, (loaded, runtime)

    def __call__(self, windows: Tensor) -> list[Tensor]:
        """Return the feature pyramid of 1 to ``max_batch`` windows, float32 on the device.

        Raises:
            EngineError: the windows are larger than the largest size of the engine, or the engine fails.
        """
        size, largest = tuple(windows.shape[2:]), self._largest
        if largest is not None and any(side > limit for side, limit in zip(size, largest, strict=True)):
            raise EngineError(
                f"{self._path} computes at most {_product(largest)} voxels at once, but a part of this scan has "
                f"{_product(size)} voxels.",
                remedy="Use --backend torch.",
            )
        with torch.cuda.device(self._device):
            source = windows.to(self._device).contiguous()
            if not self._context.set_input_shape(self._names[0], tuple(source.shape)):
                raise RuntimeError(f"the engine refuses windows {list(source.shape)}")
            shapes = [tuple(self._context.get_tensor_shape(name)) for name in self._names[1:]]
            pyramid = [torch.empty(shape, device=self._device) for shape in shapes]
            for name, buffer in zip(self._names, [source, *pyramid], strict=True):
                self._context.set_tensor_address(name, buffer.data_ptr())
            caller = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(caller)
            done = self._context.execute_async_v3(self._stream.cuda_stream)
            caller.wait_stream(self._stream)
            for buffer in (source, *pyramid):
                buffer.record_stream(self._stream)
            if not done:
                raise _unusable(self._path, last_error(self._logger))
            return pyramid

    def close(self) -> None:
        """Free the engine, and store the kernels that the RTX runtime compiled, for the next session."""
        torch.cuda.synchronize(self._device)
        if self._cache is not None:
            self._cache.save()
        self._context = None


class _KernelCache:
    """Cache of the kernels that TensorRT-RTX compiles when an engine runs on a GPU for the first time.

    The library only accepts a cache of the same version, GPU and driver. The configuration of the library does not keep
    a reference to the cache, so this object must exist as long as the execution context.
    """

    def __init__(self, engine: Any, path: Path) -> None:  # noqa: ANN401 - the library comes without types
        self._path = path
        self._config = engine.create_runtime_config()
        self._cache = self._config.create_runtime_cache()
        self._before = path.read_bytes() if path.is_file() else b""
        if self._before and not self._cache.deserialize(self._before):
            _log.info("%s belongs to another GPU, driver or version; the kernels are compiled again", path)
            self._before = b""
        self._config.set_runtime_cache(self._cache)

    def context(self, engine: Any) -> Any:  # noqa: ANN401 - the library comes without types
        """Return an execution context that uses and fills the cache, or None if the engine cannot run."""
        return engine.create_execution_context(self._config)

    def save(self) -> None:
        content = bytes(self._cache.serialize())
        if content == self._before:
            return
        try:
            with atomic_path(self._path) as temporary:
                temporary.write_bytes(content)
        except OutOfSpaceError as error:
            _log.info("the kernels compiled for this GPU cannot be stored: %s", error.message)


def check_validity(
    library: ModuleType,
    runtime: Any,  # noqa: ANN401 - the library comes without types
    path: Path,
    content: bytes,
) -> None:
    """Raise EngineError if TensorRT-RTX reports that an engine cannot be used on this machine.

    TensorRT does not offer this check, so for TensorRT nothing is checked.

    Args:
        library: library that built the engine, imported.
        runtime: runtime object of the library.
        path: path of the engine; used in messages.
        content: bytes of the engine.

    Raises:
        EngineError: the engine cannot be used; the message contains the library's reasons.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, reasons = runtime.get_engine_validity(content)
    if validity == library.EngineValidity.SUBOPTIMAL:
        _log.info("%s may run slower than an engine that is built on this machine", path)
    if validity == library.EngineValidity.INVALID:
        known = library.EngineInvalidityDiagnostics.__members__
        named = [name.lower().replace("_", " ") for name, flag in known.items() if reasons & int(flag)]
        raise _unusable(path, ", ".join(named) or "no usable NVIDIA driver")


def _product(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _unusable(path: Path, reason: str) -> EngineError:
    return EngineError(
        f"{path} cannot be used on this GPU: {reason}.",
        remedy="Check the NVIDIA driver and the GPU's free memory, build the engine again with `fseft-edge "
        "build-engines`, or use --backend torch.",
    )
