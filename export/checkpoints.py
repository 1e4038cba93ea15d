"""Read and write weights: model files of this toolkit and published checkpoints. Reading never executes code.

A **model file** is one safetensors file. It contains ``encoder.<parameter>``, ``head.weight`` ``[K, C_0]`` and
``head.bias`` ``[K]``; its header contains a :class:`ModelDescription` as JSON under the key ``fseft_edge_model``.
``fseft-edge pretrain`` writes model files, and the built-in encoder is stored as a model file.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fseft_edge.runtime.errors import CheckpointError
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.system.atomic import atomic_path
from fseft_edge.runtime.system.json_text import parse_json

_log = logging.getLogger(__name__)

_METADATA_KEY = "fseft_edge_model"
_ENCODER_PREFIX = "encoder."
_HEAD_WEIGHT = "head.weight"
_HEAD_BIAS = "head.bias"
_KEYS_IN_A_MESSAGE = 3
# Phrases in torch.load's errors that mean: the file asks for code to be executed.
_SIGNS_OF_CODE = ("GLOBAL", "Can only create new object", "Can only build", "REDUCE")
# MONAI's research code stores the best score next to the weights as a NumPy number. The function that rebuilds a NumPy
# number only reads a type and bytes, so it is safe to allow. NumPy 1 stored this function under another name.
_scalar = cast(Callable[..., Any], np.float64(0.0).__reduce__()[0])
_PLAIN_NUMBERS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    _scalar,
    (_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]
_CHECK_THE_MODEL = "Check that --model names the network of this checkpoint (`fseft-edge models` lists all names)."
_FETCH_AGAIN = "Download the checkpoint again, and compare its size and its checksum with those of the source."


class ModelDescription(BaseModel):
    """Metadata in a model file.

    Attributes:
        schema_version: version of the format of this description.
        name: name of the model, e.g. ``edge_base``.
        architecture: architecture name for :func:`fseft_edge.runtime.encoder.networks.build_network`. For a network
            from the user's own code, :data:`fseft_edge.runtime.encoder.networks.IMPORTED`; such a network is never
            stored in a model file.
        settings: keyword arguments of the architecture.
        preprocessing: conversion of a CT into the network's input.
        window: size of the encoder's input window, ``[X, Y, Z]`` in voxels.
        organs: names of the head's rows, in order.
        training: record of the pre-training (data sets, seed, steps, time, scores) for the model card.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: str = Field(min_length=1)
    architecture: str
    settings: dict[str, JsonValue]
    preprocessing: Preprocessing
    window: tuple[int, int, int]
    organs: tuple[str, ...]
    training: dict[str, JsonValue] = Field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A trained encoder with its head.

    Attributes:
        description: metadata of the model.
        encoder: state dict of the network, float32 (counters keep their integer type).
        head_weight: weights of the head, float32 ``[K, C_0]``; row k is the zero-shot classifier of
            ``description.organs[k]``.
        head_bias: biases of the head, float32 ``[K]``.
        untrained: names of the submodules whose weights are random because the file contains no weights for them.
    """

    description: ModelDescription
    encoder: Mapping[str, Tensor]
    head_weight: Tensor
    head_bias: Tensor
    untrained: tuple[str, ...] = ()


def write_model_file(path: Path, model: ModelFile) -> None:
    """Write a model file: convolution weights in float16; vectors (biases, norm statistics) in float32.

    The same model always gives the same bytes.

    Args:
        path: model file to write; the file appears complete or not at all.
        model: model to write; its tensors may be on any device.

    Raises:
        CheckpointError: a weight is not finite in float16, or the shape of the head does not match the organs.
    """
    _check_head(model.description, model.head_weight, model.head_bias, source=path.name)
    tensors = {f"{_ENCODER_PREFIX}{key}": _stored(value) for key, value in model.encoder.items()}
    tensors[_HEAD_WEIGHT] = model.head_weight.detach().float().cpu().contiguous()
    tensors[_HEAD_BIAS] = model.head_bias.detach().float().cpu().contiguous()
    unfit = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if unfit:
        raise CheckpointError(
            f"Some weights of the model {model.description.name} are infinite or NaN in float16: {first_names(unfit)}.",
            remedy="The training diverged. Lower the learning rate and train again.",
        )
    with atomic_path(path) as temporary:
        # save_file is not used, because it reports a full disk as a SafetensorError and not as an OSError.
        temporary.write_bytes(save(tensors, metadata={_METADATA_KEY: model.description.model_dump_json()}))


def read_model_file(path: Path) -> ModelFile:
    """Return the model of a model file, as float32 on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, not a model file, or has an unknown schema version.
    """
    tensors = _load_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
    if _METADATA_KEY not in metadata or not {_HEAD_WEIGHT, _HEAD_BIAS} <= tensors.keys():
        raise CheckpointError(
            f"{path} is a safetensors file, but not a model file of fseft-edge.",
            remedy="Give a file that `fseft-edge pretrain` wrote, or name the published model with --model.",
        )
    description = _parse_description(metadata[_METADATA_KEY], path)
    head_weight, head_bias = tensors.pop(_HEAD_WEIGHT).float(), tensors.pop(_HEAD_BIAS).float()
    _check_head(description, head_weight, head_bias, source=str(path))
    encoder = {
        key.removeprefix(_ENCODER_PREFIX): value.float() if value.is_floating_point() else value
        for key, value in tensors.items()
    }
    return ModelFile(description, encoder, head_weight, head_bias)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a published checkpoint, on the CPU, without executing code from the file.

    A checkpoint is a safetensors file or a ``torch.save`` file. In a ``torch.save`` file, the state dict may be an
    entry of a training checkpoint (``state_dict``, ``net`` or ``model``). The prefix ``module.`` of data-parallel
    training is removed from the names.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, or can only be loaded by executing code.
    """
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if not path.is_file():
        raise CheckpointError(f"The checkpoint {path} does not exist.", remedy="Check the path.")
    try:
        with warnings.catch_warnings():
            # A file with a pickle protocol that torch.load cannot read raises an error anyway.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            with torch.serialization.safe_globals(_PLAIN_NUMBERS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler may raise any exception on a damaged file
        if isinstance(error, pickle.UnpicklingError) and any(sign in str(error) for sign in _SIGNS_OF_CODE):
            raise CheckpointError(
                f"{path} contains more than weights. Loading the file would execute code from the file.",
                remedy="Ask the authors for a file that contains only weights (a safetensors file, or torch.save of a "
                "state dict).",
            ) from error
        raise CheckpointError(f"{path} is truncated, or is not a PyTorch checkpoint.", remedy=_FETCH_AGAIN) from error
    return _state_dict(content, path)


def load_weights(
    network: nn.Module, weights: Mapping[str, Tensor], *, source: str, remedy: str = _CHECK_THE_MODEL
) -> None:
    """Copy a state dict into a network. If one key does not match, copy nothing.

    Args:
        network: network that receives the weights.
        weights: complete state dict of the network.
        source: file or model from which the weights come; used in the error message.
        remedy: remedy of the error.

    Raises:
        CheckpointError: keys are missing, unexpected, or have another shape. The message contains the first of these
            keys; the log contains all.
    """
    expected = network.state_dict()
    findings = {
        "missing": [key for key in expected if key not in weights],
        "unexpected": [key for key in weights if key not in expected],
        "of another shape": [
            f"{key} {list(weights[key].shape)} instead of {list(value.shape)}"
            for key, value in expected.items()
            if key in weights and weights[key].shape != value.shape
        ],
    }
    problems = [f"{len(keys)} {kind} ({first_names(keys)})" for kind, keys in findings.items() if keys]
    if problems:
        for kind, keys in findings.items():
            _log.info("%s: %d %s: %s", source, len(keys), kind, ", ".join(keys) or "none")
        raise CheckpointError(
            f"The weights in {source} do not match the expected network: {'; '.join(problems)}.", remedy=remedy
        )
    network.load_state_dict(dict(weights))


def first_names(names: Iterable[str]) -> str:
    """Return the first few names as text for an error message."""
    listed = list(names)
    shown = ", ".join(listed[:_KEYS_IN_A_MESSAGE])
    return f"{shown}, ..." if len(listed) > _KEYS_IN_A_MESSAGE else shown


def _stored(value: Tensor) -> Tensor:
    """Return a parameter in the number format of a model file."""
    half = value.is_floating_point() and value.ndim > 1
    return value.detach().to("cpu", torch.float16 if half else value.dtype).contiguous()


def _check_head(description: ModelDescription, weight: Tensor, bias: Tensor, *, source: str) -> None:
    rows = len(description.organs)
    if weight.ndim != 2 or weight.shape[0] != rows or bias.shape != (rows,):
        raise CheckpointError(
            f"The head in {source} has weights of shape {list(weight.shape)} and biases of shape {list(bias.shape)}, "
            f"but the description lists {rows} organs.",
            remedy="Write one row of weights and one bias for each organ.",
        )


def _parse_description(text: str, path: Path) -> ModelDescription:
    try:
        return ModelDescription.model_validate_json(text)
    except ValidationError as error:
        try:
            version = parse_json(text).get("schema_version")
        except (ValueError, AttributeError):
            version = None
        raise CheckpointError(
            f"This version of fseft-edge cannot read the description in {path} (schema version {version}).",
            remedy="Update fseft-edge, or train the model again with this version.",
        ) from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"The model file {path} does not exist.", remedy="Check the path.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated, or is not a safetensors file.", remedy=_FETCH_AGAIN) from error


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """Return the state dict from the content of a checkpoint."""
    if isinstance(content, Mapping):
        for key in ("state_dict", "net", "model"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f"{path} does not contain a state dict of tensors.",
            remedy="Give the file with the network's weights, not an optimiser state or a whole program.",
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}
