"""Export: a checkpoint becomes an encoder bundle, once."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from fseft_edge.export.checkpoints import load_weights
from fseft_edge.export.engines import build_engines, check_targets, installed_library
from fseft_edge.export.imported import graph_settings, import_model, write_imported_graph
from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.export.parity import Classifier, cpu_engines, gpu_engines, head_of, parity_reports
from fseft_edge.export.zoo import CUSTOM, LoadedModel, load_model
from fseft_edge.runtime.encoder.bundle import BundleContents, EncoderBundle, ParityReport, parity_key, sha256_of_file
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.errors import CheckpointError, EnvironmentProblemError, UsageError

_TOOLS = ("fseft-edge", "torch", "onnx", "onnxscript")

_log = logging.getLogger(__name__)


def export_encoder(
    checkpoint: Path | None,
    *,
    model: str,
    output: Path,
    onnx: bool = True,
    parity_volumes: Sequence[Path] = (),
    targets: Sequence[str] = (),
    description: Path | None = None,
) -> EncoderBundle:
    """Write the encoder of a checkpoint as a bundle, and return it; the twin of ``fseft-edge export``.

    Args:
        checkpoint: a published checkpoint, or a model file of ``pretrain``; ``None`` for a built-in model.
        model: name in :data:`fseft_edge.export.zoo.MODELS`.
        output: the bundle's folder, which must not exist yet.
        onnx: also write the ONNX graphs, in float32 and in mixed precision, and compare every engine installed here
            with PyTorch on them.
        parity_volumes: CTs to compare on; without any, seeded noise.
        targets: GPUs to build engines for, see :func:`fseft_edge.export.engines.build_engines`; without any, this
            machine's GPU where there is one and a library that builds for it.
        description: TOML file about a network of the user's own, whose code it names and this **runs**
            (:mod:`fseft_edge.export.imported`); ``model`` is ``custom`` then and ``checkpoint`` holds the weights.

    Raises:
        UsageError: when options contradict one another, or ``output`` exists.
        EngineError: when an engine that was asked for cannot be built; the bundle is there then, without it.
        CheckpointError: when the checkpoint is not one of that model.
        InputError: when a CT to compare on cannot be read, or the description or the code that it names is unusable.
        OutOfSpaceError: when the disk is full or not writable.
    """
    _check_output(output, onnx=onnx, parity_volumes=parity_volumes)
    if targets and not onnx:
        raise UsageError("Engines are built from an ONNX graph.", remedy="Leave out one of the two options.")
    if targets:
        check_targets(targets, installed_library())
    loaded = load_model(model, checkpoint) if description is None else _imported(model, checkpoint, description, onnx)
    return write_encoder(loaded, output, onnx=onnx, parity_volumes=parity_volumes, targets=targets)


def write_encoder(
    loaded: LoadedModel,
    output: Path,
    *,
    onnx: bool = True,
    parity_volumes: Sequence[Path] = (),
    targets: Sequence[str] = (),
    classify: Classifier | None = None,
) -> EncoderBundle:
    """Write a model as a bundle, and return it.

    Args:
        loaded: the model and the file that it came from.
        output: as for :func:`export_encoder`, like the rest.
        onnx: likewise.
        parity_volumes: likewise.
        targets: likewise; can be built here, as :func:`fseft_edge.export.engines.check_targets` says.
        classify: whose masks say whether a lower precision is good enough; None takes the model's own classifier.

    Raises:
        UsageError, EngineError, CheckpointError, InputError, OutOfSpaceError: as :func:`export_encoder`.
    """
    _check_output(output, onnx=onnx, parity_volumes=parity_volumes)
    network = loaded.network or _built(loaded)
    described, source = loaded.model.description, loaded.source
    settings = described.settings
    with tempfile.TemporaryDirectory(prefix="fseft-edge-") as folder:
        graph = Path(folder) / "encoder.onnx"
        # Where a network of the user's own adds many numbers up is not known here, so it stays in float32.
        mixed_graph = Path(folder) / "encoder.mixed.onnx" if loaded.network is None else None
        parity: dict[str, ParityReport] = {}
        if onnx:
            _log.info("writing the ONNX graphs of %s", described.name)
            if mixed_graph is None:
                write_imported_graph(network, described.window, graph)
                settings = {**settings, **graph_settings(graph)}
                engines = cpu_engines(graph, None)
            else:
                write_graph(network, described.window, graph)
                write_graph(network, described.window, mixed_graph, "mixed")
                engines = [*cpu_engines(graph, mixed_graph), *gpu_engines(network)]
            for report in parity_reports(
                network,
                engines,
                classify=classify or head_of(loaded.model.head_weight.float(), loaded.model.head_bias.float()),
                window=described.window,
                preprocessing=described.preprocessing,
                volumes=parity_volumes,
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
        raise UsageError(f"{output} already exists.", remedy="Choose another name, or remove it first.")
    if parity_volumes and not onnx:
        raise UsageError(
            "Without an ONNX graph there is nothing to compare.", remedy="Leave out one of the two options."
        )


def _imported(model: str, checkpoint: Path | None, description: Path, onnx: bool) -> LoadedModel:
    """Return the network of a description, after checking that nothing contradicts it."""
    if model != CUSTOM:
        raise UsageError(
            f"A description is of a network of your own, and {model} is a model that is known.",
            remedy=f"Say --model {CUSTOM}, or leave --description out.",
        )
    if checkpoint is None:
        raise UsageError("A network of your own needs its weights.", remedy="Name the file with its state dict.")
    if not onnx:
        raise UsageError("A network of your own runs from its ONNX graph alone.", remedy="Leave --no-onnx out.")
    return import_model(description, checkpoint)


def _built(loaded: LoadedModel) -> FeatureNetwork:
    """Return the network of a model file, its head checked to fit."""
    description, source = loaded.model.description, loaded.source
    network = build_network(description.architecture, **description.settings).eval()
    load_weights(network, loaded.model.encoder, source=str(source))
    channels = network.levels[0].channels
    if loaded.model.head_weight.shape != (len(description.organs), channels):
        raise CheckpointError(
            f"The classifier in {source} is {list(loaded.model.head_weight.shape)}, "
            f"not [{len(description.organs)}, {channels}].",
            remedy="Check that --model names the network that the checkpoint was made for.",
        )
    return network


def _build_for_this_gpu(bundle: EncoderBundle, parity_volumes: Sequence[Path], classify: Classifier | None) -> None:
    """Build what was not asked for: where it does not work, other backends do."""
    try:
        build_engines(bundle.path, parity_volumes=parity_volumes, classify=classify)
    except EnvironmentProblemError as error:
        _log.info("no engine for this machine's GPU: %s", error)


def _log_parity(report: ParityReport) -> None:
    # That a lower precision was not shown to be good enough is no trouble: float32 is taken.
    level = logging.WARNING if report.shortcoming and report.precision == "float32" else logging.INFO
    masks = "" if report.mask_dsc is None else f", its masks have a DSC of {report.mask_dsc:.4f}"
    _log.log(
        level,
        "%s in %s differs from PyTorch by at most %.1e of a level's largest feature%s: %s",
        report.backend,
        report.precision,
        max(report.relative_error),
        masks,
        f"it will not be chosen by itself, {report.shortcoming}" if report.shortcoming else "passed",
    )
