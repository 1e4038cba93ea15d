"""EncoderBundle: a frozen encoder on disk, verified whenever it is opened.

A folder ``NAME.encoder/``:

=======================  ===========================================================================
``manifest.json``        :class:`BundleManifest`; its last entry is the sha256 of the manifest itself
``encoder.safetensors``  the network's weights, for the torch backend
``head.safetensors``     the pre-trained classifier, ``weight`` ``[K, C_0]`` and ``bias`` ``[K]``
``encoder.onnx``         the graph for the other backends, in float32; may be missing
``encoder.mixed.onnx``   the same with float16 arithmetic where that is safe; may be missing
``engines/``             graphs compiled for GPUs, made later (:mod:`fseft_edge.runtime.encoder.engine_files`)
=======================  ===========================================================================

The manifest lists every file but those in ``engines/``, which vouch for themselves.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors.torch import load_file, save
from torch import Tensor

from fseft_edge.runtime.encoder.networks import IMPORTED, build_network
from fseft_edge.runtime.encoder.networks.base import FeatureLevel, FeatureNetwork
from fseft_edge.runtime.errors import EncoderBundleError
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.system.atomic import atomic_folder

MANIFEST = "manifest.json"
WEIGHTS = "encoder.safetensors"
HEAD = "head.safetensors"
GRAPH = "encoder.onnx"
MIXED_GRAPH = "encoder.mixed.onnx"

Precision = Literal["float32", "mixed", "bfloat16"]
"""What features are computed in: ``mixed`` is float16 with norms, softmax and sums in float32; ``bfloat16`` is the
engine's own choice of where."""

LEAST_DSC = 0.998
"""Below this agreement of the head's masks, a precision below float32 is not chosen by itself."""

_SCHEMA_VERSIONS = (1, 2)
_SELF = "manifest_sha256"
_NO_DIGEST = "0" * 64
_EXPORT_AGAIN = "Export the encoder again (a fine-tuned one: merge), or copy the whole folder again from its source."


class ParityReport(BaseModel):
    """How far a backend's features are from PyTorch's.

    Attributes:
        backend: which one was compared, e.g. ``onnxruntime``.
        precision: what it computed in.
        version: of that backend.
        source: what the windows held, parts of real CTs or seeded noise.
        windows: how many were compared.
        gate: the largest relative error that passes.
        relative_error: per level, finest first: ``max|a - b| / max|a|`` with PyTorch's features a.
        mask_dsc: least DSC between the masks that the head makes of both, over the organs that it is sure to see; None
            where no CT was compared, or it is sure of none.
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
        """Why the backend is not chosen by itself at this precision; None where it may be."""
        if not all(error <= self.gate for error in self.relative_error):
            return f"relative error {max(self.relative_error):.1e} exceeds the gate {self.gate:.0e}"
        if self.precision == "float32":
            return None
        if self.mask_dsc is None:
            return f"{self.precision} was not compared on a CT that shows the classifier's organs (--parity-ct)"
        if self.mask_dsc < LEAST_DSC:
            return f"masks in {self.precision} agree with float32 to a DSC of {self.mask_dsc:.4f}, below {LEAST_DSC}"
        return None


class BundleManifest(BaseModel):
    """What an encoder bundle holds and where it came from.

    Attributes:
        schema_version: of this manifest.
        name: of the model, e.g. ``edge_base``.
        architecture: a name that :func:`fseft_edge.runtime.encoder.networks.build_network` knows, or
            :data:`fseft_edge.runtime.encoder.networks.IMPORTED`.
        settings: keyword arguments of that architecture.
        precision: number format that the features are computed in.
        preprocessing: how a CT becomes the encoder's input.
        window: ``[X, Y, Z]`` voxels of the encoder's input.
        levels: the feature pyramid, finest first.
        organs: names of the head's rows, in order.
        untrained: submodules of the network that the checkpoint had no weights for: theirs are random.
        checkpoint_sha256: of the file that the weights came from.
        weights_sha256: of names, types, shapes and values of the weights, whatever file they are in.
        files: name to sha256 of every other file of the bundle.
        tools: name to version of what made the bundle.
        parity: by :func:`parity_key`, how far a backend's features are from PyTorch's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1, 2] = 2
    name: str = Field(min_length=1)
    architecture: str
    settings: dict[str, JsonValue]
    precision: Literal["float32"] = "float32"
    preprocessing: Preprocessing
    window: tuple[int, int, int]
    levels: tuple[FeatureLevel, ...]
    organs: tuple[str, ...]
    untrained: tuple[str, ...] = ()
    checkpoint_sha256: str
    weights_sha256: str
    files: dict[str, str]
    tools: dict[str, str]
    parity: dict[str, ParityReport]


@dataclass(frozen=True, eq=False)
class BundleContents:
    """What an encoder bundle is written from.

    Attributes:
        name, architecture, settings, preprocessing, window, organs, checkpoint_sha256, tools, parity: see
            :class:`BundleManifest`.
        network: of that architecture, with its weights.
        head_weight: ``[K, C_0]``.
        head_bias: ``[K]``.
        graph: the network as an ONNX file, or ``None``.
        mixed_graph: the same in mixed precision, or ``None``.
        untrained: see :class:`BundleManifest`.
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


@dataclass(frozen=True, eq=False)
class EncoderBundle:
    """An encoder bundle whose files are all there and unchanged.

    Attributes:
        path: its folder.
        manifest: what it holds.
    """

    path: Path
    manifest: BundleManifest

    @classmethod
    def open(cls, path: Path) -> EncoderBundle:
        """Return the bundle at ``path`` after checking every file's sha256.

        Raises:
            EncoderBundleError: naming the file that is missing or changed, or the schema that is unknown.
        """
        manifest = _read_manifest(path)
        for name, expected in sorted(manifest.files.items()):
            file = path / name
            if not file.is_file():
                raise EncoderBundleError(f"The encoder bundle lacks {file}.", remedy=_EXPORT_AGAIN)
            if sha256_of_file(file) != expected:
                raise EncoderBundleError(f"{file} has changed since the encoder was exported.", remedy=_EXPORT_AGAIN)
        return cls(path, manifest)

    @classmethod
    def write(cls, path: Path, contents: BundleContents) -> EncoderBundle:
        """Write a bundle, complete or not at all, and return it. The same contents give the same bytes.

        Raises:
            UsageError: when something is at ``path`` already.
            OutOfSpaceError: when the disk is full or not writable.
        """
        state = {key: value.detach().cpu().contiguous() for key, value in contents.network.state_dict().items()}
        head = {"weight": contents.head_weight.float().contiguous(), "bias": contents.head_bias.float().contiguous()}
        with atomic_folder(path) as folder:
            for file, tensors in ((WEIGHTS, state), (HEAD, head)):
                (folder / file).write_bytes(save(tensors))  # save_file reports a full disk as a SafetensorError
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
        """How a CT becomes the encoder's input."""
        return self.manifest.preprocessing

    @property
    def window(self) -> tuple[int, int, int]:
        """``[X, Y, Z]`` voxels of the encoder's input."""
        return self.manifest.window

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        """The feature pyramid, finest level first."""
        return self.manifest.levels

    @property
    def graph_only(self) -> bool:
        """Whether the encoder's network is code that the bundle does not hold, so that only its graph can be run."""
        return self.manifest.architecture == IMPORTED

    @property
    def graph(self) -> Path | None:
        """The ONNX file, or ``None`` where the bundle was made without."""
        return self.path / GRAPH if GRAPH in self.manifest.files else None

    @property
    def mixed_graph(self) -> Path | None:
        """The ONNX file in mixed precision, or ``None`` where the bundle was made without."""
        return self.path / MIXED_GRAPH if MIXED_GRAPH in self.manifest.files else None

    def graph_in(self, precision: Precision) -> Path | None:
        """Return the ONNX file whose types are those of a precision; engines choose bfloat16 in the float32 one."""
        return self.mixed_graph if precision == "mixed" else self.graph

    def parity(self, backend: str, precision: Precision) -> ParityReport | None:
        """Return how far a backend's features are from PyTorch's, or ``None`` where that was not measured."""
        return self.manifest.parity.get(parity_key(backend, precision))

    @cached_property
    def encoder_id(self) -> str:
        """The sha256 of what determines the features; the same for every backend."""
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
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def network(self) -> FeatureNetwork:
        """Return the encoder as a PyTorch network in evaluation mode, on the CPU.

        Raises:
            EncoderBundleError: when the architecture is unknown, the weights are not its own, or the bundle is
                :attr:`graph_only`.
        """
        network = build_network(self.manifest.architecture, **self.manifest.settings)
        try:
            network.load_state_dict(load_file(self.path / WEIGHTS))
        except RuntimeError as error:
            raise EncoderBundleError(
                f"The weights in {self.path / WEIGHTS} are not those of {self.manifest.architecture}.",
                remedy=_EXPORT_AGAIN,
            ) from error
        return network.eval()

    def head_weight(self) -> Tensor:
        """Return the pre-trained classifier, float32 ``[K, C_0]``; row k is for the organ ``manifest.organs[k]``."""
        return load_file(self.path / HEAD)["weight"]

    def head_bias(self) -> Tensor:
        """Return the pre-trained classifier's bias, float32 ``[K]``."""
        return load_file(self.path / HEAD)["bias"]


def parity_key(backend: str, precision: Precision) -> str:
    """Return the name of a parity report in the manifest: ``openvino``, or ``openvino-bfloat16``."""
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
    """Return the manifest's file: JSON that ends with the sha256 of itself, taken with zeros in that place."""
    entries = {**manifest.model_dump(mode="json"), _SELF: _NO_DIGEST}
    text = f"{json.dumps(entries, indent=2, ensure_ascii=False)}\n".encode()
    before, _, after = text.rpartition(_NO_DIGEST.encode())
    return before + hashlib.sha256(text).hexdigest().encode() + after


def _read_manifest(path: Path) -> BundleManifest:
    file = path / MANIFEST
    if not file.is_file():
        raise EncoderBundleError(
            f"{path} is no encoder bundle: it has no {MANIFEST}.",
            remedy="Give a folder that `fseft-edge export` wrote.",
        )
    content = file.read_bytes()
    try:
        entries = json.loads(content)
        version, digest = entries.pop("schema_version"), str(entries.pop(_SELF))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise EncoderBundleError(f"{file} is damaged.", remedy=_EXPORT_AGAIN) from error
    if version not in _SCHEMA_VERSIONS:
        raise EncoderBundleError(
            f"{file} has schema version {version}; this version of fseft-edge reads 1 and 2.",
            remedy="Update fseft-edge, or export the encoder again with this version.",
        )
    before, _, after = content.rpartition(digest.encode())
    if hashlib.sha256(before + _NO_DIGEST.encode() + after).hexdigest() != digest:
        raise EncoderBundleError(f"{file} has changed since the encoder was exported.", remedy=_EXPORT_AGAIN)
    try:
        return BundleManifest.model_validate_json(json.dumps({"schema_version": version, **entries}))
    except ValidationError as error:
        raise EncoderBundleError(f"{file} is not a manifest that this version reads.", remedy=_EXPORT_AGAIN) from error
