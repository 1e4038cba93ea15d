"""Weights on disk: the toolkit's own model files, and published checkpoints, neither of which may execute code.

A **model file** is what ``fseft-edge pretrain`` writes and what the built-in encoder is: one safetensors file with
``encoder.<parameter>``, ``head.weight`` ``[K, C_0]`` and ``head.bias`` ``[K]``, and a :class:`ModelDescription` as JSON
under ``fseft_edge_model`` in its header.
"""

from __future__ import annotations

import json
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

_log = logging.getLogger(__name__)

_METADATA_KEY = "fseft_edge_model"
_ENCODER_PREFIX = "encoder."
_HEAD_WEIGHT = "head.weight"
_HEAD_BIAS = "head.bias"
_KEYS_IN_A_MESSAGE = 3
_SIGNS_OF_CODE = ("GLOBAL", "Can only create new object", "Can only build", "REDUCE")  # of torch.load's refusals
# MONAI's research code stores the best score beside the weights as a NumPy number. What builds one takes a type and its
# bytes and calls nothing; NumPy 1 wrote it under another name.
_scalar = cast(Callable[..., Any], np.float64(0.0).__reduce__()[0])
_PLAIN_NUMBERS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    _scalar,
    (_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]
_CHECK_THE_MODEL = "Check that --model names the network that the checkpoint was made for (`fseft-edge models`)."
_FETCH_AGAIN = "Fetch the checkpoint again and compare its size and checksum with its source."


class ModelDescription(BaseModel):
    """What a model file says about itself.

    Attributes:
        schema_version: of this description.
        name: of the model, e.g. ``edge_base``.
        architecture: a name that :func:`fseft_edge.runtime.encoder.networks.build_network` knows; for a network of the
            user's own, which no model file holds, :data:`fseft_edge.runtime.encoder.networks.IMPORTED`.
        settings: keyword arguments of that architecture.
        preprocessing: how a CT becomes the network's input.
        window: ``[X, Y, Z]`` voxels of the encoder's input.
        organs: names of the head's rows, in order.
        training: how it was made (data sets, seed, steps, time, scores), for the model card.
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
        description: what it is.
        encoder: the network's state dict, float32 (counters keep their integer type).
        head_weight: float32 ``[K, C_0]``, row k is the zero-shot classifier of ``description.organs[k]``.
        head_bias: float32 ``[K]``.
        untrained: submodules of the network that the file had no weights for: theirs are random.
    """

    description: ModelDescription
    encoder: Mapping[str, Tensor]
    head_weight: Tensor
    head_bias: Tensor
    untrained: tuple[str, ...] = ()


def write_model_file(path: Path, model: ModelFile) -> None:
    """Write a model file: convolution weights in half precision, vectors (biases, norm statistics) in single.

    The same model gives the same bytes.

    Args:
        path: where to; appears complete or not at all.
        model: what to write; tensors may lie on any device.

    Raises:
        CheckpointError: when a weight is not finite in half precision, or the head does not fit the organs.
    """
    _check_head(model.description, model.head_weight, model.head_bias, source=path.name)
    tensors = {f"{_ENCODER_PREFIX}{key}": _stored(value) for key, value in model.encoder.items()}
    tensors[_HEAD_WEIGHT] = model.head_weight.detach().float().cpu().contiguous()
    tensors[_HEAD_BIAS] = model.head_bias.detach().float().cpu().contiguous()
    unfit = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if unfit:
        raise CheckpointError(
            f"The weights {first_names(unfit)} of {model.description.name} are not finite in half precision.",
            remedy="Training diverged: lower the learning rate and train again.",
        )
    with atomic_path(path) as temporary:
        # Not save_file: it reports a full disk as a SafetensorError.
        temporary.write_bytes(save(tensors, metadata={_METADATA_KEY: model.description.model_dump_json()}))


def read_model_file(path: Path) -> ModelFile:
    """Return the model in a file that :func:`write_model_file` wrote, as float32 on the CPU.

    Raises:
        CheckpointError: when the file is missing, truncated, no model file, or of an unknown schema.
    """
    tensors = _load_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
    if _METADATA_KEY not in metadata or not {_HEAD_WEIGHT, _HEAD_BIAS} <= tensors.keys():
        raise CheckpointError(
            f"{path} is a safetensors file but not a model file of fseft-edge.",
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
    """Return the tensors of a published checkpoint, on the CPU, without executing anything it holds.

    A checkpoint is a safetensors file or a ``torch.save`` file; of the latter, a state dict inside a training
    checkpoint (``state_dict``, ``net``, ``model``) is taken, and the prefix ``module.`` of data-parallel
    training is removed.

    Raises:
        CheckpointError: when the file is missing, truncated, of another format, or would have to execute code.
    """
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}.", remedy="Check the path.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # what it cannot read, it refuses
            with torch.serialization.safe_globals(_PLAIN_NUMBERS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # in a damaged file the unpickler may fail anywhere, with anything
        if isinstance(error, pickle.UnpicklingError) and any(sign in str(error) for sign in _SIGNS_OF_CODE):
            raise CheckpointError(
                f"{path} holds more than weights: loading it would execute code from the file, so it is refused.",
                remedy="Ask its source for a file of weights only (safetensors, or torch.save of a state dict).",
            ) from error
        raise CheckpointError(f"{path} is truncated or no checkpoint of PyTorch.", remedy=_FETCH_AGAIN) from error
    return _state_dict(content, path)


def load_weights(
    network: nn.Module, weights: Mapping[str, Tensor], *, source: str, remedy: str = _CHECK_THE_MODEL
) -> None:
    """Copy weights into a network, all of them or none.

    Args:
        network: receives them.
        weights: its whole state dict.
        source: the file or model they come from, for the message.
        remedy: for the message.

    Raises:
        CheckpointError: naming the first keys that are missing, unexpected or of another shape; the log has all.
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
            f"The weights in {source} are not those of the expected network: {'; '.join(problems)}.", remedy=remedy
        )
    network.load_state_dict(dict(weights))


def first_names(names: Iterable[str]) -> str:
    """Return the first few names as text, for a message."""
    listed = list(names)
    shown = ", ".join(listed[:_KEYS_IN_A_MESSAGE])
    return f"{shown}, ..." if len(listed) > _KEYS_IN_A_MESSAGE else shown


def _stored(value: Tensor) -> Tensor:
    """Return a parameter as a model file holds it."""
    half = value.is_floating_point() and value.ndim > 1
    return value.detach().to("cpu", torch.float16 if half else value.dtype).contiguous()


def _check_head(description: ModelDescription, weight: Tensor, bias: Tensor, *, source: str) -> None:
    rows = len(description.organs)
    if weight.ndim != 2 or weight.shape[0] != rows or bias.shape != (rows,):
        raise CheckpointError(
            f"The head in {source} has weights {list(weight.shape)} and bias {list(bias.shape)} for {rows} organs.",
            remedy="Write one row of weights and one bias per organ.",
        )


def _parse_description(text: str, path: Path) -> ModelDescription:
    try:
        return ModelDescription.model_validate_json(text)
    except ValidationError as error:
        try:
            version = json.loads(text).get("schema_version")
        except (ValueError, AttributeError):
            version = None
        raise CheckpointError(
            f"The description in {path} (schema {version}) is not one that this version reads.",
            remedy="Update fseft-edge, or train the model again with this version.",
        ) from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"There is no model file at {path}.", remedy="Check the path.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file.", remedy=_FETCH_AGAIN) from error


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """Return the state dict in what a checkpoint holds."""
    if isinstance(content, Mapping):
        for key in ("state_dict", "net", "model"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f"{path} holds no state dict of tensors.",
            remedy="Give the file with the network's weights, not an optimiser's state or a whole program.",
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}
