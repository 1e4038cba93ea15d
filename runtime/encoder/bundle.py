"""EncoderBundle: a frozen encoder on disk. All files are verified when the bundle is opened.

An encoder bundle is a folder ``NAME.encoder/``:

=======================  ===========================================================================
``manifest.json``        :class:`BundleManifest`; its last entry is the sha256 of the manifest itself
``encoder.safetensors``  weights of the network, for the torch backend
``head.safetensors``     pre-trained classifier, ``weight`` ``[K, C_0]`` and ``bias`` ``[K]``
``encoder.onnx``         ONNX graph in float32, for the other backends; optional
``encoder.mixed.onnx``   ONNX graph in mixed precision (float16 where that is safe); optional
``engines/``             graphs compiled for GPUs, added later (:mod:`fseft_edge.runtime.encoder.engine_files`)
=======================  ===========================================================================

The manifest lists all files except the files in ``engines/``, which have their own checksums.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fseft_edge.runtime.encoder.networks import IMPORTED, build_network
from fseft_edge.runtime.encoder.networks.base import FeatureLevel, FeatureNetwork, WholeScan
from fseft_edge.runtime.errors import EncoderBundleError
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.system.atomic import atomic_folder
from fseft_edge.runtime.system.json_text import parse_json

MANIFEST = "manifest.json"
WEIGHTS = "encoder.safetensors"
HEAD = "head.safetensors"
GRAPH = "encoder.onnx"
MIXED_GRAPH = "encoder.mixed.onnx"

Precision = Literal["float32", "mixed", "bfloat16"]
"""Precision of the computation. ``mixed``: float16, with normalisations, softmax and sums in float32. ``bfloat16``: the
engine chooses which operations compute in bfloat16."""

LEAST_DSC = 0.998
"""Least DSC between the head's masks in float32 and in a lower precision; below it, ``auto`` does not use the lower
precision."""

_SCHEMA_VERSIONS = (1, 2, 3)
_SELF = "manifest_sha256"
_NO_DIGEST = "0" * 64
_LARGEST_WINDOW = 4096
_EXPORT_AGAIN = (
    "Export the encoder again (merge a fine-tuned encoder again), or copy the whole folder again from its source."
)


class ParityReport(BaseModel):
    """Result of the comparison between a backend's features and PyTorch's features.

    Attributes:
        backend: name of the compared backend, e.g. ``onnxruntime``.
        precision: precision of the backend's computation.
        version: version of the backend's library.
        source: content of the compared windows: parts of CTs, or seeded noise.
        windows: number of compared windows.
        gate: largest relative error that passes.
        relative_error: ``max|a - b| / max|a|`` for each level, finest first; a are PyTorch's features, b the backend's.
        mask_dsc: least DSC between the head's masks from both features, over the organs that the head finds with high
            confidence; None if no CT was compared, or the head finds no organ with high confidence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str
    precision: Precision = "float32"
    version: str
    source: Literal["ct", "noise"]
    windows: int
    gate: float
    relative_error: tuple[float, ...]
    mask_dsc: float | None = None

    @property
    def shortcoming(self) -> str | None:
        """Reason why ``auto`` does not use the backend at this precision; None if ``auto`` may use it."""
        if not all(error <= self.gate for error in self.relative_error):
            return f"relative error {max(self.relative_error):.1e} exceeds the gate {self.gate:.0e}"
        if self.precision == "float32":
            return None
        if self.mask_dsc is None:
            return f"{self.precision} was not compared on a CT that contains the classifier's organs (--parity-ct)"
        if self.mask_dsc < LEAST_DSC:
            return (
                f"the DSC between its masks in {self.precision} and the masks in float32 is {self.mask_dsc:.4f}, "
                f"below {LEAST_DSC}"
            )
        return None


class BundleManifest(BaseModel):
    """Contents and origin of an encoder bundle.

    Attributes:
        schema_version: version of the format of this manifest.
        name: name of the model, e.g. ``edge_base``.
        architecture: architecture name for :func:`fseft_edge.runtime.encoder.networks.build_network`, or
            :data:`fseft_edge.runtime.encoder.networks.IMPORTED`.
        settings: keyword arguments of the architecture.
        precision: number format of the features.
        preprocessing: conversion of a CT into the encoder's input.
        window: size of the encoder's input window, ``[X, Y, Z]`` in voxels.
        levels: levels of the feature pyramid, finest first.
        whole_scan: how the encoder computes a whole scan in one pass; None if it computes a scan in windows.
        organs: names of the head's rows, in order.
        untrained: names of the submodules whose weights are random because the checkpoint contains no weights for them.
        checkpoint_sha256: sha256 of the file from which the weights were read.
        weights_sha256: sha256 of the names, types, shapes and values of the weights, independent of the file format.
        files: sha256 of every other file of the bundle, by file name.
        tools: version of every package that wrote the bundle, by package name.
        parity: parity reports, by :func:`parity_key`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1, 2, 3] = 3
    name: str = Field(min_length=1)
    architecture: str
    settings: dict[str, JsonValue]
    precision: Literal["float32"] = "float32"
    preprocessing: Preprocessing
    window: tuple[int, int, int]
    levels: tuple[FeatureLevel, ...]
    whole_scan: WholeScan | None = None
    organs: tuple[str, ...]
    untrained: tuple[str, ...] = ()
    checkpoint_sha256: str
    weights_sha256: str
    files: dict[str, str]
    tools: dict[str, str]
    parity: dict[str, ParityReport]

    @model_validator(mode="after")
    def _levels_divide_the_window(self) -> Self:
        if not self.levels or min(min(level.stride, level.channels) for level in self.levels) < 1:
            raise ValueError("there is no level, or a level has no stride or no channels")
        if not all(1 <= length <= _LARGEST_WINDOW for length in self.window):
            raise ValueError(f"a side of the window is not between 1 and {_LARGEST_WINDOW} voxels")
        if any(length % level.stride for length in self.window for level in self.levels):
            raise ValueError("the window is not a multiple of the strides of the levels")
        if self.whole_scan is not None:
            multiple, context = self.whole_scan.multiple, self.whole_scan.context
            if not 1 <= multiple <= context <= _LARGEST_WINDOW or context % multiple:
                raise ValueError("the numbers of voxels in whole_scan are not possible")
            if any(multiple % level.stride for level in self.levels) or any(side % multiple for side in self.window):
                raise ValueError("whole_scan does not fit the levels and the window")
        return self


@dataclass(frozen=True, eq=False)
class BundleContents:
    """Data from which an encoder bundle is written.

    Attributes:
        name, architecture, settings, preprocessing, window, whole_scan, organs, untrained, checkpoint_sha256, tools,
            parity: entries of :class:`BundleManifest`.
        network: network of the architecture, with its weights.
        head_weight: weights of the head, ``[K, C_0]``.
        head_bias: biases of the head, ``[K]``.
        graph: ONNX file of the network in float32, or ``None``.
        mixed_graph: ONNX file of the network in mixed precision, or ``None``.
    """

    name: str
    architecture: str
    settings: dict[str, JsonValue]
    preprocessing: Preprocessing
    window: tuple[int, int, int]
    organs: tuple[str, ...]
    checkpoint_sha256: str
    tools: dict[str, str]
    parity: dict[str, ParityReport]
    network: FeatureNetwork
    head_weight: Tensor
    head_bias: Tensor
    graph: Path | None
    mixed_graph: Path | None = None
    untrained: tuple[str, ...] = ()
    whole_scan: WholeScan | None = None


@dataclass(frozen=True, eq=False)
class EncoderBundle:
    """An encoder bundle whose files are complete and unchanged.

    Attributes:
        path: folder of the bundle.
        manifest: contents and origin of the bundle.
    """

    path: Path
    manifest: BundleManifest

    @classmethod
    def open(cls, path: Path) -> EncoderBundle:
        """Return the bundle at ``path`` after checking every file's sha256.

        Raises:
            EncoderBundleError: a file is missing or has changed, or the schema version is unknown.
        """
        manifest = _read_manifest(path)
        for name in (WEIGHTS, HEAD):
            if name not in manifest.files:
                raise EncoderBundleError(f"{path / MANIFEST} has no checksum of {name}.", remedy=_EXPORT_AGAIN)
        for name, expected in sorted(manifest.files.items()):
            file = path / name
            if not file.is_file():
                raise EncoderBundleError(f"The file {file} of the encoder bundle is missing.", remedy=_EXPORT_AGAIN)
            if sha256_of_file(file) != expected:
                raise EncoderBundleError(f"{file} has changed since the encoder was exported.", remedy=_EXPORT_AGAIN)
        return cls(path, manifest)

    @classmethod
    def write(cls, path: Path, contents: BundleContents) -> EncoderBundle:
        """Write a bundle and return it. The bundle appears complete or not at all.

        The same contents always give the same bytes.

        Raises:
            UsageError: ``path`` already exists.
            OutOfSpaceError: the disk is full or not writable.
        """
        state = {key: value.detach().cpu().contiguous() for key, value in contents.network.state_dict().items()}
        head = {"weight": contents.head_weight.float().contiguous(), "bias": contents.head_bias.float().contiguous()}
        with atomic_folder(path) as folder:
            for file, tensors in ((WEIGHTS, state), (HEAD, head)):
                # save_file is not used, because it reports a full disk as a SafetensorError and not as an OSError.
                (folder / file).write_bytes(save(tensors))
            for graph, name in ((contents.graph, GRAPH), (contents.mixed_graph, MIXED_GRAPH)):
                if graph is not None:
                    shutil.copyfile(graph, folder / name)
            manifest = BundleManifest(
                name=contents.name,
                architecture=contents.architecture,
                settings=contents.settings,
                preprocessing=contents.preprocessing,
                window=contents.window,
                levels=contents.network.levels,
                whole_scan=contents.whole_scan,
                organs=contents.organs,
                untrained=contents.untrained,
                checkpoint_sha256=contents.checkpoint_sha256,
                weights_sha256=sha256_of_weights(state),
                files={file.name: sha256_of_file(file) for file in sorted(folder.iterdir())},
                tools=contents.tools,
                parity=contents.parity,
            )
            (folder / MANIFEST).write_bytes(_render(manifest))
        return cls(path, manifest)

    @property
    def preprocessing(self) -> Preprocessing:
        """Conversion of a CT into the encoder's input."""
        return self.manifest.preprocessing

    @property
    def window(self) -> tuple[int, int, int]:
        """Size of the encoder's input window, ``[X, Y, Z]`` in voxels."""
        return self.manifest.window

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        """Levels of the feature pyramid, finest level first."""
        return self.manifest.levels

    @property
    def whole_scan(self) -> WholeScan | None:
        """How the encoder computes a whole scan in one pass; None if it computes a scan in windows."""
        return self.manifest.whole_scan

    @property
    def graph_only(self) -> bool:
        """Whether the bundle contains only a graph, because the network is user code that no bundle contains."""
        return self.manifest.architecture == IMPORTED

    @property
    def graph(self) -> Path | None:
        """ONNX file in float32, or ``None`` if the bundle contains no such file."""
        return self.path / GRAPH if GRAPH in self.manifest.files else None

    @property
    def mixed_graph(self) -> Path | None:
        """ONNX file in mixed precision, or ``None`` if the bundle contains no such file."""
        return self.path / MIXED_GRAPH if MIXED_GRAPH in self.manifest.files else None

    def graph_in(self, precision: Precision) -> Path | None:
        """Return the ONNX file for a precision; for bfloat16, engines convert the float32 graph."""
        return self.mixed_graph if precision == "mixed" else self.graph

    def parity(self, backend: str, precision: Precision) -> ParityReport | None:
        """Return the parity report of a backend and precision, or ``None`` if they were not compared."""
        return self.manifest.parity.get(parity_key(backend, precision))

    @cached_property
    def encoder_id(self) -> str:
        """The sha256 of everything that determines the features; equal for all backends."""
        return self._id(self.manifest.whole_scan)

    @property
    def id_with_windows(self) -> str:
        """The id of the same encoder with windows, which earlier versions wrote."""
        return self._id(None)

    def tiling_explained(self, encoder_id: str) -> str:
        """Return a sentence for a remedy if an id is that of this encoder with windows; else an empty text."""
        if self.manifest.whole_scan is None or encoder_id != self.id_with_windows:
            return ""
        return f"That encoder is {self.manifest.name} with windows: `fseft-edge export --tiling windows` writes it. "

    @property
    def tiling(self) -> str:
        """How the encoder computes a scan, for people: ``whole scans`` or ``windows of X x Y x Z voxels``."""
        return "whole scans" if self.manifest.whole_scan else f"windows of {' x '.join(map(str, self.window))} voxels"

    def _id(self, whole_scan: WholeScan | None) -> str:
        manifest = self.manifest
        identity = {
            "architecture": manifest.architecture,
            "settings": manifest.settings,
            "weights": manifest.weights_sha256,
            "precision": manifest.precision,
            "preprocessing": manifest.preprocessing.model_dump(mode="json"),
            "window": manifest.window,
            "levels": [asdict(level) for level in manifest.levels],
        }
        if whole_scan is not None:  # ids of encoders with windows are those of earlier versions
            identity["whole_scan"] = asdict(whole_scan)
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def network(self) -> FeatureNetwork:
        """Return the encoder as a PyTorch network in evaluation mode, on the CPU.

        Raises:
            EncoderBundleError: the architecture is unknown, the weights do not match the architecture, or the bundle
                contains only a graph (:attr:`graph_only`).
        """
        name, weights = self.manifest.architecture, self._tensors(WEIGHTS)
        try:
            network = build_network(name, **self.manifest.settings)
        except (RuntimeError, ValueError, ArithmeticError, AssertionError, MemoryError) as error:
            raise EncoderBundleError(
                f"The architecture {name} cannot be built with the settings in {self.path / MANIFEST}.",
                remedy=_EXPORT_AGAIN,
            ) from error
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise self._does_not_match(WEIGHTS) from error
        if network.levels != self.levels:
            raise self._does_not_match(MANIFEST)
        return network.eval()

    def head_weight(self) -> Tensor:
        """Return the head's weights, float32 ``[K, C_0]``; row k belongs to the organ ``manifest.organs[k]``.

        Raises:
            EncoderBundleError: the file is damaged, or does not match the organs and levels of the manifest.
        """
        return self._head()["weight"]

    def head_bias(self) -> Tensor:
        """Return the head's biases, float32 ``[K]``.

        Raises:
            EncoderBundleError: the file is damaged, or does not match the organs and levels of the manifest.
        """
        return self._head()["bias"]

    def _head(self) -> dict[str, Tensor]:
        head, rows = self._tensors(HEAD), len(self.manifest.organs)
        expected = {"weight": (rows, self.levels[0].channels), "bias": (rows,)}
        if {name: tuple(tensor.shape) for name, tensor in head.items()} != expected:
            raise self._does_not_match(HEAD)
        return {name: tensor.float() for name, tensor in head.items()}

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.path / name)
        except (SafetensorError, OSError) as error:
            raise EncoderBundleError(f"{self.path / name} is damaged.", remedy=_EXPORT_AGAIN) from error

    def _does_not_match(self, name: str) -> EncoderBundleError:
        return EncoderBundleError(
            f"The content of {self.path / name} does not match the architecture {self.manifest.architecture}, its "
            "levels and its organs.",
            remedy=_EXPORT_AGAIN,
        )


def parity_key(backend: str, precision: Precision) -> str:
    """Return the key of a parity report in the manifest, e.g. ``openvino`` or ``openvino-bfloat16``."""
    return backend if precision == "float32" else f"{backend}-{precision}"


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_weights(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a state dict's names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _render(manifest: BundleManifest) -> bytes:
    """Return the bytes of ``manifest.json``. Its last entry is the sha256 of these bytes with zeros in its place."""
    entries = {**manifest.model_dump(mode="json"), _SELF: _NO_DIGEST}
    text = f"{json.dumps(entries, indent=2, ensure_ascii=False)}\n".encode()
    before, _, after = text.rpartition(_NO_DIGEST.encode())
    return before + hashlib.sha256(text).hexdigest().encode() + after


def _read_manifest(path: Path) -> BundleManifest:
    file = path / MANIFEST
    if not file.is_file():
        raise EncoderBundleError(
            f"{path} is not an encoder bundle: the file {MANIFEST} is missing.",
            remedy="Give a folder that `fseft-edge export` wrote.",
        )
    content = file.read_bytes()
    try:
        entries = parse_json(content)
        version, digest = entries.pop("schema_version"), str(entries.pop(_SELF))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise EncoderBundleError(f"{file} is damaged: it is not a valid manifest.", remedy=_EXPORT_AGAIN) from error
    if version not in _SCHEMA_VERSIONS:
        raise EncoderBundleError(
            f"{file} has schema version {version}; this version of fseft-edge reads 1 to 3.",
            remedy="Update fseft-edge, or export the encoder again with this version.",
        )
    before, _, after = content.rpartition(digest.encode())
    if hashlib.sha256(before + _NO_DIGEST.encode() + after).hexdigest() != digest:
        raise EncoderBundleError(f"{file} has changed since the encoder was exported.", remedy=_EXPORT_AGAIN)
    try:
        return BundleManifest.model_validate_json(json.dumps({"schema_version": version, **entries}))
    except ValidationError as error:
        raise EncoderBundleError(f"This version of fseft-edge cannot read {file}.", remedy=_EXPORT_AGAIN) from error
