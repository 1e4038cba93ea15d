"""Build engines: TensorRT-RTX or TensorRT compiles a bundle's ONNX graph for NVIDIA GPUs.

TensorRT-RTX builds an engine for any GPU type that it supports, also on a machine without a GPU. TensorRT builds only
for the GPU of the machine that builds.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fseft_edge.export.parity import Classifier, Engine, head_of, parity_reports
from fseft_edge.runtime.encoder.backends.tensorrt import EngineRunner
from fseft_edge.runtime.encoder.backends.tensorrt_library import LIBRARIES, fresh_logger, import_library, last_error
from fseft_edge.runtime.encoder.bundle import EncoderBundle, ParityReport, Precision
from fseft_edge.runtime.encoder.chunks import CORE
from fseft_edge.runtime.encoder.engine_files import (
    PORTABLE,
    PORTABLE_FROM,
    EngineDescription,
    EngineFile,
    EngineLibrary,
    EngineTensor,
    engine_path,
    read_engine,
    target_of,
    write_description,
)
from fseft_edge.runtime.errors import EncoderBundleError, EngineError, MissingBackendError, UsageError
from fseft_edge.runtime.system.atomic import atomic_path

_TARGET = re.compile(r"sm_\d{2,3}|portable")
_MAX_BATCH = 2  # the attention of SwinUNETR-48 takes 1.5 GB per window of 96^3 voxels in float32

# An engine reserves GPU memory for the largest size: 4.5 GB for a chunk of 256x256x384 voxels in mixed precision
# (edge_base, predicted). At a voxel size of 3 mm, 256 voxels are 768 mm, more than the largest field of view of a CT.
_LARGEST_SIDES = (256, 256)
_TYPICAL_SIDES = (160, 128, 160)  # the engine is optimised for this size

_log = logging.getLogger(__name__)


def build_engines(
    bundle: str | Path,
    targets: Sequence[str] = (),
    *,
    library: EngineLibrary | None = None,
    precision: Precision | None = None,
    max_batch: int = _MAX_BATCH,
    parity_volumes: Sequence[Path] = (),
    classify: Classifier | None = None,
) -> list[EngineFile]:
    """Build the engines of a bundle that are missing or out of date, and return all requested engines.

    This function does the work of ``fseft-edge build-engines``. An engine for this machine's GPU is also compared with
    PyTorch. The backend choice ``auto`` never uses an engine without this comparison.

    Args:
        bundle: encoder bundle whose graph is compiled; the engines are written into the folder of the bundle.
        targets: GPU types to build for: ``sm_75``, ``sm_86``, ... (compute capability 7.5, 8.6, ...) or ``portable``.
            An empty sequence means this machine's GPU.
        library: library that builds the engines; ``None`` means TensorRT-RTX if it is installed, else TensorRT.
        precision: precision of the graph; ``None`` means ``mixed`` if the bundle contains a mixed-precision graph,
            else ``float32``.
        max_batch: largest number of windows that an engine accepts at once; 1 for an encoder that computes whole
            scans.
        parity_volumes: CTs used for the comparison. Without CTs, seeded noise is used; ``auto`` does not accept a
            comparison on noise below float32.
        classify: classifier whose masks are compared; None means the encoder's head.

    Raises:
        UsageError: a target is unknown, or no target is given and the machine has no GPU.
        MissingBackendError: the library is not installed.
        EncoderBundleError: the bundle is damaged, or contains no graph in the requested precision.
        EngineError: the library cannot build for a target.
        OutOfSpaceError: the disk is full or not writable.
    """
    opened = EncoderBundle.open(Path(bundle))
    precision = precision or ("float32" if opened.mixed_graph is None else "mixed")
    graph = opened.graph_in(precision)
    if precision == "bfloat16" or graph is None:
        raise EncoderBundleError(
            f"The encoder bundle {bundle} contains no ONNX graph in {precision} precision.",
            remedy="Export or merge the encoder again without --no-onnx, or choose another precision.",
        )
    wanted = list(dict.fromkeys(targets)) or [_own_target()]
    name = library or installed_library()
    check_targets(wanted, name)
    classify = classify or head_of(opened.head_weight(), opened.head_bias())
    if opened.whole_scan is not None:
        max_batch = 1  # a chunk of a scan is much larger than a window
    job = _Job(opened, graph, name, import_library(name), precision, max_batch, classify)
    return [_with_parity(_current_or_built(job, target), job, parity_volumes) for target in wanted]


def installed_library() -> EngineLibrary:
    """Return TensorRT-RTX if it is installed, else TensorRT.

    Raises:
        MissingBackendError: no library is installed.
    """
    for name in LIBRARIES:
        if find_spec(name) is not None:
            return name
    raise MissingBackendError(
        "Neither TensorRT-RTX nor TensorRT is installed.",
        remedy="Install TensorRT-RTX with `pip install 'fseft-edge[rtx]'`.",
    )


def check_targets(targets: Sequence[str], library: EngineLibrary) -> None:
    """Check, before the export starts, that a library can build for all targets on this machine.

    Raises:
        UsageError: a target is unknown.
        MissingBackendError: the library is not installed.
        EngineError: the library cannot build for a target.
    """
    for target in targets:
        if not _TARGET.fullmatch(target):
            raise UsageError(
                f"The target {target!r} is unknown.",
                remedy="Give portable or a compute capability, for example sm_86 for compute capability 8.6.",
            )
    for target in targets:
        _target_setter(import_library(library), target)


@dataclass(frozen=True, eq=False)
class _Job:
    """Settings shared by all engines of one call."""

    bundle: EncoderBundle
    graph: Path
    name: EngineLibrary
    library: ModuleType
    precision: Precision
    max_batch: int
    classify: Classifier

    @property
    def version(self) -> str:
        return str(self.library.__version__)


def _own_target() -> str:
    if not torch.cuda.is_available():
        raise UsageError(
            "No --target is given, and PyTorch finds no NVIDIA GPU on this machine.",
            remedy="Give a target, for example --target sm_86 or --target portable.",
        )
    return target_of(torch.cuda.get_device_capability())


def _current_or_built(job: _Job, target: str) -> EngineFile:
    """Return the existing engine if it is current, else build a new engine and log the reason."""
    path = engine_path(job.bundle, job.name, job.precision, target)
    try:
        found = read_engine(job.bundle, job.name, job.version, job.precision, target)
    except EngineError as error:
        _log.log(logging.WARNING if path.exists() else logging.INFO, "building %s: %s", path.name, error.message)
    else:
        if found.description.max_batch == job.max_batch:
            _log.info("keeping %s: this engine is current", path.name)
            return found
        _log.info(
            "building %s again: the existing engine accepts %d windows at once, but %d are requested",
            path.name,
            found.description.max_batch,
            job.max_batch,
        )
    return _built(job, target, path)


def _built(job: _Job, target: str, path: Path) -> EngineFile:
    whole_scan = job.bundle.whole_scan
    largest = None if whole_scan is None else (*_LARGEST_SIDES, CORE + 2 * whole_scan.context)
    content, tensors = compile_graph(job.library, job.graph, target, job.max_batch, largest=largest)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    description = EngineDescription(
        library=job.name,
        version=job.version,
        target=target,
        precision=job.precision,
        graph_sha256=job.bundle.manifest.files[job.graph.name],
        max_batch=job.max_batch,
        largest=largest,
        tensors=tensors,
        engine_sha256=hashlib.sha256(content).hexdigest(),
    )
    return write_description(path, description)


def compile_graph(
    library: ModuleType, graph: Path, target: str, max_batch: int, *, largest: tuple[int, int, int] | None = None
) -> tuple[bytes, tuple[EngineTensor, ...]]:
    """Return the bytes of an engine, and its inputs and outputs.

    Args:
        library: TensorRT-RTX or TensorRT, imported.
        graph: ONNX file; the engine computes in the number formats of this graph.
        target: ``sm_NN`` or ``portable``.
        max_batch: largest number of windows that the engine accepts; the engine is optimised for this number.
        largest: largest size, ``[X, Y, Z]`` in voxels, for a graph that accepts windows of any size; None for a graph
            that accepts one size.

    Raises:
        EngineError: the library cannot read the graph, or cannot build for the target.
    """
    build = prepare_build(library, graph, target, max_batch, largest=largest)
    content = build.builder.build_serialized_network(build.network, build.config)
    if content is None:
        raise EngineError(
            f"The engine for {target} could not be built: {last_error(build.logger)}.",
            remedy="Give another --target, or encode with --backend torch.",
        )
    return bytes(content), build.tensors


@dataclass(frozen=True, eq=False)
class Build:
    """The library's objects for a parsed graph and its build settings."""

    logger: Any
    builder: Any
    network: Any
    config: Any
    profile: Any
    tensors: tuple[EngineTensor, ...]


def prepare_build(
    library: ModuleType, graph: Path, target: str, max_batch: int, *, largest: tuple[int, int, int] | None = None
) -> Build:
    """Parse a graph and return the objects for a build; the arguments are those of :func:`compile_graph`.

    Raises:
        EngineError: the library cannot read the graph, or cannot build for the target.
    """
    logger = fresh_logger(library)
    set_target = _target_setter(library, target)
    builder = library.Builder(logger)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, logger)
    if not parser.parse(graph.read_bytes()):
        raise EngineError(
            f"{library.__name__} cannot read {graph}: {parser.get_error(0).desc()}.",
            remedy="Export the encoder again with this version of fseft-edge, or encode with --backend torch.",
        )
    config = builder.create_builder_config()
    config.clear_flag(library.BuilderFlag.TF32)  # otherwise float32 graphs would compute in TF32
    set_target(config)
    windows = network.get_input(0)
    profile = builder.create_optimization_profile()
    size = tuple(windows.shape)[1:]
    if largest is None:
        sizes = (1, *size), (max_batch, *size), (max_batch, *size)
    else:
        sizes = (1, 1, 1, 1, 1), (1, 1, *map(min, largest, _TYPICAL_SIDES)), (max_batch, 1, *largest)
    profile.set_shape(windows.name, *sizes)
    config.add_optimization_profile(profile)
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    tensors = tuple(
        EngineTensor(
            name=tensor.name, number_format=f"{library.nptype(tensor.dtype).__name__}", shape=tuple(tensor.shape)
        )
        for tensor in (windows, *outputs)
    )
    return Build(logger, builder, network, config, profile, tensors)


def _target_setter(library: ModuleType, target: str) -> Callable[[Any], None]:
    """Return a function that sets the target in a builder's configuration.

    Raises:
        EngineError: the library cannot build for the target on this machine.
    """
    if library.__name__ == "tensorrt_rtx":
        return _rtx_target_setter(library, target)
    if not torch.cuda.is_available():
        raise EngineError(
            f"{library.__name__} needs a GPU to build engines, and PyTorch finds no NVIDIA GPU on this machine.",
            remedy="Build on the machine with the GPU, or install TensorRT-RTX (`pip install 'fseft-edge[rtx]'`), "
            "which builds without a GPU.",
        )
    if target not in (PORTABLE, _own_target()):
        raise EngineError(
            f"{library.__name__} only builds for this machine's GPU ({_own_target()}), not for {target}.",
            remedy="Build on the machine with that GPU, or use TensorRT-RTX.",
        )

    def portable(config: Any) -> None:  # noqa: ANN401 - the library comes without types
        if target == PORTABLE:
            config.hardware_compatibility_level = library.HardwareCompatibilityLevel.AMPERE_PLUS

    return portable


def _rtx_target_setter(library: ModuleType, target: str) -> Callable[[Any], None]:
    known = {
        f"sm_{name.removeprefix('SM')}": value
        for name, value in library.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    if target != PORTABLE and target not in known:
        raise EngineError(
            f"{library.__name__} {library.__version__} does not build for {target}.",
            remedy=f"Choose one of {', '.join(known)}, or {PORTABLE} (all GPUs from {target_of(PORTABLE_FROM)} on).",
        )

    def one_capability(config: Any) -> None:  # noqa: ANN401 - the library comes without types
        if target != PORTABLE:  # the library builds portable engines by default
            config.num_compute_capabilities = 1
            if not config.set_compute_capability(known[target], 0):
                raise RuntimeError(f"{library.__name__} did not accept the target {target}")

    return one_capability


def _with_parity(engine: EngineFile, job: _Job, volumes: Sequence[Path]) -> EngineFile:
    """Return the engine with a parity report from this machine's GPU.

    The engine is returned unchanged if it already has a report on CTs (or on noise, and no CTs are given), if it does
    not run on this machine's GPU, or if the bundle contains only a graph, so that there is no network to compare with.
    """
    known = engine.description.parity
    enough = known is not None and (known.source == "ct" or not volumes)
    if enough or job.bundle.graph_only or not torch.cuda.is_available():
        return engine
    capability = torch.cuda.get_device_capability()
    if engine.description.target != target_of(capability) and (
        engine.description.target != PORTABLE or capability < PORTABLE_FROM
    ):
        return engine
    report = _report(engine, job, volumes)
    _log.info(
        "%s: relative error %.1e, %s", engine.path.name, max(report.relative_error), report.shortcoming or "passed"
    )
    return write_description(engine.path, engine.description.model_copy(update={"parity": report}))


def _report(engine: EngineFile, job: _Job, volumes: Sequence[Path]) -> ParityReport:
    def load() -> EngineRunner:
        return EngineRunner(job.library, engine, torch.device("cuda", torch.cuda.current_device()))

    bundle = job.bundle
    (report,) = parity_reports(
        bundle.network(),
        [Engine(job.name, job.precision, job.version, load)],
        classify=job.classify,
        window=bundle.window,
        preprocessing=bundle.preprocessing,
        volumes=volumes,
        whole_scan=bundle.whole_scan is not None,
    )
    return report
