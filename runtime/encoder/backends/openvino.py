"""The openvino backend: the exported graph on a CPU, in float32 or, on CPUs that multiply it, bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.errors import EncoderBundleError, MissingBackendError
from fseft_edge.runtime.system.libraries import openvino_core

_MAX_BATCH = 1  # the graph is compiled for one window: for a fixed shape it runs faster
_HINTS: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoSession(EncoderSession):
    """Features by OpenVINO on the CPU."""

    backend: ClassVar[str] = "openvino"

    def __init__(self, bundle: EncoderBundle, device: torch.device, threads: int, precision: Precision) -> None:
        super().__init__(bundle, device, _MAX_BATCH, precision)
        if device.type != "cpu":
            raise MissingBackendError(
                f"The backend openvino computes on the CPU, not on {device}.",
                remedy="Use --device cpu, or --backend torch.",
            )
        if bundle.graph is None:
            raise EncoderBundleError(
                f"The encoder bundle {bundle.path} has no ONNX graph.",
                remedy="Export or merge it again without --no-onnx, or use --backend torch.",
            )
        self._runner: CompiledGraph | None = CompiledGraph(bundle.graph, threads, precision)

    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        assert self._runner is not None  # noqa: S101 - encode() refuses a closed session
        return [torch.cat(level) for level in zip(*map(self._runner, windows.split(1)), strict=True)]

    def close(self) -> None:
        """Free the graph; the session cannot be used any more."""
        super().close()
        self._runner = None


class CompiledGraph:
    """An ONNX graph of one input and several outputs, compiled for the CPU.

    Args:
        graph: the file.
        threads: CPU threads.
        precision: of the computation; it has to be named, OpenVINO's own default depends on the CPU.

    Raises:
        MissingBackendError: when openvino is not installed.
    """

    def __init__(self, graph: Path, threads: int, precision: Precision) -> None:
        core = _core()
        model = core.read_model(graph)
        model.reshape([1, *(dimension.get_length() for dimension in list(model.input(0).partial_shape)[1:])])
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # pinned threads of two processes would share a core and leave others idle
        }
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()

    def __call__(self, windows: Tensor) -> list[Tensor]:
        """Return the outputs for one window ``[1, 1, X, Y, Z]`` on any device, as tensors on the CPU."""
        results = self._request.infer([windows.cpu().contiguous().numpy()], share_inputs=True)
        return [torch.from_numpy(level) for level in results.values()]


def _core() -> Any:  # noqa: ANN401 - of a library that may not be there
    try:
        return openvino_core()
    except ImportError as error:
        raise MissingBackendError(
            f"The backend openvino cannot be loaded: {error}.",
            remedy="Install it with `pip install 'fseft-edge[openvino]'`, or use --backend torch.",
        ) from error
