"""Backend onnxruntime: computes the exported graph on the CPU or an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Mapping
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

_MAX_BATCH_CPU = 1  # larger batches need more memory and are not measurably faster
_MAX_BATCH_CUDA = 2  # the attention of SwinUNETR-48 takes 1.5 GB per window of 96^3 voxels


class OnnxRuntimeSession(EncoderSession):
    """Session that computes features with ONNX Runtime, in float32."""

    backend: ClassVar[str] = "onnxruntime"

    def __init__(self, bundle: EncoderBundle, device: torch.device, threads: int) -> None:
        super().__init__(bundle, device, _MAX_BATCH_CPU if device.type == "cpu" else _MAX_BATCH_CUDA)
        if bundle.graph is None:
            raise EncoderBundleError(
                f"The encoder bundle {bundle.path} contains no ONNX graph.",
                remedy="Export or merge the encoder again without --no-onnx, or use --backend torch.",
            )
        self._runner: GraphRunner | None = GraphRunner(bundle.graph, device, threads)

    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        assert self._runner is not None  # noqa: S101 - encode() refuses a closed session
        return self._runner(windows)

    def close(self) -> None:
        """Free the graph. The session cannot be used after this call."""
        super().close()
        self._runner = None


class GraphRunner:
    """A loaded ONNX graph with one input and several outputs. PyTorch's tensors are the buffers of the graph.

    On a GPU, windows and features stay on the GPU. The graph computes on a separate stream, which waits for the
    caller's stream. The tests run the same calls on the CPU; the code has not been run on a GPU yet.

    Args:
        graph: ONNX file; all inputs and outputs are float32. Dynamic sizes of the input have names; those of the
            outputs are names of the input, or fractions such as ``ceil(x/8)``.
        device: device of the computation.
        threads: number of CPU threads for one operator.

    Raises:
        MissingBackendError: onnxruntime is not installed or cannot use the device.
    """

    def __init__(self, graph: Path, device: torch.device, threads: int) -> None:
        library = import_onnxruntime()
        options = library.SessionOptions()
        options.intra_op_num_threads = threads
        # Spinning threads would occupy the cores between two windows and slow down other work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        # With memory patterns, ONNX Runtime allocates one block for all tensors of a window, in addition to the memory
        # that the first window left in the memory pool. Without memory patterns, the process peaks at 733 instead of
        # 798 MiB (compact encoder) and at 2535 instead of 3686 MiB (SwinUNETR-48), at the same speed.
        options.enable_mem_pattern = False
        self._options = library.RunOptions()
        self._device = device
        # PyTorch's default stream cannot be used: its address is 0, which means "no stream" for ONNX Runtime.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        name, settings = _provider(library, device, self._stream)
        self._session = library.InferenceSession(graph, options, providers=[(name, settings)])
        if name not in self._session.get_providers():
            # If the CUDA libraries are missing, ONNX Runtime uses the CPU and only writes a message to its own log.
            raise _cannot_use_gpu()
        if device.type == "cpu":
            # Freeing unused memory of the pool after every window lowers the peak by a quarter and takes a tenth more
            # time (compact encoder, window 96^3).
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        (source,) = self._session.get_inputs()
        self._input: str = source.name
        self._sizes: list[int | str] = source.shape
        self._outputs: list[tuple[str, list[int | str]]] = [
            (output.name, output.shape) for output in self._session.get_outputs()
        ]

    def __call__(self, windows: Tensor) -> list[Tensor]:
        """Return the outputs for windows on any device, as new tensors on the runner's device."""
        source = windows.to(self._device).contiguous()
        pyramid = [torch.empty(shape, device=self._device) for shape in self._shapes(source)]
        binding = self._session.io_binding()
        location = self._device.type, self._device.index or 0, np.float32
        binding.bind_input(self._input, *location, list(source.shape), source.data_ptr())
        for (name, _), level in zip(self._outputs, pyramid, strict=True):
            binding.bind_output(name, *location, list(level.shape), level.data_ptr())
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

    def _shapes(self, windows: Tensor) -> list[list[int]]:
        """Return the shapes of all outputs."""
        sizes = dict(zip(self._sizes, windows.shape, strict=True))
        return [
            [size if isinstance(size, int) else _actual(size, sizes) for size in shape] for _, shape in self._outputs
        ]


def _actual(size: str, named: Mapping[int | str, int]) -> int:
    """Return the value of a dynamic size of an output, from the named sizes of the input."""
    name, _, stride = size.removeprefix("ceil(").removesuffix(")").partition("/")
    return -(-named[name] // int(stride or 1))


def import_onnxruntime() -> ModuleType:
    """Return the module of ONNX Runtime.

    Raises:
        MissingBackendError: ONNX Runtime is not installed, or cannot be loaded on this machine.
    """
    try:
        return import_library("onnxruntime")
    except ImportError as error:
        raise MissingBackendError(
            f"The backend onnxruntime cannot be loaded: {error}.",
            remedy="Install ONNX Runtime with `pip install 'fseft-edge[cpu]'` (for an NVIDIA GPU: "
            "`pip install 'fseft-edge[gpu]'`), or use --backend torch.",
        ) from error


def _provider(
    library: ModuleType, device: torch.device, stream: torch.cuda.Stream | None
) -> tuple[str, dict[str, Any]]:
    """Return ONNX Runtime's name of the device, with settings that disable TF32.

    Raises:
        MissingBackendError: the installed ONNX Runtime does not support NVIDIA GPUs.
    """
    if stream is None:
        return "CPUExecutionProvider", {}
    if "CUDAExecutionProvider" not in library.get_available_providers():
        raise _cannot_use_gpu()
    settings = {
        "device_id": device.index or 0,
        "use_tf32": 0,
        "user_compute_stream": str(stream.cuda_stream),
        # The default, an exhaustive search, would search again for the size of every scan.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    return "CUDAExecutionProvider", settings


def _cannot_use_gpu() -> MissingBackendError:
    return MissingBackendError(
        "The installed ONNX Runtime cannot use the NVIDIA GPU.",
        remedy="Install the version for GPUs (`pip uninstall onnxruntime`, then `pip install 'fseft-edge[gpu]'`), "
        "or use --backend torch.",
    )
