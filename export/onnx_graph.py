"""Write a network as an ONNX file: float32 or mixed precision, dynamic batch size, fixed window size or any size."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from fseft_edge.runtime.encoder.backends.pytorch import inference_network
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork, WholeScan
from fseft_edge.runtime.encoder.networks.mixed_precision import MixedPrecision
from fseft_edge.runtime.encoder.networks.residual_unet import AirRectifier

OPSET = 20
INPUT = "windows"

# Operators of networks whose features depend on the surroundings of a voxel alone. Nothing in these operators depends
# on the size of a window.
_OF_ANY_SIZE = {"Conv", "ConvTranspose", "Max", "Add", "Sub", "Concat", "Cast"}


def write_graph(
    network: FeatureNetwork,
    window: tuple[int, int, int],
    path: Path,
    precision: Literal["float32", "mixed"] = "float32",
    *,
    whole_scan: WholeScan | None = None,
) -> None:
    """Write a network as one ONNX file; the same network always gives the same bytes.

    The input ``windows`` is float32 ``[n, 1, X, Y, Z]`` with any n; the outputs are ``level_0`` (finest), ``level_1``,
    ... The graph of an encoder that computes whole scans accepts windows of any size; a level with stride 8 has the
    sizes ``ceil(x/8)``, ``ceil(y/8)`` and ``ceil(z/8)``. Batch normalisations are folded into convolutions. Instance
    normalisations are written as several elementary operators (:class:`_StagedInstanceNorm`). The exporter's metadata
    about source files is removed, because it contains folder names of the exporting machine.

    Args:
        network: network to export; it is not changed.
        window: size of the window, ``[X, Y, Z]``; the only size that the graph accepts if the encoder computes a scan
            in windows. An export of such a network with dynamic sizes works, but the resulting graph fails.
        path: ONNX file to write.
        precision: ``float32``, or ``mixed``: weights and features in the graph are float16, and casts surround the
            operations that stay in float32 (:class:`MixedPrecision`).
        whole_scan: how the encoder computes a whole scan; None for an encoder that computes a scan in windows.
    """
    outputs = [f"level_{level}" for level in range(len(network.levels))]
    prepared = inference_network(network, whole_scan=whole_scan is not None)
    computed = MixedPrecision(prepared) if precision == "mixed" else prepared
    write_model(graph_of(computed, window, outputs, whole_scan=whole_scan), path)


def graph_of(
    network: nn.Module, window: tuple[int, int, int], outputs: Sequence[str], *, whole_scan: WholeScan | None = None
) -> onnx.ModelProto:
    """Return a network as an ONNX graph with the properties that :func:`write_graph` describes.

    Args:
        network: network in its form for inference; its input is windows ``[n, 1, X, Y, Z]``.
        window: size of the window, ``[X, Y, Z]`` in voxels.
        outputs: names of the network's outputs, in order.
        whole_scan: how the network computes a whole scan; None if the graph only accepts the window.
    """
    example = torch.zeros(2, 1, *window)  # the exporter would treat a batch size of 1 as a constant
    network, periods = _with_constant_surroundings(_with_staged_statistics(network))
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )
    assert program is not None  # noqa: S101 - dynamo=True always returns a program
    model = program.model_proto
    _drop_notes(model)
    if whole_scan is not None:
        _accept_all_sizes(model, window)
    _repeat_periods(model.graph, periods)
    return model


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph as one file; the same graph always gives the same bytes."""
    path.write_bytes(model.SerializeToString(deterministic=True))


class _StagedInstanceNorm(nn.Module):
    """Instance normalisation that computes means along one axis after another.

    ONNX Runtime's own operator sums a whole window in float32. A CT window is constant in large regions (air, and
    intensities clipped by the HU window), so all rounding errors of the sum have the same sign. For 96^3 voxels of a
    real abdomen, the largest error of ONNX Runtime's operator was 2e-4 of the largest feature, twice the parity gate;
    the largest error of this module was 1e-7.
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

    OpenVINO merges consecutive means if all of them keep their axes or all of them drop their axes. The merged mean
    has the rounding errors that the stages avoid: for 96^3 voxels, 1.3e-3 of the largest feature in one normalisation.
    Therefore the stages alternate between keeping and dropping axes.
    """
    return x.mean(4).mean(3, keepdim=True).mean(2)[..., None, None]


def _with_staged_statistics(network: nn.Module) -> nn.Module:
    """Return a copy that computes instance normalisations in stages; without such layers, the network itself.

    Instance normalisations with running statistics compute no means in evaluation mode, so they stay unchanged.
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
        assert isinstance(norm, nn.InstanceNorm3d)  # noqa: S101 - narrows the type for the checker
        network.set_submodule(name, _StagedInstanceNorm(norm))
    return network


def _with_constant_surroundings(network: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a copy with one voxel instead of each period of a rectifier in air, and these periods by name.

    The exporter would write periods repeated to the size of the window, which is large and fits no other size.
    :func:`_repeat_periods` restores the periods in the graph.
    """
    network = copy.deepcopy(network)
    periods: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, AirRectifier) and module.bias.shape[-1] > 1:
            for kind in ("bias", "floor"):
                period = getattr(module, kind)
                periods[f"{name}.{kind}"] = period
                setattr(module, kind, period.mean((1, 2, 3), keepdim=True))
    return network, periods


def _repeat_periods(graph: onnx.GraphProto, periods: Mapping[str, Tensor]) -> None:
    """Repeat each period to the size of the tensor with which an operator combines it, in place."""
    if not periods:
        return
    spatial = onnx.numpy_helper.from_array(np.arange(1, 4), "axes_of_periods")
    first = onnx.numpy_helper.from_array(np.zeros(3, np.int64), "first_of_periods")
    one = onnx.numpy_helper.from_array(np.ones(1, np.int64), "one_channel")
    new: dict[str, onnx.TensorProto] = {one.name: one, spatial.name: spatial, first.name: first}
    nodes: list[onnx.NodeProto] = []
    done: set[str] = set()
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name not in periods:
                continue
            (other,) = (tensor for tensor in node.input if tensor != name)
            if name not in done:
                nodes += _repeating(name, other, periods[name], new)
                done.add(name)
            node.input[place] = f"{name}_repeated"
        nodes.append(node)
    if done != periods.keys():
        raise ValueError(f"the graph does not contain {sorted(periods.keys() - done)}")
    for replaced, added in ((graph.initializer, new.values()), (graph.value_info, ())):
        kept = [tensor for tensor in replaced if tensor.name not in periods]
        del replaced[:]
        replaced.extend([*kept, *added])
    del graph.node[:]
    graph.node.extend(nodes)


def _repeating(name: str, like: str, period: Tensor, new: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
    """Return the nodes that repeat a period ``[C, p, p, p]`` to the size of ``like``; add constants to ``new``."""
    length = period.shape[-1]
    more, divisor = f"{length - 1}_more", f"length_{length}"
    for constant, value in ((more, length - 1), (divisor, length)):
        new.setdefault(constant, onnx.numpy_helper.from_array(np.full(3, value, np.int64), constant))
    new[name] = onnx.numpy_helper.from_array(period.numpy(), name)
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Shape", [like], "size", {"start": 2}),
        ("Add", [f"{name}_size", more], "longer", {}),
        ("Div", [f"{name}_longer", divisor], "times", {}),
        ("Concat", ["one_channel", f"{name}_times"], "repeats", {"axis": 0}),
        ("Tile", [name, f"{name}_repeats"], "tiled", {}),
        ("Slice", [f"{name}_tiled", "first_of_periods", f"{name}_size", "axes_of_periods"], "repeated", {}),
    ]
    return [
        onnx.helper.make_node(operator, inputs, [f"{name}_{output}"], f"node_{name}_{output}", **attributes)
        for operator, inputs, output, attributes in steps
    ]


def _drop_notes(model: onnx.ModelProto) -> None:
    """Remove the exporter's metadata from a graph, in place."""
    graph = model.graph
    for holder in (model, graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
        del holder.metadata_props[:]


def _accept_all_sizes(model: onnx.ModelProto, window: tuple[int, int, int]) -> None:
    """Make a graph accept windows of any size, in place; sizes get names such as ``x`` and ``ceil(x/8)``.

    An export with dynamic sizes takes three times as long, and writes expressions of hundreds of characters as sizes.

    Raises:
        ValueError: the graph contains an operator that may depend on the size of the window.
    """
    graph = model.graph
    others = {node.op_type for node in graph.node} - _OF_ANY_SIZE
    if others:
        raise ValueError(f"the operators {sorted(others)} may depend on the size of the window")
    _cut_upsampled(graph)
    constants = {constant.name for constant in graph.initializer}
    for tensor in (*graph.input, *graph.output, *graph.value_info):
        if tensor.name not in constants:
            for axis, side, size in zip("xyz", window, list(tensor.type.tensor_type.shape.dim)[2:], strict=True):
                stride = side // size.dim_value
                size.dim_param = f"ceil({axis}/{stride})" if stride > 1 else axis


def _cut_upsampled(graph: onnx.GraphProto) -> None:
    """Cut upsampled features to the size of the skip features, in place.

    Along an odd axis, they are longer by one voxel. For the size of the exported window, the exporter leaves this out.
    """
    first = onnx.numpy_helper.from_array(np.zeros(3, np.int64), "first_voxel")
    axes = onnx.numpy_helper.from_array(np.arange(2, 5), "axes_of_space")
    graph.initializer.extend([first, axes])
    upsampled = {node.output[0] for node in graph.node if node.op_type == "ConvTranspose"}
    uncut = {value.name: value for value in graph.value_info if value.name in upsampled}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Concat":
            up, skip = node.input
            size, cut = f"{skip}_size", f"{up}_cut"
            nodes.append(onnx.helper.make_node("Shape", [skip], [size], f"node_{size}", start=2))
            nodes.append(onnx.helper.make_node("Slice", [up, first.name, size, axes.name], [cut], f"node_{cut}"))
            node.input[0] = cut
            upsampled.remove(up)
            graph.value_info.remove(uncut[up])  # its size has no name
        nodes.append(node)
    if upsampled:
        raise ValueError(f"the upsampled features {sorted(upsampled)} are not concatenated with skip features")
    del graph.node[:]
    graph.node.extend(nodes)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppress two messages of the exporter: torchvision is missing, and a check inside PyTorch is deprecated."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)
