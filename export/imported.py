"""Networks of the user's own: built by code that a TOML description names, exported as a graph and nothing else.

The code is imported here and only here, because the user named it on the command line of the export. The bundle holds
the graph, the head and the weights' names and values; opening it imports and calls nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import onnx
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from torch import Tensor, nn

from fseft_edge.export.checkpoints import ModelDescription, ModelFile, load_weights, read_checkpoint
from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.export.zoo import LoadedModel
from fseft_edge.runtime.encoder.bundle import sha256_of_file
from fseft_edge.runtime.encoder.networks import IMPORTED
from fseft_edge.runtime.encoder.networks.base import FeatureLevel, FeatureNetwork
from fseft_edge.runtime.errors import CheckpointError, InputError
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.system.toml_file import read_toml

_KEYS = "See docs/export.md for the keys of a description."


class NetworkDescription(BaseModel):
    """What a TOML file says about a network of the user's own.

    Attributes:
        name: of the model.
        factory: ``package.module:function``, which returns the network as a ``torch.nn.Module``.
        settings: keyword arguments of the factory.
        preprocessing: how a CT becomes the network's input.
        window: ``[X, Y, Z]`` voxels of the input.
        levels: names of the submodules whose outputs are the feature pyramid, finest (stride 1) first; empty where the
            network itself returns the pyramid.
        classifier: name of the submodule that is the 1x1x1 convolution behind level 0; None without organs.
        organs: names of the classifier's rows, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    factory: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    preprocessing: Preprocessing
    window: tuple[int, int, int]
    levels: tuple[str, ...] = ()
    classifier: str | None = None
    organs: tuple[str, ...]

    @model_validator(mode="after")
    def _organs_have_a_classifier(self) -> Self:
        if (self.classifier is None) != (not self.organs):
            raise ValueError("'classifier' and 'organs' belong together: name both, or write organs = [] alone")
        if len(set(self.organs)) < len(self.organs):
            raise ValueError("'organs' names one twice")
        return self


def import_model(description_file: Path, checkpoint: Path) -> LoadedModel:
    """Return a network of the user's own with its weights.

    This **runs the code** that the description names.

    Args:
        description_file: TOML, see :class:`NetworkDescription`.
        checkpoint: its whole state dict.

    Raises:
        UnreadableFileError: the description is missing or no TOML.
        InputError: a key of it is missing, unknown or wrong, the code cannot be imported or does not return a network,
            or what the network returns is no feature pyramid.
        CheckpointError: the weights are not those of the network, or the classifier not one of the organs.
    """
    description = read_toml(description_file, NetworkDescription, remedy=_KEYS)
    network = _call_factory(description, description_file)
    load_weights(network, read_checkpoint(checkpoint), source=str(checkpoint))
    imported = ImportedNetwork(network.eval(), description, description_file)
    weight, bias = _head(network, description, imported.levels[0].channels, description_file)
    model = ModelDescription(
        name=description.name,
        architecture=IMPORTED,
        settings={"factory": description.factory, "arguments": description.settings},
        preprocessing=description.preprocessing,
        window=description.window,
        organs=description.organs,
    )
    return LoadedModel(ModelFile(model, imported.state_dict(), weight, bias), checkpoint, imported)


class ImportedNetwork(FeatureNetwork):
    """A network of the user's own as one that returns features.

    Args:
        network: in evaluation mode.
        description: which of its submodules are the pyramid.
        source: the description's file, for messages.

    Raises:
        InputError: a submodule is not there, or the outputs are no pyramid over the window.
    """

    def __init__(self, network: nn.Module, description: NetworkDescription, source: Path) -> None:
        super().__init__()
        self.network = network
        self._names = description.levels
        known = dict(network.named_modules())
        missing = [name for name in self._names if name not in known]
        if missing:
            raise InputError(
                f"{source}: levels: the network has no submodule {missing[0]!r}.",
                remedy=f"Name some of its submodules, such as {', '.join(list(known)[1:6])}.",
            )
        try:
            with torch.no_grad():
                pyramid = self(torch.zeros(1, 1, *description.window))
        except Exception as error:  # whatever code of others may raise
            raise InputError(
                f"{source}: window: the network fails on one of {list(description.window)} "
                f"({type(error).__name__}: {error}).",
                remedy="Write a window that the network takes; it has one channel.",
            ) from error
        self.levels = tuple(_level(features, description, source, number) for number, features in enumerate(pyramid))
        if not self.levels:
            raise InputError(f"{source}: the network returns no features.", remedy=_KEYS)

    def forward(self, windows: Tensor) -> list[Tensor]:
        """Return the pyramid (see :class:`FeatureNetwork`)."""
        if not self._names:
            returned: Sequence[Tensor] = self.network(windows)
            return list(returned)
        captured: dict[str, Tensor] = {}
        # Registered anew each time: hooks that a copy of this module inherits would fill the original's features.
        hooks = [self.network.get_submodule(name).register_forward_hook(_keep(captured, name)) for name in self._names]
        try:
            self.network(windows)
        finally:
            for hook in hooks:
                hook.remove()
        return [captured[name] for name in self._names]


def write_imported_graph(network: FeatureNetwork, window: tuple[int, int, int], path: Path) -> None:
    """Write a network of the user's own as an ONNX file (:func:`fseft_edge.export.onnx_graph.write_graph`).

    Raises:
        InputError: it computes something that cannot be written so.
    """
    try:
        write_graph(network, window, path)
    except torch.onnx.OnnxExporterError as error:
        raise InputError(
            f"The network cannot be written as an ONNX graph ({str(error).strip().partition(chr(10))[0]}).",
            remedy="Its forward pass has to be tensor operations that do not depend on values; see docs/export.md.",
        ) from error


def graph_settings(graph: Path) -> dict[str, JsonValue]:
    """Return what the manifest says of a network that is a graph alone: which one, and the memory that it takes.

    The graph is all that determines the features, so its sha256 is part of the encoder id.
    """
    return {"graph_sha256": sha256_of_file(graph), "activation_bytes": activation_bytes(onnx.load(graph))}


def activation_bytes(graph: onnx.ModelProto) -> int:
    """Return the most bytes that a graph's tensors of one window hold at a time, if each goes after its last use."""
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    initial = {entry.name for entry in inferred.initializer}
    sizes = {
        entry.name: _bytes(entry.type.tensor_type)
        for entry in (*inferred.value_info, *inferred.output, *inferred.input)
    }
    last = {name: step for step, node in enumerate(inferred.node) for name in node.input}
    last |= {entry.name: len(inferred.node) for entry in inferred.output}
    alive = {entry.name for entry in inferred.input}
    peak = 0
    for step, node in enumerate(inferred.node):
        alive |= set(node.output) - initial
        peak = max(peak, sum(sizes.get(name, 0) for name in alive))
        alive = {name for name in alive if last.get(name, step) > step}
    return peak


def _call_factory(description: NetworkDescription, source: Path) -> nn.Module:
    module_name, _, function_name = description.factory.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever code of others may raise
        raise InputError(
            f"{source}: factory: {description.factory} cannot be imported ({error}).",
            remedy="Install its package beside fseft-edge, or put its folder on PYTHONPATH.",
        ) from error
    try:
        network = factory(**description.settings)
    except Exception as error:  # likewise
        raise InputError(
            f"{source}: settings: {description.factory} fails with them ({type(error).__name__}: {error}).",
            remedy="Write the factory's keyword arguments under [settings].",
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(
            f"{source}: factory: {description.factory} returns a {type(network).__name__}, not a torch.nn.Module.",
            remedy="Name a function, or a class, that returns the network.",
        )
    return network


def _keep(captured: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:  # noqa: ANN401 - torch's signature of a hook
        captured[name] = output

    return hook


def _level(features: object, description: NetworkDescription, source: Path, number: int) -> FeatureLevel:
    """Return what one output of the network is, checked to be level ``number`` of a pyramid over the window."""
    stride = 2**number
    expected = [side / stride for side in description.window]
    shape = list(features.shape) if isinstance(features, Tensor) else []
    if len(shape) != 2 + len(expected) or shape[2:] != expected:
        raise InputError(
            f"{source}: level {number} of the network's features is {shape or type(features).__name__}, "
            f"not [1, C, {', '.join(f'{side:g}' for side in expected)}].",
            remedy="A pyramid begins at the window's resolution and halves it from level to level; the window is a "
            "multiple of the last stride.",
        )
    return FeatureLevel(stride, shape[1])


def _head(network: nn.Module, description: NetworkDescription, channels: int, source: Path) -> tuple[Tensor, Tensor]:
    """Return the classifier's weight ``[K, C_0]`` and bias ``[K]``."""
    if description.classifier is None:
        return torch.zeros(0, channels), torch.zeros(0)
    layer = dict(network.named_modules()).get(description.classifier)
    if not isinstance(layer, nn.Conv3d) or layer.kernel_size != (1, 1, 1):
        raise InputError(
            f"{source}: classifier: {description.classifier!r} is no 1x1x1 convolution of the network.",
            remedy=_KEYS,
        )
    weight = layer.weight.detach().float().flatten(1)
    if weight.shape != (len(description.organs), channels):
        raise CheckpointError(
            f"The classifier {description.classifier!r} is {list(weight.shape)}, and {source} names "
            f"{len(description.organs)} organs over {channels} channels.",
            remedy="Name every row of the classifier in 'organs', in order, and level 0 as what it reads.",
        )
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float()
    return weight, bias


def _bytes(tensor: onnx.TypeProto.Tensor) -> int:
    """Return the bytes of a graph's tensor, an open dimension (the number of windows) taken as one."""
    elements = 1
    for dimension in tensor.shape.dim:
        elements *= dimension.dim_value or 1
    item = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize if tensor.elem_type else 0
    return int(elements * item)
