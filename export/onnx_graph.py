"""From a network to an ONNX file: float32, dynamic batch, static window."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch

from fseft_edge.runtime.backends.pytorch import inference_network
from fseft_edge.runtime.networks.base import FeatureNetwork

OPSET = 20
INPUT = "windows"


def write_graph(network: FeatureNetwork, window: tuple[int, int, int], path: Path) -> None:
    """Write a network as one ONNX file; the same network gives the same bytes.

    The input ``windows`` is float32 ``[n, 1, X, Y, Z]`` with any n; the outputs are ``level_0`` (finest), ``level_1``,
    ... Batch normalisations are folded. The exporter's notes on where in the source an operator comes from are left
    out: they name folders of the machine that exported.

    Args:
        network: what to export; it stays as it is.
        window: ``[X, Y, Z]``, the one size that the graph takes. Dynamic sizes export, but the graphs fail.
        path: where to.
    """
    example = torch.zeros(2, 1, *window)  # a batch of 1 would be taken for a constant
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            inference_network(network),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[f"level_{level}" for level in range(len(network.levels))],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )
    assert program is not None  # noqa: S101 - what dynamo=True returns
    model = program.model_proto
    _drop_notes(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


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
