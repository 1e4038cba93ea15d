"""The onnxruntime backend: the exported graph, on the CPU or an NVIDIA GPU."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import EncoderBundleError, MissingBackendError
from fseft_edge.runtime.system.libraries import import_library

_MAX_BATCH_CPU = 1  # more windows at once cost memory and gain nothing measurable
_MAX_BATCH_CUDA = 2  # attention of SwinUNETR-48 at 96^3 alone takes 1.5 GB a window


class OnnxRuntimeSession(EncoderSession):
    """Features by ONNX Runtime, in float32."""

    backend: ClassVar[str] = "onnxruntime"

    def __init__(self, bundle: EncoderBundle, device: torch.device, threads: int) -> None:
        super().__init__(bundle, device, _MAX_BATCH_CPU if device.type == "cpu" else _MAX_BATCH_CUDA)
        if bundle.graph is None:
            raise EncoderBundleError(
                f"The encoder bundle {bundle.path} has no ONNX graph.",
                remedy="Export or merge it again without --no-onnx, or use --backend torch.",
            )
        self._runner: GraphRunner | None = GraphRunner(bundle.graph, device, threads)

    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        assert self._runner is not None  # noqa: S101 - encode() refuses a closed session
        return self._runner(windows)

    def close(self) -> None:
        """Free the graph; the session cannot be used any more."""
        super().close()
        self._runner = None


class GraphRunner:
    """An ONNX graph of one input and several outputs, loaded; PyTorch's tensors are its buffers.

    On a GPU windows and features stay there, and the graph computes on a stream of its own that waits for the caller's.
    The same calls bind tensors on the CPU, where the tests run them; on a GPU they were never run so far.

    Args:
        graph: the file; float32 throughout, and no size but the number of windows is left open.
        device: where it computes.
        threads: CPU threads for one operator.

    Raises:
        MissingBackendError: when onnxruntime is not installed or cannot use the device.
    """

    def __init__(self, graph: Path, device: torch.device, threads: int) -> None:
        library = import_onnxruntime()
        options = library.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin between operators take the cores from whatever runs between two windows.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        # One block for all tensors of a window, planned ahead, comes on top of what the first window left in the arena:
        # without it the process peaks at 733 instead of 798 MiB (compact encoder) and at 2535 instead of 3686 MiB
        # (SwinUNETR-48), in the same time.
        options.enable_mem_pattern = False
        self._options = library.RunOptions()
        self._device = device
        # Never PyTorch's default stream: its address is 0, which ONNX Runtime takes for none.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        name, settings = _provider(library, device, self._stream)
        self._session = library.InferenceSession(graph, options, providers=[(name, settings)])
        if name not in self._session.get_providers():
            # It goes on with the CPU where the libraries of CUDA are not found, and says so in its log alone.
            raise _cannot_use_gpu()
        if device.type == "cpu":
            # Giving the arena's memory back after every window lowers the peak by a quarter for a tenth of the time
            # (compact encoder, window 96^3).
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._input: str = self._session.get_inputs()[0].name
        self._outputs: list[tuple[str, list[int | str]]] = [
            (output.name, output.shape) for output in self._session.get_outputs()
        ]

    def __call__(self, windows: Tensor) -> list[Tensor]:
        """Return the outputs for windows on any device, as new tensors on the runner's device."""
        source = windows.to(self._device).contiguous()
        pyramid = [
            # A size that is left open has a name in place of a number.
            torch.empty([size if isinstance(size, int) else len(source) for size in shape], device=self._device)
            for _, shape in self._outputs
        ]
        binding = self._session.io_binding()
        where = self._device.type, self._device.index or 0, np.float32
        binding.bind_input(self._input, *where, list(source.shape), source.data_ptr())
        for (name, _), level in zip(self._outputs, pyramid, strict=True):
            binding.bind_output(name, *where, list(level.shape), level.data_ptr())
        if self._stream is None:
            self._session.run_with_iobinding(binding, self._options)
            return pyramid
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        self._session.run_with_iobinding(binding, self._options)
        caller.wait_stream(self._stream)
        for buffer in (source, *pyramid):
            buffer.record_stream(self._stream)
        return pyramid


def import_onnxruntime() -> ModuleType:
    """Return the library.

    Raises:
        MissingBackendError: when it is not installed, or not for this machine.
    """
    try:
        return import_library("onnxruntime")
    except ImportError as error:
        raise MissingBackendError(
            f"The backend onnxruntime cannot be loaded: {error}.",
            remedy="Install it with `pip install 'fseft-edge[cpu]'`, for an NVIDIA GPU with "
            "`pip install 'fseft-edge[gpu]'`, or use --backend torch.",
        ) from error


def _provider(
    library: ModuleType, device: torch.device, stream: torch.cuda.Stream | None
) -> tuple[str, dict[str, Any]]:
    """Return ONNX Runtime's name of the device, with the settings that keep float32 exact."""
    if stream is None:
        return "CPUExecutionProvider", {}
    if "CUDAExecutionProvider" not in library.get_available_providers():
        raise _cannot_use_gpu()
    settings = {"device_id": device.index or 0, "use_tf32": 0, "user_compute_stream": str(stream.cuda_stream)}
    return "CUDAExecutionProvider", settings


def _cannot_use_gpu() -> MissingBackendError:
    return MissingBackendError(
        "The installed onnxruntime cannot use the NVIDIA GPU.",
        remedy="Replace it (`pip uninstall onnxruntime`, then `pip install 'fseft-edge[gpu]'`), "
        "or use --backend torch.",
    )
