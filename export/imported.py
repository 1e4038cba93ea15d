"""Export networks of the user's own code. A TOML description names the code; the bundle only contains the ONNX graph.

Only this module imports the code of the user, because the user named the code in the export command. The bundle
contains the graph, the head, and the names and values of the weights. Opening the bundle does not import or call the
user's code.
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
    """Content of the TOML file that describes a network of the user's own code.

    Attributes:
        name: name of the model.
        factory: ``package.module:function``; the function returns the network as a ``torch.nn.Module``.
        settings: keyword arguments of the factory.
        preprocessing: conversion of a CT into the network's input.
        window: size of the input window, ``[X, Y, Z]`` in voxels.
        levels: names of the submodules whose outputs are the feature pyramid, finest (stride 1) first; empty if the
            network itself returns the pyramid.
        classifier: name of the submodule that is the 1x1x1 convolution after level 0; None if there are no organs.
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
            raise ValueError("give both 'classifier' and 'organs', or only organs = []")
        if len(set(self.organs)) < len(self.organs):
            raise ValueError("'organs' contains the same name twice")
        return self


def import_model(description_file: Path, checkpoint: Path) -> LoadedModel:
    """Build the network that a description names, and return the network with its weights.

    This function **runs the code** that the description names.

    Args:
        description_file: TOML file with the keys of :class:`NetworkDescription`.
        checkpoint: file with the complete state dict of the network.

    Raises:
        UnreadableFileError: the description is missing or is not a TOML file.
        InputError: a key of the description is missing, unknown or has a wrong value; the code cannot be imported or
            does not return a network; or the outputs of the network are not a feature pyramid.
        CheckpointError: the weights do not match the network, or the classifier does not match the organs.
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
    """Wrapper that makes a network of the user's own code return its feature pyramid.

    Args:
        network: network in evaluation mode.
        description: description that names the submodules of the pyramid.
        source: file of the description; used in error messages.

    Raises:
        InputError: a submodule does not exist, or the outputs are not a feature pyramid of the window.
    """

    def __init__(self, network: nn.Module, description: NetworkDescription, source: Path) -> None:
        super().__init__()
        self.network = network
        self._names = description.levels
        known = dict(network.named_modules())
        missing = [name for name in self._names if name not in known]
        if missing:
            raise InputError(
                f"{source}: 'levels' names {missing[0]!r}, but the network has no such submodule.",
                remedy=f"Give names of submodules, for example {', '.join(list(known)[1:6])}.",
            )
        try:
            with torch.no_grad():
                pyramid = self(torch.zeros(1, 1, *description.window))
        except Exception as error:  # the user's code may raise any exception
            raise InputError(
                f"{source}: the network fails on a window of {list(description.window)} voxels with one channel "
                f"({type(error).__name__}: {error}).",
                remedy="Give a 'window' size that the network accepts.",
            ) from error
        self.levels = tuple(_level(features, description, source, number) for number, features in enumerate(pyramid))
        if not self.levels:
            raise InputError(f"{source}: the network returns an empty list of features.", remedy=_KEYS)

    def forward(self, windows: Tensor) -> list[Tensor]:
        """Return the feature pyramid of windows (:meth:`FeatureNetwork.forward`)."""
        if not self._names:
            returned: Sequence[Tensor] = self.network(windows)
            return list(returned)
        captured: dict[str, Tensor] = {}
        # Hooks are registered for every call: a copy of this module would inherit permanent hooks, and these would
        # write into the original's dictionary.
        hooks = [self.network.get_submodule(name).register_forward_hook(_keep(captured, name)) for name in self._names]
        try:
            self.network(windows)
        finally:
            for hook in hooks:
                hook.remove()
        return [captured[name] for name in self._names]


def write_imported_graph(network: FeatureNetwork, window: tuple[int, int, int], path: Path) -> None:
    """Write a network of the user's own code as an ONNX file (:func:`fseft_edge.export.onnx_graph.write_graph`).

    Raises:
        InputError: the network contains operations that cannot be exported to ONNX.
    """
    try:
        write_graph(network, window, path)
    except torch.onnx.OnnxExporterError as error:
        raise InputError(
            f"The network cannot be exported as an ONNX graph ({str(error).strip().partition(chr(10))[0]}).",
            remedy="Change the network so that its forward pass only contains tensor operations that do not depend on "
            "values; see docs/export.md.",
        ) from error


def graph_settings(graph: Path) -> dict[str, JsonValue]:
    """Return the manifest's settings for an encoder without code: the sha256 of its graph and its activation memory.

    The graph determines the features, so its sha256 is part of the encoder id.
    """
    return {"graph_sha256": sha256_of_file(graph), "activation_bytes": activation_bytes(onnx.load(graph))}


def activation_bytes(graph: onnx.ModelProto) -> int:
    """Return the peak bytes of a graph's tensors for one window, if each tensor is freed after its last use."""
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
    except Exception as error:  # the user's code may raise any exception
        raise InputError(
            f"{source}: the factory {description.factory} cannot be imported ({error}).",
            remedy="Install the package of the factory in the same environment as fseft-edge, or add its folder to "
            "PYTHONPATH.",
        ) from error
    try:
        network = factory(**description.settings)
    except Exception as error:  # the user's code may raise any exception
        raise InputError(
            f"{source}: the factory {description.factory} fails with the given settings "
            f"({type(error).__name__}: {error}).",
            remedy="Write the keyword arguments of the factory under [settings].",
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(
            f"{source}: the factory {description.factory} returns a {type(network).__name__}, not a torch.nn.Module.",
            remedy="Name a function or a class that returns the network.",
        )
    return network


def _keep(captured: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:  # noqa: ANN401 - PyTorch's signature of a hook
        captured[name] = output

    return hook


def _level(features: object, description: NetworkDescription, source: Path, number: int) -> FeatureLevel:
    """Return stride and channels of one output, after checking that its shape fits level ``number`` of the pyramid."""
    stride = 2**number
    expected = [side / stride for side in description.window]
    shape = list(features.shape) if isinstance(features, Tensor) else []
    if len(shape) != 2 + len(expected) or shape[2:] != expected:
        raise InputError(
            f"{source}: level {number} of the network's features has shape {shape or type(features).__name__}; "
            f"expected is [1, C, {', '.join(f'{side:g}' for side in expected)}].",
            remedy="Give submodules whose first output has the window's resolution and whose resolution halves from "
            "level to level, and a window that is a multiple of the last stride.",
        )
    return FeatureLevel(stride, shape[1])


def _head(network: nn.Module, description: NetworkDescription, channels: int, source: Path) -> tuple[Tensor, Tensor]:
    """Return the classifier's weight ``[K, C_0]`` and bias ``[K]``."""
    if description.classifier is None:
        return torch.zeros(0, channels), torch.zeros(0)
    layer = dict(network.named_modules()).get(description.classifier)
    if not isinstance(layer, nn.Conv3d) or layer.kernel_size != (1, 1, 1):
        raise InputError(
            f"{source}: 'classifier' names {description.classifier!r}, which is not a 1x1x1 convolution of the "
            "network.",
            remedy=_KEYS,
        )
    weight = layer.weight.detach().float().flatten(1)
    if weight.shape != (len(description.organs), channels):
        raise CheckpointError(
            f"The classifier {description.classifier!r} has weights of shape {list(weight.shape)}, but {source} lists "
            f"{len(description.organs)} organs, and level 0 has {channels} channels.",
            remedy="List every row of the classifier in 'organs', in order, and give as level 0 the features that the "
            "classifier reads.",
        )
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float()
    return weight, bias


def _bytes(tensor: onnx.TypeProto.Tensor) -> int:
    """Return the bytes of a graph's tensor; the dynamic dimension (the number of windows) counts as 1."""
    elements = 1
    for dimension in tensor.shape.dim:
        elements *= dimension.dim_value or 1
    item = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize if tensor.elem_type else 0
    return int(elements * item)
