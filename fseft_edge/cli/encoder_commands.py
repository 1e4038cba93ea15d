"""The commands for encoders, encoder bundles and engines; see :mod:`fseft_edge.cli.commands`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fseft_edge.cli.options import PATH, counted, logging_options
from fseft_edge.cli.start import loading
from fseft_edge.runtime.system.progress import open_progress

if TYPE_CHECKING:
    from fseft_edge.export.export import Tiling
    from fseft_edge.export.parity import Classifier
    from fseft_edge.runtime.encoder.bundle import Precision
    from fseft_edge.runtime.encoder.engine_files import EngineLibrary

_TARGET_HELP = (
    "GPU to build an engine for: sm_75, sm_86, ... (compute capability 7.5, 8.6, ...) or portable; separate several by "
    "commas. May be repeated.  [default: the GPU of this machine{otherwise}]"
)


def _classifier(bundle: Path, adapter: Path | None) -> Classifier | None:
    """Return the function with which an adapter classifies features, or None without an adapter."""
    with loading():
        from fseft_edge.adapters.file import read_adapter  # noqa: PLC0415 - brings in torch
        from fseft_edge.runtime.encoder.bundle import EncoderBundle  # noqa: PLC0415 - brings in torch

    if adapter is None:
        return None
    file = read_adapter(adapter)
    file.check_encoder(EncoderBundle.open(bundle), path=adapter)
    return file.adapter.log_odds


def _listed(values: tuple[str, ...]) -> list[str]:
    return [target.strip() for value in values for target in value.split(",")]


@click.command()
@click.argument("checkpoint", type=PATH, required=False)
@click.option(
    "--model",
    default=None,
    help="Name of the model: edge_base (built in, needs no CHECKPOINT), a published model, or custom (a model file "
    "from `pretrain`, or your own network). `fseft-edge models` lists all names.  [default: custom with CHECKPOINT, "
    "edge_base without]",
)
@click.option(
    "--description",
    type=PATH,
    help="TOML file that describes your own network; CHECKPOINT contains its weights. The code that the file names is "
    "executed.",
)
@click.option("-o", "--output", type=PATH, required=True, help="Encoder bundle to write, NAME.encoder.")
@click.option(
    "--onnx/--no-onnx", default=True, show_default=True, help="Write ONNX graphs in addition to the weights, or not."
)
@click.option(
    "--parity-ct", type=PATH, multiple=True, help="CT on which backends are compared with PyTorch. May be repeated."
)
@click.option("--target", "targets", multiple=True, help=_TARGET_HELP.format(otherwise="; no engine without a GPU"))
@click.option(
    "--tiling",
    type=click.Choice(["whole", "windows"]),
    help="How the encoder computes a scan: the whole scan in one pass, or windows whose features are blended. "
    "An adapter belongs to one of the two.  [default: whole if the network allows it]",
)
@logging_options
def export(
    *,
    checkpoint: Path | None,
    model: str | None,
    description: Path | None,
    output: Path,
    onnx: bool,
    parity_ct: tuple[Path, ...],
    targets: tuple[str, ...],
    tiling: Tiling | None,
    quiet: bool,
) -> None:
    """Export the encoder of CHECKPOINT as an encoder bundle, which the other commands use."""
    with loading():
        from fseft_edge.export.export import export_encoder  # noqa: PLC0415 - brings in torch

    bundle = export_encoder(
        checkpoint,
        model=model,
        output=output,
        onnx=onnx,
        parity_volumes=parity_ct,
        targets=_listed(targets),
        description=description,
        tiling=tiling,
    )
    if not quiet:
        organs = counted(len(bundle.manifest.organs), "organ")
        click.echo(f"{output}: {bundle.manifest.name}, {organs}, {bundle.tiling}, id {bundle.encoder_id[:12]}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@logging_options
def models(*, as_json: bool, quiet: bool) -> None:  # noqa: ARG001 - logging_options passes quiet
    """List the encoders that can be exported by name, the file that each needs, and the source of this file."""
    with loading():
        from fseft_edge.export.model_list import model_entries, model_lines  # noqa: PLC0415 - only this command needs it
        from fseft_edge.export.zoo import models as known  # noqa: PLC0415 - brings in torch

    if as_json:
        click.echo(json.dumps({"schema_version": 1, "models": model_entries(known())}, indent=2))
        return
    for line in model_lines(known()):
        click.echo(line)


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--target", "targets", multiple=True, help=_TARGET_HELP.format(otherwise=""))
@click.option(
    "--library",
    type=click.Choice(["tensorrt_rtx", "tensorrt"]),
    help="Library that builds and runs the engines.  [default: TensorRT-RTX if installed, else TensorRT]",
)
@click.option(
    "--precision",
    type=click.Choice(["mixed", "float32"]),
    help="Precision of the engine.  [default: mixed if the bundle has a mixed graph]",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="Largest number of windows that an engine computes at once; a larger number needs more GPU memory.",
)
@click.option(
    "--parity-ct",
    type=PATH,
    multiple=True,
    help="CT on which the engine for this machine's GPU is compared with PyTorch. May be repeated.",
)
@click.option("--adapter", type=PATH, help="Adapter whose masks are compared.  [default: the encoder's head]")
@logging_options
def build_engines(
    *,
    bundle: Path,
    targets: tuple[str, ...],
    library: EngineLibrary | None,
    precision: Precision | None,
    max_batch: int,
    parity_ct: tuple[Path, ...],
    adapter: Path | None,
    quiet: bool,
) -> None:
    """Build the missing or outdated GPU engines of the encoder bundle BUNDLE."""
    with loading():
        from fseft_edge.export.engines import build_engines as run  # noqa: PLC0415 - brings in torch

    built = run(
        bundle,
        _listed(targets),
        library=library,
        precision=precision,
        max_batch=max_batch,
        parity_volumes=parity_ct,
        classify=_classifier(bundle, adapter),
    )
    if not quiet:
        for engine in built:
            click.echo(f"{engine.path}: {engine.path.stat().st_size / 1e6:.1f} MB")


@click.command()
@click.argument("config", metavar="CONFIG", type=PATH)
@click.option("--data-root", type=PATH, required=True, help="Folder that the paths in CONFIG are relative to.")
@click.option(
    "-o", "--output", type=PATH, required=True, help="Folder for the checkpoint, the metrics and the model file."
)
@click.option("--initial", type=PATH, help="Model file or checkpoint with initial weights.  [default: random weights]")
@click.option(
    "--initial-model",
    metavar="NAME",
    help="Model of which --initial is the checkpoint, as named by `fseft-edge models`.  [default: --initial is a model "
    "file]",
)
@click.option("--resume", is_flag=True, help="Continue the run in the output folder.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device for training; auto uses a GPU if there is one.",
)
@click.option("--tensorboard", is_flag=True, help="Also write events for TensorBoard.")
@logging_options
def pretrain(
    *,
    config: Path,
    data_root: Path,
    output: Path,
    initial: Path | None,
    initial_model: str | None,
    resume: bool,
    device: str,
    tensorboard: bool,
    quiet: bool,
) -> None:
    """Train an encoder on the data sets in the TOML file CONFIG; each data set may annotate only some of the organs."""
    with loading():
        from fseft_edge.pretraining import open_processes, read_pretraining_config  # noqa: PLC0415 - brings in torch
        from fseft_edge.pretraining import pretrain as run  # noqa: PLC0415 - brings in torch

    wanted = read_pretraining_config(config)
    with open_processes(device) as processes, open_progress(quiet=quiet or not processes.first) as progress:
        model = run(
            wanted,
            data_root=data_root,
            output=output,
            initial=initial,
            initial_model=initial_model,
            resume=resume,
            tensorboard=tensorboard,
            processes=processes,
            progress=progress,
        )
    if processes.first:
        click.echo(str(model))
