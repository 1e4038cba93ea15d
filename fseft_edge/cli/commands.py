"""The commands. Each command parses its options, calls a Python function, and prints the result to stdout.

Progress, messages and errors go to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from fseft_edge.cli.options import (
    ORGAN_HELP,
    PATH,
    Common,
    common_options,
    counted,
    dicom_option,
    follow_size_option,
    logging_options,
    structure_options,
    whole_scan_option,
)
from fseft_edge.cli.start import loading
from fseft_edge.cli.tables import echo_table
from fseft_edge.outbox.records import printable
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
    """Run export, adapt, segment and evaluate once on built-in data, and make pictures."""
    with loading():
        from fseft_edge.demonstration import run_demo  # noqa: PLC0415 - only this command needs it

    with open_progress(quiet=quiet) as progress:
        result = run_demo(output, progress=progress)
    echo_table(result.table())
    click.echo(f"Pictures: {result.page}")


@click.command()
@click.argument("scans", type=PATH, nargs=-1, required=True)
@click.option(
    "--adapter",
    "adapters",
    type=PATH,
    multiple=True,
    help="Adapter, NAME.adapter. May be repeated. Without an adapter, --encoder segments the organs that it knows.",
)
@click.option("-o", "--output", type=PATH, required=True, help="Folder for the masks and their JSON files.")
@click.option(
    "--encoder",
    type=PATH,
    help="Encoder bundle, or edge_base (built in).  [default: the adapter's encoder in its folder, the working "
    "folder, or built in]",
)
@click.option(
    "--organ",
    "organs",
    multiple=True,
    metavar="NAME",
    help="Without an adapter: segment only these organs of the encoder: NAME[,NAME...]. May be repeated.",
)
@click.option(
    "--series",
    metavar="UID",
    help="DICOM series of the scan: its UID, the last characters of its UID, or its number in the list of an error "
    "message.  [default: the CT series with the most slices]",
)
@click.option(
    "--transductive",
    is_flag=True,
    help="Refit the adapters' classifiers to each scan, so that organs have plausible sizes.",
)
@click.option(
    "--support-images",
    type=PATH,
    help="With --transductive: folder of the annotated CTs that the adapter was trained on.",
)
@click.option("--support-labels", type=PATH, help="With --transductive: folder of the annotations of these CTs.")
@click.option(
    "--size-prior",
    "size_priors",
    multiple=True,
    metavar="NAME=LOW..HIGHml",
    help="With --transductive: smallest and largest plausible volume of an organ. May be repeated.  [default: computed "
    "from the support scans]",
)
@click.option(
    "--size-volumes",
    type=PATH,
    help="With --transductive: CSV file (organ,volume_ml) of volumes from which to compute the plausible sizes.",
)
@click.option(
    "--largest-component/--all-components",
    default=None,
    help="Keep only the largest connected component of each organ, or all components.  [default: as chosen by the "
    "adapter's cross-validation]",
)
@click.option(
    "--fill-holes/--keep-holes",
    default=None,
    help="Fill or keep the holes in each organ.  [default: as chosen by the adapter's cross-validation]",
)
@click.option("--preview", is_flag=True, help="Also write a picture of each mask, <case>.png.")
@dicom_option
@click.option(
    "--save-probabilities",
    is_flag=True,
    help="Also write the probabilities of each organ before post-processing, <case>/<organ>.probability.nii.gz.",
)
@click.option("--split", is_flag=True, help="Also write a separate mask of each organ, <case>/<organ>.nii.gz.")
@whole_scan_option
@follow_size_option
@click.option(
    "--skip-existing",
    is_flag=True,
    help="Keep complete results of the same scan, adapters and options in the output folder; segment only other scans.",
)
@click.option("--json", "as_json", is_flag=True, help="Print volumes, quality flags and warnings as JSON.")
@common_options
def segment(
    *,
    scans: tuple[Path, ...],
    adapters: tuple[Path, ...],
    output: Path,
    encoder: Path | None,
    organs: tuple[str, ...],
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
    save_probabilities: bool,
    split: bool,
    whole_scan: bool,
    follow_size: bool,
    skip_existing: bool,
    as_json: bool,
    common: Common,
) -> None:
    """Segment SCANS (NIfTI files, folders of NIfTI files, DICOM series); each mask has the lattice of its scan."""
    transduction = None
    if transductive:
        transduction = _transduction_inputs(support_images, support_labels, size_priors, size_volumes)
    elif support_images or support_labels or size_priors or size_volumes:
        raise UsageError(
            "--support-images, --support-labels, --size-prior and --size-volumes can only be used with --transductive.",
            remedy="Add --transductive, or remove these options.",
        )
    with loading():
        from fseft_edge.segmentation.segment import segment as run  # noqa: PLC0415 - brings in torch

    show = _segment_json if as_json else _segment_text
    try:
        with common.progress() as progress:
            results = run(
                scans,
                adapters,
                output,
                encoder=encoder,
                organs=[name.strip() for part in organs for name in part.split(",")],
                series=series,
                transduction=transduction,
                largest_component=largest_component,
                fill_holes=fill_holes,
                preview=preview,
                dicom=dicom,
                save_probabilities=save_probabilities,
                split=split,
                whole_scan=whole_scan,
                follow_size=follow_size,
                skip_existing=skip_existing,
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


def _transduction_inputs(
    images: Path | None, labels: Path | None, size_priors: Sequence[str], size_volumes: Path | None
) -> TransductionInputs:
    if images is None or labels is None:
        raise UsageError(
            "--transductive needs the annotated scans that the adapter was trained on.",
            remedy="Add --support-images and --support-labels with the folders of these scans.",
        )
    with loading():
        from fseft_edge.adaptation.size_priors import parse_size_priors, read_size_priors  # noqa: PLC0415 - only transduction needs it
        from fseft_edge.adaptation.transduction import TransductionInputs  # noqa: PLC0415 - brings in torch

    table = read_size_priors(size_volumes) if size_volumes else {}
    return TransductionInputs(images, labels, parse_size_priors(size_priors), table)


def _segment_json(results: Sequence[SegmentedCase]) -> str:
    cases = [
        {
            "case": result.case,
            "mask": str(result.mask),
            "organs": [asdict(organ) for organ in result.organs],
            "warnings": list(result.warnings),
            "not_written": list(result.not_written),
            "existing": result.existing,
        }
        for result in results
    ]
    return json.dumps(cases, indent=2)


def _segment_text(results: Sequence[SegmentedCase]) -> str:
    lines = []
    for result in results:
        organs = ", ".join(
            f"{organ.name} {organ.volume_ml:.1f} ml{' (' + ', '.join(organ.flags) + ')' if organ.flags else ''}"
            for organ in result.organs
        )
        count = len(result.warnings)
        warnings = f"; {count} warning{'s' * (count > 1)}" if count else ""
        existing = "exists already: " if result.existing else ""
        lines.append(f"{printable(str(result.mask))}: {existing}{organs}{warnings}")
    return "\n".join(lines)


@click.command("export-adapter")
@click.argument("adapter", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="ONNX file to write, NAME.onnx.")
@click.option(
    "--encoder",
    type=PATH,
    help="Encoder bundle, or edge_base (built in).  [default: the adapter's encoder in its folder, the working "
    "folder, or built in]",
)
@logging_options
def export_adapter(*, adapter: Path, output: Path, encoder: Path | None, quiet: bool) -> None:
    """Write ADAPTER and its encoder as one ONNX graph for other programs: input window, output probabilities."""
    with loading():
        from fseft_edge.adapters.onnx_export import export_adapter as run  # noqa: PLC0415 - brings in torch

    graph = run(adapter, output, encoder=encoder)
    if not quiet:
        compared = (
            "the graph was not tested, because onnxruntime is not installed"
            if graph.difference is None
            else f"largest difference from the probabilities of fseft-edge: {graph.difference:.1e}"
        )
        click.echo(f"{output}: {', '.join(graph.organs)}; {compared}")


@click.command()
@click.option("--predictions", type=PATH, required=True, help="Folder of masks from `segment`, or of other label maps.")
@click.option("--references", type=PATH, required=True, help="Folder of annotations with equal names.")
@click.option("--organ", "organs", multiple=True, required=True, metavar="NAME=ID|ROI", help=ORGAN_HELP)
@click.option(
    "--prediction-organ",
    "prediction_organs",
    multiple=True,
    metavar="NAME=ID",
    help="Organ and its label value in the masks: NAME=ID[,NAME=ID...]. May be repeated.  [default: from the JSON "
    "files of the masks; without them, the label values of --organ]",
)
@click.option(
    "--always-annotated",
    multiple=True,
    metavar="NAME",
    help="Organ that was annotated in every scan that shows it: NAME[,NAME...], or all. May be repeated. A reference "
    "without this organ then states that the organ is absent, and a mask with the organ is a false positive with DSC 0."
    "  [default: none; in a reference without an organ, the organ was not annotated, and the case has no scores]",
)
@click.option(
    "--nsd-tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="Tolerance of the normalised surface distance in mm.",
)
@structure_options
@click.option("--csv", "csv_file", type=PATH, help="CSV file to write the scores to.")
@click.option("--json", "json_file", type=PATH, help="JSON file to write the scores and their summary to.")
@logging_options
def evaluate(
    *,
    predictions: Path,
    references: Path,
    organs: tuple[str, ...],
    prediction_organs: tuple[str, ...],
    always_annotated: tuple[str, ...],
    nsd_tolerance: float,
    structure_set: str | None,
    interpolate: bool,
    csv_file: Path | None,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Compare masks with annotations: DSC, HD95 and normalised surface distance for each case and organ."""
    wanted = parse_organs(organs)
    ids = {organ.name: organ.label for organ in parse_organs(prediction_organs)} if prediction_organs else None
    always = [name.strip() for part in always_annotated for name in part.split(",")]
    with loading():
        from fseft_edge.evaluation.evaluate import evaluate as run  # noqa: PLC0415 - brings in MONAI

    with open_progress(quiet=quiet) as progress:
        result = run(
            predictions,
            references,
            wanted,
            prediction_ids=ids,
            always_annotated=[organ.name for organ in wanted] if always == ["all"] else always,
            nsd_tolerance_mm=nsd_tolerance,
            structure_set=structure_set,
            interpolate=interpolate,
            progress=progress,
        )
    if csv_file is not None:
        result.to_csv(csv_file)
    if json_file is not None:
        result.to_json(json_file)
    echo_table(result.table())
    for hint in result.hints:
        click.echo(f"WARNING: {hint}", err=True)
    for failure in result.failures:
        click.echo(f"{failure.case}: {failure.message} {failure.remedy}", err=True)
    if result.failures:
        raise SomeCasesFailedError(
            f"{counted(len(result.failures), 'case')} could not be compared.",
            remedy="Correct the problems in the list above and run the command again.",
        )
