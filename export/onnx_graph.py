"""From a network to an ONNX file: float32 or mixed precision, dynamic batch, static window."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import onnx
import torch
from torch import Tensor, nn

from fseft_edge.runtime.encoder.backends.pytorch import inference_network
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.mixed_precision import MixedPrecision

OPSET = 20
INPUT = "windows"


def write_graph(
    network: FeatureNetwork,
    window: tuple[int, int, int],
    path: Path,
    precision: Literal["float32", "mixed"] = "float32",
) -> None:
    """Write a network as one ONNX file; the same network gives the same bytes.

    The input ``windows`` is float32 ``[n, 1, X, Y, Z]`` with any n; the outputs are ``level_0`` (finest), ``level_1``,
    ... Batch normalisations are folded, instance normalisations written out (:class:`_StagedInstanceNorm`). The
    exporter's notes on where in the source an operator comes from are left out: they name folders of the machine that
    exported.

    Args:
        network: what to export; it stays as it is.
        window: ``[X, Y, Z]``, the one size that the graph takes. Dynamic sizes export, but the graphs fail.
        path: where to.
        precision: ``float32``, or ``mixed``: weights and features within the graph are float16, with casts around what
            stays float32 (:class:`MixedPrecision`).
    """
    outputs = [f"level_{level}" for level in range(len(network.levels))]
    prepared = inference_network(network)
    write_model(graph_of(MixedPrecision(prepared) if precision == "mixed" else prepared, window, outputs), path)


def graph_of(network: nn.Module, window: tuple[int, int, int], outputs: Sequence[str]) -> onnx.ModelProto:
    """Return a network as a graph, under the conditions of :func:`write_graph`.

    Args:
        network: in its form for inference; takes windows ``[n, 1, X, Y, Z]``.
        window: ``[X, Y, Z]``.
        outputs: what the network's outputs are called, in order.
    """
    example = torch.zeros(2, 1, *window)  # a batch of 1 would be taken for a constant
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            _with_staged_statistics(network),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )
    assert program is not None  # noqa: S101 - what dynamo=True returns
    model = program.model_proto
    _drop_notes(model)
    return model


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph as one file; the same graph gives the same bytes."""
    path.write_bytes(model.SerializeToString(deterministic=True))


class _StagedInstanceNorm(nn.Module):
    """An instance normalisation whose means are taken along one axis after another.

    ONNX Runtime's own operator adds a whole window up in float32. A CT window is constant over large parts (air, and
    whatever the HU window clips), so that the rounding errors of the sum all have one sign: on 96^3 voxels of a real
    abdomen the normalised features were wrong by 2e-4 of their largest, twice the parity gate; written out, by 1e-7.
    """

    def __init__(self, norm: nn.InstanceNorm3d) -> None:
        super().__init__()
        self._eps = norm.eps
        self._affine, self._weight, self._bias = norm.affine, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        centred = x - _staged_mean(x)
        normalised = centred * torch.rsqrt(_staged_mean(centred * centred) + self._eps)
        if not self._affine:
            return normalised
        return normalised * self._weight[:, None, None, None] + self._bias[:, None, None, None]


def _staged_mean(x: Tensor) -> Tensor:
    """Return the mean over X, Y, Z of ``[n, C, X, Y, Z]``, as ``[n, C, 1, 1, 1]``.

    OpenVINO makes neighbouring means that keep, or drop, their axes alike into one again, with the errors that the
    stages are there to avoid: on 96^3 voxels 1.3e-3 of the largest feature, in one normalisation. So they alternate.
    """
    return x.mean(4).mean(3, keepdim=True).mean(2)[..., None, None]


def _with_staged_statistics(network: nn.Module) -> nn.Module:
    """Return a copy whose instance normalisations are written out, or the network itself where it has none.

    Those that keep running statistics use them in evaluation, and stay.
    """
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.InstanceNorm3d) and not module.track_running_stats
    ]
    if not names:
        return network
    network = copy.deepcopy(network)
    for name in names:
        norm = network.get_submodule(name)
        assert isinstance(norm, nn.InstanceNorm3d)  # noqa: S101 - chosen so
        network.set_submodule(name, _StagedInstanceNorm(norm))
    return network


def _drop_notes(model: onnx.ModelProto) -> None:
    """Remove the exporter's metadata, in place."""
    graph = model.graph
    for holder in (model, graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
        del holder.metadata_props[:]


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep back what the exporter says about itself: that torchvision is missing, and a deprecated check it makes."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)
