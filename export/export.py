"""Export a checkpoint to an encoder bundle."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from fseft_edge.export.checkpoints import load_weights
from fseft_edge.export.engines import build_engines, check_targets, installed_library
from fseft_edge.export.imported import graph_settings, import_model, write_imported_graph
from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.export.parity import (
    Classifier,
    Engine,
    cpu_engines,
    head_of,
    parity_reports,
    torch_engines,
)
from fseft_edge.export.zoo import CUSTOM, LoadedModel, load_model
from fseft_edge.runtime.encoder.bundle import BundleContents, EncoderBundle, ParityReport, parity_key, sha256_of_file
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.errors import CheckpointError, EnvironmentProblemError, UsageError

Tiling = Literal["whole", "windows"]

_TOOLS = ("fseft-edge", "torch", "onnx", "onnxscript")
_LONGEST_REASON = 300  # characters of the message of an engine that failed

_log = logging.getLogger(__name__)


def export_encoder(
    checkpoint: str | Path | None = None,
    *,
    model: str | None = None,
    output: str | Path,
    onnx: bool = True,
    parity_volumes: Sequence[Path] = (),
    targets: Sequence[str] = (),
    description: str | Path | None = None,
    tiling: Tiling | None = None,
) -> EncoderBundle:
    """Write the encoder of a checkpoint as an encoder bundle, and return the bundle.

    This function does the work of ``fseft-edge export``.

    Args:
        checkpoint: published checkpoint, or model file of ``fseft-edge pretrain``; ``None`` for a built-in model.
        model: name of the model in :data:`fseft_edge.export.zoo.MODELS`; None means ``custom`` if ``checkpoint`` or
            ``description`` is given, else ``edge_base``.
        output: folder of the bundle; must not exist yet.
        onnx: whether to write the ONNX graphs (float32 and mixed precision) and to compare every engine that is
            installed on this machine with PyTorch.
        parity_volumes: CTs used for the comparison; without CTs, seeded noise is used.
        targets: GPU types to build engines for (:func:`fseft_edge.export.engines.build_engines`). Without targets, an
            engine is built for this machine's GPU if there is a GPU and a library that can build for it.
        description: TOML file that describes a network of the user's own code (:mod:`fseft_edge.export.imported`).
            This function **runs that code**. ``model`` must be ``custom``, and ``checkpoint`` contains the weights.
        tiling: ``whole``: the encoder computes a whole scan in one pass; ``windows``: it computes windows and blends
            their features. None means ``whole`` if the features of the network depend on the surroundings of a voxel
            alone.

    Raises:
        UsageError: options contradict one another, or ``output`` exists.
        EngineError: a requested engine cannot be built; in this case the bundle exists, without the engine.
        CheckpointError: the checkpoint does not belong to the model.
        InputError: a CT in ``parity_volumes`` cannot be read, or the description or its code is not usable.
        OutOfSpaceError: the disk is full or not writable.
    """
    output = Path(output)
    checkpoint, description = (None if path is None else Path(path) for path in (checkpoint, description))
    model = model or ("custom" if checkpoint or description else "edge_base")
    _check_output(output, onnx=onnx, parity_volumes=parity_volumes)
    if targets and not onnx:
        raise UsageError(
            "--target needs the ONNX graph, but --no-onnx is given.", remedy="Leave out --target or --no-onnx."
        )
    if targets:
        check_targets(targets, installed_library())
    loaded = load_model(model, checkpoint) if description is None else _imported(model, checkpoint, description, onnx)
    return write_encoder(loaded, output, onnx=onnx, parity_volumes=parity_volumes, targets=targets, tiling=tiling)


def write_encoder(
    loaded: LoadedModel,
    output: Path,
    *,
    onnx: bool = True,
    parity_volumes: Sequence[Path] = (),
    targets: Sequence[str] = (),
    classify: Classifier | None = None,
    tiling: Tiling | None = None,
) -> EncoderBundle:
    """Write a model as an encoder bundle, and return the bundle.

    Args:
        loaded: model, and the file from which it was read.
        output: folder of the bundle; must not exist yet.
        onnx: whether to write the ONNX graphs and to compare every installed engine with PyTorch.
        parity_volumes: CTs used for the comparison; without CTs, seeded noise is used.
        targets: GPU types to build engines for; :func:`fseft_edge.export.engines.check_targets` must have accepted
            them.
        classify: classifier whose masks decide whether a lower precision is accurate enough; None means the model's
            head.
        tiling: how the encoder computes a scan (:func:`export_encoder`).

    Raises:
        UsageError: options contradict one another, the network cannot compute a whole scan in one pass, or ``output``
            exists.
        EngineError: a requested engine cannot be built; in this case the bundle exists, without the engine.
        CheckpointError: the weights do not match the architecture.
        InputError: a CT in ``parity_volumes`` cannot be read.
        OutOfSpaceError: the disk is full or not writable.
    """
    _check_output(output, onnx=onnx, parity_volumes=parity_volumes)
    network = loaded.network or _built(loaded)
    whole_scan = None if tiling == "windows" else network.whole_scan
    if tiling == "whole" and whole_scan is None:
        reason = (
            "networks of your own are computed in windows"
            if loaded.network is not None
            else "its features depend on the window, which it normalises by itself or attends to as a whole"
        )
        raise UsageError(
            f"The encoder {loaded.model.description.name} cannot compute a whole scan in one pass: {reason}.",
            remedy="Leave out --tiling.",
        )
    described, source = loaded.model.description, loaded.source
    settings = described.settings
    with tempfile.TemporaryDirectory(prefix="fseft-edge-") as folder:
        graph = Path(folder) / "encoder.onnx"
        # Mixed precision keeps long sums in float32. The positions of such sums in a user's network are unknown, so
        # this network is only exported in float32.
        mixed_graph = Path(folder) / "encoder.mixed.onnx" if loaded.network is None else None
        parity: dict[str, ParityReport] = {}
        if onnx:
            _log.info("writing the ONNX graphs of %s", described.name)
            if mixed_graph is None:
                write_imported_graph(network, described.window, graph)
                settings = {**settings, **graph_settings(graph)}
                engines = cpu_engines(graph, None)
            else:
                write_graph(network, described.window, graph, whole_scan=whole_scan)
                write_graph(network, described.window, mixed_graph, "mixed", whole_scan=whole_scan)
                engines = [
                    *cpu_engines(graph, mixed_graph),
                    *torch_engines(network, whole_scan=whole_scan is not None),
                ]
            for report in parity_reports(
                network,
                engines,
                classify=classify or head_of(loaded.model.head_weight.float(), loaded.model.head_bias.float()),
                window=described.window,
                preprocessing=described.preprocessing,
                volumes=parity_volumes,
                whole_scan=whole_scan is not None,
                on_failure=_log_failure,
            ):
                parity[parity_key(report.backend, report.precision)] = report
                _log_parity(report)
        bundle = EncoderBundle.write(
            output,
            BundleContents(
                name=described.name,
                architecture=described.architecture,
                settings=settings,
                preprocessing=described.preprocessing,
                window=described.window,
                organs=described.organs,
                untrained=loaded.model.untrained,
                checkpoint_sha256=sha256_of_file(source),
                tools={tool: version(tool) for tool in _TOOLS},
                parity=parity,
                network=network,
                head_weight=loaded.model.head_weight,
                head_bias=loaded.model.head_bias,
                whole_scan=whole_scan,
                graph=graph if onnx else None,
                mixed_graph=mixed_graph if onnx else None,
            ),
        )
    if targets:
        build_engines(output, targets, parity_volumes=parity_volumes, classify=classify)
    elif onnx and torch.cuda.is_available():
        _build_for_this_gpu(bundle, parity_volumes, classify)
    return bundle


def _check_output(output: Path, *, onnx: bool, parity_volumes: Sequence[Path]) -> None:
    if output.exists():
        raise UsageError(f"The output {output} already exists.", remedy="Choose another name, or delete it first.")
    if parity_volumes and not onnx:
        raise UsageError(
            "--parity-ct needs the ONNX graph, but --no-onnx is given.", remedy="Leave out --parity-ct or --no-onnx."
        )


def _imported(model: str, checkpoint: Path | None, description: Path, onnx: bool) -> LoadedModel:
    """Return the network of a description, after checking that the other options do not contradict it."""
    if model != CUSTOM:
        raise UsageError(
            f"--description can only be used with --model {CUSTOM}, not with --model {model}.",
            remedy=f"Write --model {CUSTOM}, or leave out --description.",
        )
    if checkpoint is None:
        raise UsageError(
            f"The network of the description {description} needs a checkpoint with its weights.",
            remedy="Give the file that contains the state dict of the network.",
        )
    if not onnx:
        raise UsageError(
            "A network of your own runs only from its ONNX graph, but --no-onnx is given.",
            remedy="Leave out --no-onnx.",
        )
    return import_model(description, checkpoint)


def _built(loaded: LoadedModel) -> FeatureNetwork:
    """Return the network of a model file.

    Raises:
        CheckpointError: the weights or the head do not match the architecture.
    """
    description, source = loaded.model.description, loaded.source
    network = build_network(description.architecture, **description.settings).eval()
    load_weights(network, loaded.model.encoder, source=str(source))
    channels = network.levels[0].channels
    if loaded.model.head_weight.shape != (len(description.organs), channels):
        raise CheckpointError(
            f"The classifier in {source} has weights of shape {list(loaded.model.head_weight.shape)}; expected is "
            f"[{len(description.organs)}, {channels}].",
            remedy="Check that --model names the network of this checkpoint (`fseft-edge models` lists all names).",
        )
    return network


def _build_for_this_gpu(bundle: EncoderBundle, parity_volumes: Sequence[Path], classify: Classifier | None) -> None:
    """Try to build an engine for this machine's GPU. A failure is only logged, because other backends can be used."""
    try:
        build_engines(bundle.path, parity_volumes=parity_volumes, classify=classify)
    except EnvironmentProblemError as error:
        _log.info("no engine for this machine's GPU: %s", error)


def _log_failure(engine: Engine, error: Exception) -> None:
    reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
    _log.warning(
        "%s in %s does not compute this encoder on this machine, so --backend auto will not use it: %s",
        engine.backend,
        engine.precision,
        reason,
    )


def _log_parity(report: ParityReport) -> None:
    # A shortcoming of a lower precision is not a problem, because float32 is used instead.
    level = logging.WARNING if report.shortcoming and report.precision == "float32" else logging.INFO
    masks = "" if report.mask_dsc is None else f", mask DSC {report.mask_dsc:.4f}"
    _log.log(
        level,
        "%s in %s: largest difference from PyTorch %.1e, relative to the largest feature of the level%s: %s",
        report.backend,
        report.precision,
        max(report.relative_error),
        masks,
        f"--backend auto will not use it, because {report.shortcoming}" if report.shortcoming else "passed",
    )
