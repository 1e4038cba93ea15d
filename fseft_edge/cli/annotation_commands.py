"""The command that lists what annotation files contain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fseft_edge.cli.options import PATH, logging_options
from fseft_edge.cli.tables import echo_table

if TYPE_CHECKING:
    from fseft_edge.runtime.scans.structure_list import ListedAnnotation


@click.command()
@click.argument("path", type=PATH)
@click.option(
    "--show-names",
    is_flag=True,
    help="Also print names that contain the patient's name, and the labels of structure sets.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one for each structure.")
@logging_options
def contours(*, path: Path, show_names: bool, as_json: bool, quiet: bool) -> None:  # noqa: ARG001 - set by the options
    """List the structures in PATH: RT Structure Sets, DICOM Segmentations, .seg.nrrd files, or a folder with them."""
    from fseft_edge.runtime.scans.structure_list import list_annotations  # noqa: PLC0415 - loads pydicom

    found = list_annotations(path, show_names=show_names)
    if as_json:
        click.echo(json.dumps([row for annotation in found for row in annotation.rows()], indent=2))
        return
    for annotation in found:
        _print(annotation)


def _print(annotation: ListedAnnotation) -> None:
    from rich.table import Table  # noqa: PLC0415 - only needed to display a table
    from rich.text import Text  # noqa: PLC0415 - only needed to display a table

    described = [annotation.kind, annotation.label, annotation.date, annotation.approval.lower()]
    click.echo(f"{annotation.annotation}. {annotation.file}: {', '.join(part for part in described if part)}")
    table = Table()
    for heading in ("number", "name"):
        table.add_column(heading)
    for heading in ("ml", "contours", "planes"):
        table.add_column(heading, justify="right")
    table.add_column("remarks")
    for structure in annotation.structures:
        volume = "–" if structure.volume_ml is None else f"{structure.volume_ml:.1f}"
        counts = (str(structure.contours or "–"), str(structure.planes))
        remarks = Text(" ".join(structure.warnings))
        table.add_row(str(structure.number), Text(structure.name), volume, *counts, remarks)
    echo_table(table)
    for warning in annotation.warnings:
        click.echo(f"WARNING: {warning}", err=True)
