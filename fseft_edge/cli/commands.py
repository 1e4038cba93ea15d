"""The commands. Each parses, calls its Python twin and prints the result to stdout; all else goes to stderr."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from fseft_edge.cli.options import ORGAN_HELP, PATH, Common, common_options, dicom_option, logging_options
from fseft_edge.cli.tables import echo_table
from fseft_edge.runtime.errors import SomeCasesFailedError, UsageError
from fseft_edge.runtime.scans.organs import parse_organs
from fseft_edge.runtime.system.progress import open_progress

if TYPE_CHECKING:
    from fseft_edge.adaptation.transduction import TransductionInputs
    from fseft_edge.dicom_output import DicomKind
    from fseft_edge.masks.result import SegmentedCase


@click.command()
@click.option("-o", "--output", type=PATH, default=Path("demo"), show_default=True, help="Folder for the results.")
@logging_options
def demo(output: Path, quiet: bool) -> None:
    """Run everything once on built-in data: export, adapt, segment, evaluate, with pictures."""
    from fseft_edge.demonstration import run_demo  # noqa: PLC0415 - only this command needs it

    with open_progress(quiet=quiet) as progress:
        result = run_demo(output, progress=progress)
    echo_table(result.table())
    click.echo(f"Pictures: {result.page}")


@click.command()
@click.argument("scans", type=PATH, nargs=-1, required=True)
@click.option("--adapter", "adapters", type=PATH, multiple=True, required=True, help="Adapter; may be repeated.")
@click.option("-o", "--output", type=PATH, required=True, help="Folder for masks and their JSON.")
@click.option("--encoder", type=PATH, help="Encoder bundle.  [default: the adapter's, beside it or in this folder]")
@click.option(
    "--series",
    metavar="UID",
    help="DICOM series of the scan: its UID, an end of it, or its number in the list that an error shows."
    "  [default: the CT series with most slices]",
)
@click.option(
    "--transductive", is_flag=True, help="Tune the adapters to each scan, so that organs have plausible sizes."
)
@click.option("--support-images", type=PATH, help="With --transductive: the annotated CTs that adapt was given.")
@click.option("--support-labels", type=PATH, help="With --transductive: their annotations.")
@click.option(
    "--size-prior",
    "size_priors",
    multiple=True,
    metavar="NAME=LOW..HIGHml",
    help="With --transductive: sizes that an organ may have.  [default: made of the support volumes]",
)
@click.option(
    "--size-volumes", type=PATH, help="With --transductive: CSV of volumes to make priors of (organ,volume_ml)."
)
@click.option(
    "--largest-component/--all-components",
    default=None,
    help="Keep only the largest piece of each organ, or all.  [default: what helped on scans left out of adapt]",
)
@click.option(
    "--fill-holes/--keep-holes", default=None, help="Fill the holes of each organ, or not.  [default: likewise]"
)
@click.option("--preview", is_flag=True, help="Write a picture of each mask, <case>.png.")
@dicom_option
@click.option("--json", "as_json", is_flag=True, help="Print volumes and flags as JSON.")
@common_options
def segment(
    *,
    scans: tuple[Path, ...],
    adapters: tuple[Path, ...],
    output: Path,
    encoder: Path | None,
    series: str | None,
    transductive: bool,
    support_images: Path | None,
    support_labels: Path | None,
    size_priors: tuple[str, ...],
    size_volumes: Path | None,
    largest_component: bool | None,
    fill_holes: bool | None,
    preview: bool,
    dicom: tuple[DicomKind, ...],
    as_json: bool,
    common: Common,
) -> None:
    """Segment CTs (NIfTI files, folders of them, DICOM series); every mask lies on its scan's own lattice."""
    plan = None
    if transductive:
        plan = _transduction_plan(support_images, support_labels, size_priors, size_volumes)
    elif support_images or support_labels or size_priors or size_volumes:
        raise UsageError("Support scans and size priors serve --transductive.", remedy="Add it, or leave them out.")
    from fseft_edge.segmentation.segment import segment as run  # noqa: PLC0415 - brings in torch

    show = _segment_json if as_json else _segment_text
    try:
        with common.progress() as progress:
            results = run(
                scans,
                adapters,
                output,
                encoder=encoder,
                series=series,
                transduction=plan,
                largest_component=largest_component,
                fill_holes=fill_holes,
                preview=preview,
                dicom=dicom,
                cache=common.cache,
                cache_gb=common.cache_gb,
                device=common.device,
                backend=common.backend,
                precision=common.precision,
                memory_gb=common.memory,
                vram_gb=common.vram,
                progress=progress,
            )
    except SomeCasesFailedError as error:
        click.echo(show(cast("tuple[SegmentedCase, ...]", error.completed)))
        raise
    click.echo(show(results))


def _transduction_plan(
    images: Path | None, labels: Path | None, size_priors: Sequence[str], size_volumes: Path | None
) -> TransductionInputs:
    if images is None or labels is None:
        raise UsageError(
            "--transductive needs the annotated scans that the adapter was trained on.",
            remedy="Name their folders by --support-images and --support-labels.",
        )
    from fseft_edge.adaptation.size_priors import parse_size_priors, read_size_priors  # noqa: PLC0415 - only this mode needs it
    from fseft_edge.adaptation.transduction import TransductionInputs  # noqa: PLC0415 - brings in torch

    table = read_size_priors(size_volumes) if size_volumes else {}
    return TransductionInputs(images, labels, parse_size_priors(size_priors), table)


def _segment_json(results: Sequence[SegmentedCase]) -> str:
    cases = [{"case": r.case, "mask": str(r.mask), "organs": [asdict(organ) for organ in r.organs]} for r in results]
    return json.dumps(cases, indent=2)


def _segment_text(results: Sequence[SegmentedCase]) -> str:
    lines = []
    for result in results:
        organs = ", ".join(
            f"{organ.name} {organ.volume_ml:.1f} ml{' (' + ', '.join(organ.flags) + ')' if organ.flags else ''}"
            for organ in result.organs
        )
        lines.append(f"{result.mask}: {organs}")
    return "\n".join(lines)


@click.command("export-adapter")
@click.argument("adapter", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="The graph to write, NAME.onnx.")
@click.option("--encoder", type=PATH, help="Encoder bundle.  [default: the adapter's, beside it or in this folder]")
@logging_options
def export_adapter(*, adapter: Path, output: Path, encoder: Path | None, quiet: bool) -> None:
    """Write the encoder and ADAPTER as one ONNX graph for other programs: window in, probabilities out."""
    from fseft_edge.adapters.onnx_export import export_adapter as run  # noqa: PLC0415 - brings in torch

    graph = run(adapter, output, encoder=encoder)
    if not quiet:
        compared = (
            "not compared with the toolkit's own result, since onnxruntime is not installed"
            if graph.difference is None
            else f"within {graph.difference:.1e} of the toolkit's own probabilities"
        )
        click.echo(f"{output}: {', '.join(graph.organs)}; {compared}")


@click.command()
@click.option("--predictions", type=PATH, required=True, help="Folder that `segment` wrote (or any label maps).")
@click.option("--references", type=PATH, required=True, help="Folder of annotations, same file names.")
@click.option("--organ", "organs", multiple=True, required=True, metavar="NAME=ID", help=ORGAN_HELP)
@click.option(
    "--nsd-tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="Surface tolerance in mm.",
)
@click.option("--csv", "csv_file", type=PATH, help="Write the rows as CSV.")
@click.option("--json", "json_file", type=PATH, help="Write the rows and the summary as JSON.")
@logging_options
def evaluate(
    *,
    predictions: Path,
    references: Path,
    organs: tuple[str, ...],
    nsd_tolerance: float,
    csv_file: Path | None,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Compare masks with annotations: DSC, HD95 and normalised surface distance, per case and organ."""
    wanted = {organ.name: organ.label for organ in parse_organs(organs)}
    from fseft_edge.evaluation.evaluate import evaluate as run  # noqa: PLC0415 - brings in MONAI

    with open_progress(quiet=quiet) as progress:
        result = run(predictions, references, wanted, nsd_tolerance_mm=nsd_tolerance, progress=progress)
    if csv_file is not None:
        result.to_csv(csv_file)
    if json_file is not None:
        result.to_json(json_file)
    echo_table(result.table())
    for failure in result.failures:
        click.echo(f"{failure.case}: {failure.message} {failure.remedy}", err=True)
    if result.failures:
        raise SomeCasesFailedError(
            f"{len(result.failures)} cases could not be compared.", remedy="The reasons stand above."
        )
