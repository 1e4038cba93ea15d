"""The demo: everything once, on built-in data with exact ground truth.

A phantom cohort of a *shifted* site (sharper and noisier kernel, another contrast phase, an offset), which the built-in
encoder has never seen, is segmented before and after adaptation to three annotated scans of that site. Phantoms show
that the machinery works; they say nothing about accuracy on patients.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fseft_edge.adaptation.adapt import adapt, zero_shot_adapter
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.file import write_adapter
from fseft_edge.evaluation.evaluate import Evaluation, evaluate
from fseft_edge.export.export import export_encoder
from fseft_edge.phantom import ORGANS, SITES, phantom
from fseft_edge.report.page import DiceChange, Paragraph, Picture, Section, dice_change_table, write_page
from fseft_edge.report.pictures import three_plane_picture
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map, write_ct, write_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.system.progress import Progress, SilentProgress
from fseft_edge.segmentation.segment import segment

if TYPE_CHECKING:
    from rich.table import Table

_LOG = logging.getLogger(__name__)
_MARKER = ".fseft-edge-demo"
_SITE = "shifted"
_SHAPE = (128, 96, 104)
_SUPPORT_SEEDS = (1, 2, 3)
_QUERY_SEEDS = (11, 12)
_BLOCKS = 600
_ORGANS = ("liver", "spleen", "left_kidney", "aorta", "pancreas")


@dataclass(frozen=True)
class DemoResult:
    """What the demo found: scores before and after adaptation, and the page that shows them."""

    before: Evaluation
    after: Evaluation
    page: Path

    def changes(self) -> list[DiceChange]:
        """Return every organ of every query, before and after."""
        earlier = {(row.case, row.organ): row for row in self.before.rows}
        return [
            DiceChange(
                row.case,
                row.organ,
                earlier[row.case, row.organ].dsc if (row.case, row.organ) in earlier else None,
                row.dsc,
                row.predicted_ml,
                row.reference_ml,
            )
            for row in self.after.rows
        ]

    def table(self) -> Table:
        """Return the changes as a table for a terminal."""
        from rich.table import Table  # noqa: PLC0415 - only where a table is shown

        content = dice_change_table(self.changes())
        table = Table(caption="on phantoms: shows that it works, not how accurate it is on patients")
        for number, column in enumerate(content.columns):
            table.add_column(column, justify="right" if number > 1 else "left")
        digits = content.digits or [3] * len(content.columns)
        for row in content.rows:
            cells = zip(row, digits, strict=True)
            table.add_row(*("–" if v is None else v if isinstance(v, str) else f"{v:.{d}f}" for v, d in cells))
        return table


def run_demo(output: Path, *, progress: Progress | None = None) -> DemoResult:
    """Export the built-in encoder, adapt it to three phantoms of another site, segment two others, evaluate.

    Args:
        output: folder for everything that is made; replaced when an earlier demo made it.
        progress: where to show progress.

    Raises:
        UsageError: ``output`` exists and is not a demo's.
    """
    progress = progress or SilentProgress()
    _prepare_folder(output)
    organs = [OrganLabel(name, ORGANS.index(name) + 1) for name in _ORGANS]
    with progress.task("make phantoms", len(_SUPPORT_SEEDS) + len(_QUERY_SEEDS)) as task:
        for folder, seeds in (("support", _SUPPORT_SEEDS), ("query", _QUERY_SEEDS)):
            for seed in seeds:
                scan = phantom(seed, shape=_SHAPE, site=SITES[_SITE])
                write_ct(output / folder / "images" / f"phantom_{seed:02d}.nii.gz", scan.volume)
                write_label_map(output / folder / "labels" / f"phantom_{seed:02d}.nii.gz", scan.labels)
                task.advance(1)
    encoder = output / "edge_base.encoder"
    with progress.task("export edge_base", 1) as task:
        bundle = export_encoder(None, model="edge_base", output=encoder)
        task.advance(1)
    known = [organ for organ in organs if organ.name in bundle.manifest.organs]
    write_adapter(output / "zero_shot.adapter", zero_shot_adapter(bundle, known))
    cache = output / "cache"
    adapt(
        encoder,
        output / "support" / "images",
        output / "support" / "labels",
        organs,
        output / "site.adapter",
        training=TrainingSettings(blocks=_BLOCKS),
        validate=False,
        cache=cache,
        progress=progress,
    )
    before = _segment_and_score(output, "before", "zero_shot.adapter", known, progress)
    after = _segment_and_score(output, "after", "site.adapter", organs, progress)
    result = DemoResult(before, after, output / "index.html")
    _write_page(output, result, organs)
    return result


def _prepare_folder(output: Path) -> None:
    if output.exists():
        if not (output / _MARKER).is_file():
            raise UsageError(f"{output} exists and is not a demo's folder.", remedy="Choose another --output.")
        shutil.rmtree(output)
    for part in ("support", "query"):
        (output / part / "images").mkdir(parents=True)
        (output / part / "labels").mkdir()
    (output / _MARKER).touch()


def _segment_and_score(
    output: Path, name: str, adapter: str, organs: Sequence[OrganLabel], progress: Progress
) -> Evaluation:
    segment([output / "query" / "images"], [output / adapter], output / name, cache=output / "cache", progress=progress)
    labels = {organ.name: organ.label for organ in organs}
    return evaluate(output / name, output / "query" / "labels", labels, progress=progress)


def _write_page(output: Path, result: DemoResult, organs: Sequence[OrganLabel]) -> None:
    sections = [
        Section(
            "Agreement with the truth",
            [
                Paragraph(
                    "Three annotated phantoms of a scanner that the encoder has never seen, two others to segment. "
                    "Organs without a figure before adaptation are unknown to the encoder."
                ),
                dice_change_table(result.changes()),
            ],
        )
    ]
    for seed in _QUERY_SEEDS:
        case = f"phantom_{seed:02d}"
        volume = read_ct(output / "query" / "images" / f"{case}.nii.gz")
        truth = read_label_map(output / "query" / "labels" / f"{case}.nii.gz").array
        found = read_label_map(output / "after" / f"{case}.nii.gz").array
        masks = {
            organ.name: (np.equal(found, number), np.equal(truth, organ.label))
            for number, organ in enumerate(organs, start=1)
        }
        picture = output / f"{case}.png"
        three_plane_picture(volume, masks, picture)
        sections.append(Section(case, [Picture(picture, f"{case} after adaptation, prediction and truth outlined")]))
    write_page(
        result.page,
        "fseft-edge demo",
        sections,
        summary="Made on procedural phantoms: it shows that everything works, not how accurate it is on patients.",
    )
