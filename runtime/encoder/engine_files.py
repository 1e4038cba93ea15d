"""Engine files: a bundle's graph compiled for NVIDIA GPUs.

The files are in ``NAME.encoder/engines/``. They are built for each machine after the export of the bundle, and the
bundle's manifest does not list them.

=====================================  ==============================================================================
``tensorrt_rtx-mixed-sm_86.engine``    engine that the library deserialises
``tensorrt_rtx-mixed-sm_86.json``      :class:`EngineDescription`: origin, target and checksum of the engine
``tensorrt_rtx-mixed-sm_86.cache``     kernels that the RTX runtime compiled on this machine; optional
=====================================  ==============================================================================

An engine is used only if its description matches the bundle, the installed library and the GPU, and if its bytes have
not changed since the build.
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
"""Target of an engine for all GPUs of compute capability :data:`PORTABLE_FROM` or later that the library supports."""

PORTABLE_FROM = (8, 0)
"""Lowest compute capability on which portable engines of both libraries run (Ampere)."""

ENGINES = "engines"


class EngineTensor(BaseModel):
    """An input or output of an engine.

    Attributes:
        name: name of the tensor in the graph.
        number_format: number format of the tensor, e.g. ``float32``.
        shape: shape of the tensor, with -1 for the number of windows and for other sizes that are not fixed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    number_format: str
    shape: tuple[int, ...]


class EngineDescription(BaseModel):
    """Description of an engine: origin, target and checksum.

    Attributes:
        schema_version: version of the format of this description.
        library: library that built the engine.
        version: version of the library; an engine only runs in the version that built it.
        target: ``sm_86`` for GPUs of compute capability 8.6, or ``portable``.
        precision: precision of the bundle's graph from which the engine was built.
        graph_sha256: sha256 of the graph's file.
        max_batch: largest number of windows that the engine accepts at once.
        largest: largest size of a window, ``[X, Y, Z]`` in voxels, if the engine accepts windows of any smaller size;
            None if it accepts one size.
        tensors: inputs, followed by outputs.
        engine_sha256: sha256 of the engine's file.
        parity: result of the comparison with PyTorch on a GPU of the machine that built or checked the engine; None if
            the engine was not compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1, 2] = 2
    library: EngineLibrary
    version: str
    target: str = Field(pattern=r"^(sm_\d{2,3}|portable)$")
    precision: Precision
    graph_sha256: str
    max_batch: int = Field(ge=1)
    largest: tuple[int, int, int] | None = None
    tensors: tuple[EngineTensor, ...]
    engine_sha256: str
    parity: ParityReport | None = None


@dataclass(frozen=True)
class EngineFile:
    """An engine file with its description. :func:`read_engine` has checked both."""

    path: Path
    description: EngineDescription

    @property
    def runtime_cache(self) -> Path:
        """Path of the file with the kernels that the RTX runtime compiled."""
        return self.path.with_suffix(".cache")


def target_of(capability: tuple[int, int]) -> str:
    """Return the target of GPUs of a compute capability: ``(8, 6)`` is ``sm_86``."""
    return f"sm_{capability[0]}{capability[1]}"


def engine_path(bundle: EncoderBundle, library: EngineLibrary, precision: Precision, target: str) -> Path:
    """Return the path of an engine; the file may not exist."""
    return bundle.path / ENGINES / f"{library}-{precision}-{target}.engine"


def write_description(path: Path, description: EngineDescription) -> EngineFile:
    """Write the description of the engine at ``path``, and return engine and description."""
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(f"{description.model_dump_json(indent=2)}\n", encoding="utf-8")
    return EngineFile(path, description)


def read_engine(
    bundle: EncoderBundle, library: EngineLibrary, version: str, precision: Precision, target: str
) -> EngineFile:
    """Return the bundle's engine for a target, after checking the engine file.

    Args:
        bundle: encoder bundle of the engine.
        library: library that runs the engine.
        version: installed version of the library.
        precision: precision of the graph.
        target: ``sm_NN`` or ``portable``.

    Raises:
        EngineError: the engine does not exist, was built from another graph or by another version, or is damaged.
    """
    path = engine_path(bundle, library, precision, target)
    build = f"Build the engine: fseft-edge build-engines {bundle.path} --target {target} --precision {precision}."
    sidecar = path.with_suffix(".json")
    if not path.is_file() or not sidecar.is_file():
        raise EngineError(f"The engine {path} or its description {sidecar.name} does not exist.", remedy=build)
    try:
        description = EngineDescription.model_validate_json(sidecar.read_bytes())
    except ValidationError as error:
        raise EngineError(
            f"{sidecar} is damaged, or was written by another version of fseft-edge.", remedy=build
        ) from error
    expected = (library, target, precision)
    if (description.library, description.target, description.precision) != expected:
        raise EngineError(
            f"The description of {path} states another target, library or precision than the file name.", remedy=build
        )
    if description.version != version:
        raise EngineError(
            f"{path} was built by {library} {description.version}, but version {version} is installed.", remedy=build
        )
    graph = bundle.graph_in(precision)
    if graph is None or bundle.manifest.files[graph.name] != description.graph_sha256:
        raise EngineError(f"{path} was not built from the graph of the bundle {bundle.path}.", remedy=build)
    if sha256_of_file(path) != description.engine_sha256:
        raise EngineError(f"{path} is truncated, or has changed since the build.", remedy=build)
    return EngineFile(path, description)


def engine_for_gpu(
    bundle: EncoderBundle, library: EngineLibrary, version: str, precision: Precision, capability: tuple[int, int]
) -> EngineFile:
    """Return the engine for a GPU: the engine for its compute capability, else the portable engine.

    Raises:
        EngineError: no engine can be used. The message describes the engine for the compute capability if there is no
            portable engine for this GPU.
    """
    try:
        return read_engine(bundle, library, version, precision, target_of(capability))
    except EngineError:
        if capability < PORTABLE_FROM or not engine_path(bundle, library, precision, PORTABLE).exists():
            raise
    return read_engine(bundle, library, version, precision, PORTABLE)
