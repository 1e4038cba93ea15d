"""Engines: a bundle's graph compiled for NVIDIA GPUs, in files beside it.

They lie in ``NAME.encoder/engines/``, are made after the bundle and for each machine, and are no part of its manifest.

=====================================  ==============================================================================
``tensorrt_rtx-mixed-sm_86.engine``    what the library deserialises
``tensorrt_rtx-mixed-sm_86.json``      :class:`EngineDescription`: what it was made from, by and for
``tensorrt_rtx-mixed-sm_86.cache``     kernels that the RTX runtime compiled on this machine; may be missing
=====================================  ==============================================================================

An engine is used only where its description fits the bundle, the installed library and the GPU, and its bytes are the
ones that were built.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fseft_edge.runtime.encoder.bundle import EncoderBundle, ParityReport, Precision, sha256_of_file
from fseft_edge.runtime.errors import EngineError
from fseft_edge.runtime.system.atomic import atomic_path

EngineLibrary = Literal["tensorrt_rtx", "tensorrt"]

PORTABLE = "portable"
"""The target of an engine for every GPU of :data:`PORTABLE_FROM` or later that the library knows."""

PORTABLE_FROM = (8, 0)
"""Compute capability of the first GPUs that portable engines of both libraries run on (Ampere)."""

ENGINES = "engines"


class EngineTensor(BaseModel):
    """An input or output of an engine.

    Attributes:
        name: in the graph.
        number_format: e.g. ``float32``.
        shape: with -1 for the number of windows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    number_format: str
    shape: tuple[int, ...]


class EngineDescription(BaseModel):
    """What an engine was made from, by and for.

    Attributes:
        schema_version: of this file.
        library: which one built it.
        version: of that library; engines run in the version that built them.
        target: ``sm_86`` for GPUs of compute capability 8.6, or ``portable``.
        precision: which of the bundle's graphs it was made from.
        graph_sha256: of that graph's file.
        max_batch: it takes 1 to this many windows.
        tensors: inputs, then outputs.
        engine_sha256: of the engine's file.
        parity: how far its features are from PyTorch's, on a GPU of the machine that built or checked it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    library: EngineLibrary
    version: str
    target: str = Field(pattern=r"^(sm_\d{2,3}|portable)$")
    precision: Precision
    graph_sha256: str
    max_batch: int = Field(ge=1)
    tensors: tuple[EngineTensor, ...]
    engine_sha256: str
    parity: ParityReport | None = None


@dataclass(frozen=True)
class EngineFile:
    """An engine whose description fits, and whose bytes are the ones that were built."""

    path: Path
    description: EngineDescription

    @property
    def runtime_cache(self) -> Path:
        """Where the RTX runtime's compiled kernels are kept."""
        return self.path.with_suffix(".cache")


def target_of(capability: tuple[int, int]) -> str:
    """Return the target of GPUs of a compute capability: ``(8, 6)`` is ``sm_86``."""
    return f"sm_{capability[0]}{capability[1]}"


def engine_path(bundle: EncoderBundle, library: EngineLibrary, precision: Precision, target: str) -> Path:
    """Return where an engine lies, or would."""
    return bundle.path / ENGINES / f"{library}-{precision}-{target}.engine"


def write_description(path: Path, description: EngineDescription) -> EngineFile:
    """Write what is said of the engine at ``path``, and return both."""
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(f"{description.model_dump_json(indent=2)}\n", encoding="utf-8")
    return EngineFile(path, description)


def read_engine(
    bundle: EncoderBundle, library: EngineLibrary, version: str, precision: Precision, target: str
) -> EngineFile:
    """Return the bundle's engine for a target, checked.

    Args:
        bundle: it was made for.
        library: that runs it.
        version: of that library, as it is installed.
        precision: of the graph.
        target: ``sm_NN`` or ``portable``.

    Raises:
        EngineError: when there is none, or it was made from another graph or by another version, or is damaged.
    """
    path = engine_path(bundle, library, precision, target)
    build = f"Build it: fseft-edge build-engines {bundle.path} --target {target} --precision {precision}."
    sidecar = path.with_suffix(".json")
    if not path.is_file() or not sidecar.is_file():
        raise EngineError(f"There is no engine {path}.", remedy=build)
    try:
        description = EngineDescription.model_validate_json(sidecar.read_bytes())
    except ValidationError as error:
        raise EngineError(f"{sidecar} is damaged, or of another version of fseft-edge.", remedy=build) from error
    expected = (library, target, precision)
    if (description.library, description.target, description.precision) != expected:
        raise EngineError(f"{path} was made for another target, library or precision than its name says.", remedy=build)
    if description.version != version:
        raise EngineError(
            f"{path} was built by {library} {description.version}, and {version} is installed.", remedy=build
        )
    graph = bundle.graph_in(precision)
    if graph is None or bundle.manifest.files[graph.name] != description.graph_sha256:
        raise EngineError(f"{path} was built from another graph than the bundle's.", remedy=build)
    if sha256_of_file(path) != description.engine_sha256:
        raise EngineError(f"{path} is truncated or has changed since it was built.", remedy=build)
    return EngineFile(path, description)


def engine_for_gpu(
    bundle: EncoderBundle, library: EngineLibrary, version: str, precision: Precision, capability: tuple[int, int]
) -> EngineFile:
    """Return the engine for a GPU: the one made for its compute capability, else the portable one.

    Raises:
        EngineError: when there is neither, naming what is wrong with the first.
    """
    try:
        return read_engine(bundle, library, version, precision, target_of(capability))
    except EngineError:
        if capability < PORTABLE_FROM or not engine_path(bundle, library, precision, PORTABLE).exists():
            raise
    return read_engine(bundle, library, version, precision, PORTABLE)
