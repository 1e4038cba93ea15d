"""Engines: a bundle's graph compiled for NVIDIA GPUs by TensorRT-RTX or TensorRT.

TensorRT-RTX builds for any GPU it knows, on a machine without one. TensorRT builds for the GPU that it finds.
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
_MAX_BATCH = 2  # attention of SwinUNETR-48 at 96^3 alone takes 1.5 GB a window in float32

_log = logging.getLogger(__name__)


def build_engines(
    bundle: Path,
    targets: Sequence[str] = (),
    *,
    library: EngineLibrary | None = None,
    precision: Precision | None = None,
    max_batch: int = _MAX_BATCH,
    parity_volumes: Sequence[Path] = (),
    classify: Classifier | None = None,
) -> list[EngineFile]:
    """Build what is missing or stale of a bundle's engines, and return them; the twin of ``fseft-edge build-engines``.

    An engine for this machine's GPU is compared with PyTorch too; without that ``auto`` does not take it.

    Args:
        bundle: the encoder bundle whose graph to compile; the engines appear in its folder.
        targets: ``sm_75``, ``sm_86``, ... (compute capability 7.5, 8.6, ...) or ``portable``; none means this machine's
            GPU.
        library: ``None`` takes the first of TensorRT-RTX and TensorRT that is installed.
        precision: of the graph; ``None`` takes ``mixed`` where the bundle has it, else ``float32``.
        max_batch: an engine takes 1 to this many windows at once.
        parity_volumes: CTs to compare on; without any, seeded noise, which ``auto`` does not trust below float32.
        classify: whose masks are compared; None takes the encoder's own classifier.

    Raises:
        UsageError: when a target is unknown, or none is named and there is no GPU.
        MissingBackendError: when the library is not installed.
        EncoderBundleError: when the bundle is damaged, or has no graph in that precision.
        EngineError: when the library does not build for a target.
        OutOfSpaceError: when the disk is full or not writable.
    """
    opened = EncoderBundle.open(bundle)
    precision = precision or ("float32" if opened.mixed_graph is None else "mixed")
    graph = opened.graph_in(precision)
    if precision == "bfloat16" or graph is None:
        raise EncoderBundleError(
            f"The encoder bundle {bundle} has no ONNX graph in {precision}.",
            remedy="Export or merge it again without --no-onnx, or choose another precision.",
        )
    wanted = list(dict.fromkeys(targets)) or [_own_target()]
    name = library or installed_library()
    check_targets(wanted, name)
    classify = classify or head_of(opened.head_weight(), opened.head_bias())
    job = _Job(opened, graph, name, import_library(name), precision, max_batch, classify)
    return [_with_parity(_current_or_built(job, target), job, parity_volumes) for target in wanted]


def installed_library() -> EngineLibrary:
    """Return the first library that is installed.

    Raises:
        MissingBackendError: when none is.
    """
    for name in LIBRARIES:
        if find_spec(name) is not None:
            return name
    raise MissingBackendError(
        "Neither TensorRT-RTX nor TensorRT is installed.", remedy="Install one with `pip install 'fseft-edge[rtx]'`."
    )


def check_targets(targets: Sequence[str], library: EngineLibrary) -> None:
    """Make sure, before long work, that a library builds for all these targets here.

    Raises:
        UsageError, MissingBackendError, EngineError: see :func:`build_engines`.
    """
    for target in targets:
        if not _TARGET.fullmatch(target):
            raise UsageError(
                f"The target {target!r} is unknown.", remedy="Write sm_86 for compute capability 8.6, or portable."
            )
    for target in targets:
        _target_setter(import_library(library), target)


@dataclass(frozen=True, eq=False)
class _Job:
    """What all engines of one call share."""

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
            "No target is named, and PyTorch sees no NVIDIA GPU to build for.",
            remedy="Name targets, e.g. --target sm_86 or --target portable.",
        )
    return target_of(torch.cuda.get_device_capability())


def _current_or_built(job: _Job, target: str) -> EngineFile:
    """Return the engine that is there, or a new one in its place, saying why."""
    path = engine_path(job.bundle, job.name, job.precision, target)
    try:
        found = read_engine(job.bundle, job.name, job.version, job.precision, target)
    except EngineError as error:
        _log.log(logging.WARNING if path.exists() else logging.INFO, "building %s: %s", path.name, error.message)
    else:
        if found.description.max_batch == job.max_batch:
            _log.info("keeping %s: it is current", path.name)
            return found
        _log.info("building %s: it takes %d windows at once", path.name, found.description.max_batch)
    return _built(job, target, path)


def _built(job: _Job, target: str, path: Path) -> EngineFile:
    content, tensors = compile_graph(job.library, job.graph, target, job.max_batch)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    description = EngineDescription(
        library=job.name,
        version=job.version,
        target=target,
        precision=job.precision,
        graph_sha256=job.bundle.manifest.files[job.graph.name],
        max_batch=job.max_batch,
        tensors=tensors,
        engine_sha256=hashlib.sha256(content).hexdigest(),
    )
    return write_description(path, description)


def compile_graph(
    library: ModuleType, graph: Path, target: str, max_batch: int
) -> tuple[bytes, tuple[EngineTensor, ...]]:
    """Return an engine, and its inputs and outputs.

    Args:
        library: TensorRT-RTX or TensorRT, imported.
        graph: ONNX file; the engine computes in the types that it names.
        target: ``sm_NN`` or ``portable``.
        max_batch: the engine takes 1 to this many windows, and is tuned for this many.

    Raises:
        EngineError: when the library does not take the graph, or does not build for the target.
    """
    build = prepare_build(library, graph, target, max_batch)
    content = build.builder.build_serialized_network(build.network, build.config)
    if content is None:
        raise EngineError(
            f"The engine for {target} could not be built: {last_error(build.logger)}.",
            remedy="Name another target, or encode with --backend torch.",
        )
    return bytes(content), build.tensors


@dataclass(frozen=True, eq=False)
class Build:
    """A parsed graph and how it is to be built; the library's own objects."""

    logger: Any
    builder: Any
    network: Any
    config: Any
    profile: Any
    tensors: tuple[EngineTensor, ...]


def prepare_build(library: ModuleType, graph: Path, target: str, max_batch: int) -> Build:
    """Return everything up to the build itself; see :func:`compile_graph`."""
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
    config.clear_flag(library.BuilderFlag.TF32)  # float32 means float32
    set_target(config)
    windows = network.get_input(0)
    profile = builder.create_optimization_profile()
    size = tuple(windows.shape)[1:]
    profile.set_shape(windows.name, (1, *size), (max_batch, *size), (max_batch, *size))
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
    """Return what tells a builder's configuration the target.

    Raises:
        EngineError: when the library does not build for it here.
    """
    if library.__name__ == "tensorrt_rtx":
        return _rtx_target_setter(library, target)
    if not torch.cuda.is_available():
        raise EngineError(
            f"{library.__name__} builds on a machine with the GPU alone, and PyTorch sees none here.",
            remedy="Build there, or install TensorRT-RTX (`pip install 'fseft-edge[rtx]'`), which needs none.",
        )
    if target not in (PORTABLE, _own_target()):
        raise EngineError(
            f"{library.__name__} builds for this machine's GPU, {_own_target()}, and not for {target}.",
            remedy="Build on the other machine, or use TensorRT-RTX.",
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
            remedy=f"It does for {', '.join(known)}, and {PORTABLE}, which is {target_of(PORTABLE_FROM)} and later.",
        )

    def one_capability(config: Any) -> None:  # noqa: ANN401 - the library comes without types
        if target != PORTABLE:  # which is the library's default
            config.num_compute_capabilities = 1
            if not config.set_compute_capability(known[target], 0):
                raise RuntimeError(f"{library.__name__} did not take the target {target}")

    return one_capability


def _with_parity(engine: EngineFile, job: _Job, volumes: Sequence[Path]) -> EngineFile:
    """Return the engine with a report of this machine's GPU, where it runs on it and has none on a CT yet.

    A bundle that holds a graph alone has no network to compare with.
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
    )
    return report
