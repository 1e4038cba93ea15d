"""Backend openvino: computes the exported graph on a CPU, in float32 or (with CPU support) in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.errors import EncoderBundleError, MissingBackendError
from fseft_edge.runtime.system.libraries import openvino_core

_MAX_BATCH = 1  # larger batches need more memory and are not measurably faster
_HINTS: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoSession(EncoderSession):
    """Session that computes features with OpenVINO on the CPU."""

    backend: ClassVar[str] = "openvino"

    def __init__(self, bundle: EncoderBundle, device: torch.device, threads: int, precision: Precision) -> None:
        super().__init__(bundle, device, _MAX_BATCH, precision)
        if device.type != "cpu":
            raise MissingBackendError(
                f"The backend openvino only computes on a CPU, not on {device}.",
                remedy="Use --device cpu, or --backend torch.",
            )
        if bundle.graph is None:
            raise EncoderBundleError(
                f"The encoder bundle {bundle.path} contains no ONNX graph.",
                remedy="Export or merge the encoder again without --no-onnx, or use --backend torch.",
            )
        self._runner: CompiledGraph | None = CompiledGraph(bundle.graph, threads, precision)

    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        assert self._runner is not None  # noqa: S101 - encode() refuses a closed session
        return [torch.cat(level) for level in zip(*map(self._runner, windows.split(1)), strict=True)]

    def close(self) -> None:
        """Free the graph. The session cannot be used after this call."""
        super().close()
        self._runner = None


class CompiledGraph:
    """An ONNX graph with one input and several outputs, compiled for the CPU.

    A graph with dynamic sizes is compiled for each size, and the compiled graph of the last size is kept. Compared with
    a graph that is compiled once with dynamic sizes, this takes a tenth less time and a tenth less memory. A compiled
    graph keeps the memory of all its tensors.

    Args:
        graph: ONNX file.
        threads: number of CPU threads.
        precision: precision of the computation. It is always passed to OpenVINO, whose default depends on the CPU.

    Raises:
        MissingBackendError: OpenVINO is not installed.
    """

    def __init__(self, graph: Path, threads: int, precision: Precision) -> None:
        self._core = _core()
        self._model: Any = self._core.read_model(graph)
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # pinned threads of two processes could share a core while others are idle
        }
        self._shape: list[int] = []
        self._request: Any = None
        sizes = list(self._model.input(0).partial_shape)[1:]
        if all(size.is_static for size in sizes):
            self._compile([1, *(size.get_length() for size in sizes)])
            self._model = None

    def __call__(self, windows: Tensor) -> list[Tensor]:
        """Return the outputs for one window ``[1, 1, X, Y, Z]`` on any device, as tensors on the CPU."""
        if self._model is not None and list(windows.shape) != self._shape:
            self._compile(list(windows.shape))
        results = self._request.infer([windows.cpu().contiguous().numpy()], share_inputs=True)
        return [torch.from_numpy(level) for level in results.values()]

    def _compile(self, shape: list[int]) -> None:
        self._request, self._shape = None, shape  # frees the tensors of the last size
        self._model.reshape(shape)
        self._request = self._core.compile_model(self._model, "CPU", self._settings).create_infer_request()


def _core() -> Any:  # noqa: ANN401 - the library is optional and has no type here
    try:
        return openvino_core()
    except ImportError as error:
        raise MissingBackendError(
            f"The backend openvino cannot be loaded: {error}.",
            remedy="Install OpenVINO with `pip install 'fseft-edge[openvino]'`, or use --backend torch.",
        ) from error
