"""The commands that make encoder bundles and the engines beside them; see :mod:`fseft_edge.cli.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fseft_edge.cli.options import PATH, talk_options

if TYPE_CHECKING:
    from fseft_edge.runtime.bundle import Precision
    from fseft_edge.runtime.engine_files import EngineLibrary

_TARGET_HELP = (
    "GPUs to build an engine for: sm_75, sm_86, ... (compute capability 7.5, 8.6, ...) or portable, separated by "
    "commas; may be repeated.  [default: this machine's GPU{otherwise}]"
)


def _listed(values: tuple[str, ...]) -> list[str]:
    return [target.strip() for value in values for target in value.split(",")]


@click.command()
@click.argument("checkpoint", type=PATH, required=False)
@click.option(
    "--model",
    default=None,
    help="edge_base (built in, needs no CHECKPOINT), fseft, or custom (a model file of `pretrain`).  "
    "[default: custom with CHECKPOINT, edge_base without]",
)
@click.option("-o", "--output", type=PATH, required=True, help="The encoder bundle to write, NAME.encoder.")
@click.option("--onnx/--no-onnx", default=True, show_default=True, help="Write ONNX graphs beside the weights.")
@click.option(
    "--parity-ct", type=PATH, multiple=True, help="A CT to compare backends with PyTorch on; may be repeated."
)
@click.option("--target", "targets", multiple=True, help=_TARGET_HELP.format(otherwise=", none without one"))
@talk_options
def export(
    *,
    checkpoint: Path | None,
    model: str | None,
    output: Path,
    onnx: bool,
    parity_ct: tuple[Path, ...],
    targets: tuple[str, ...],
    quiet: bool,
) -> None:
    """Export the frozen encoder of CHECKPOINT once, as a bundle that the other commands use."""
    from fseft_edge.export.export import export_encoder  # noqa: PLC0415 - brings in torch

    name = model or ("custom" if checkpoint else "edge_base")
    bundle = export_encoder(
        checkpoint, model=name, output=output, onnx=onnx, parity_volumes=parity_ct, targets=_listed(targets)
    )
    if not quiet:
        click.echo(
            f"{output}: {bundle.manifest.name}, {len(bundle.manifest.organs)} organs, id {bundle.encoder_id[:12]}"
        )


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--target", "targets", multiple=True, help=_TARGET_HELP.format(otherwise=""))
@click.option(
    "--library",
    type=click.Choice(["tensorrt_rtx", "tensorrt"]),
    help="What builds and later runs them.  [default: TensorRT-RTX where it is installed, else TensorRT]",
)
@click.option(
    "--precision",
    type=click.Choice(["mixed", "float32"]),
    help="Which of the bundle's graphs to build.  [default: mixed where the bundle has it]",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="Windows that an engine takes at once; more take more of the GPU's memory.",
)
@click.option(
    "--parity-ct", type=PATH, multiple=True, help="A CT to compare this GPU's engine with PyTorch on; may be repeated."
)
@talk_options
def build_engines(
    *,
    bundle: Path,
    targets: tuple[str, ...],
    library: EngineLibrary | None,
    precision: Precision | None,
    max_batch: int,
    parity_ct: tuple[Path, ...],
    quiet: bool,
) -> None:
    """Build the GPU engines that are missing or stale in the encoder bundle BUNDLE."""
    from fseft_edge.export.engines import build_engines as run  # noqa: PLC0415 - brings in torch

    built = run(
        bundle,
        _listed(targets),
        library=library,
        precision=precision,
        max_batch=max_batch,
        parity_volumes=parity_ct,
    )
    if not quiet:
        for engine in built:
            click.echo(f"{engine.path}: {engine.path.stat().st_size / 1e6:.1f} MB")
