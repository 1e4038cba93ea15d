"""The demonstration: an organ that the encoder does not know is learned from four real CT scans.

Six head-and-neck CTs of OpenKBP are installed with the package (see ``demonstration_data/README.md``). The built-in
encoder segments the brainstem, the spinal cord and the mandible of two of them without any training (zero-shot). The
encoder has never seen a contour of a parotid. The other four scans teach it both parotids.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from fseft_edge.adaptation.adapt import adapt, zero_shot_adapter
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.file import write_adapter
from fseft_edge.evaluation.evaluate import Evaluation, evaluate
from fseft_edge.export.export import export_encoder
from fseft_edge.masks.result import organ_labels
from fseft_edge.report.page import DiceChange, Paragraph, Picture, Section, dice_change_table, write_page
from fseft_edge.report.pictures import three_plane_picture
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.system.progress import Progress, SilentProgress
from fseft_edge.segmentation.segment import segment

if TYPE_CHECKING:
    from rich.table import Table

SUPPORT: Final = ("hn_002", "hn_004", "hn_017", "hn_020")
QUERIES: Final = ("hn_164", "hn_333")
KNOWN: Final = (OrganLabel("brainstem", 1), OrganLabel("spinal_cord", 2), OrganLabel("mandible", 7))
NOVEL: Final = (OrganLabel("right_parotid", 3), OrganLabel("left_parotid", 4))
"""Organs with their label values in the annotations."""

_MARKER = ".fseft-edge-demo"
_BLOCKS = 960  # half of the default for four scans, so that the demonstration ends within two minutes


@dataclass(frozen=True)
class DemoResult:
    """The scores before and after the parotids were learned, and the page that shows them."""

    before: Evaluation
    after: Evaluation
    page: Path

    def changes(self) -> list[DiceChange]:
        """Return the scores of every organ of every query scan, before and after."""
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
        """Return the scores as a table for a terminal."""
        from rich.table import Table  # noqa: PLC0415 - only where a table is shown

        content = dice_change_table(self.changes())
        table = Table(caption="two patients show that the method works, not how accurate it is: see docs/benchmarks.md")
        for number, column in enumerate(content.columns):
            table.add_column(column, justify="right" if number > 1 else "left")
        digits = content.digits or [3] * len(content.columns)
        for row in content.rows:
            cells = zip(row, digits, strict=True)
            table.add_row(*("–" if v is None else v if isinstance(v, str) else f"{v:.{d}f}" for v, d in cells))
        return table


def run_demo(output: str | Path = Path("demo"), *, progress: Progress | None = None) -> DemoResult:
    """Segment two real CT scans zero-shot, learn both parotids from four other scans, segment the two scans again.

    Args:
        output: folder for all results; the folder of an earlier demonstration is replaced.
        progress: where to show progress.

    Raises:
        UsageError: ``output`` exists and is not the folder of a demonstration.
    """
    output = Path(output)
    progress = progress or SilentProgress()
    _prepare_folder(output)
    with progress.task("export edge_base", 1) as task:
        bundle = export_encoder(None, model="edge_base", output=output / "edge_base.encoder", onnx=False)
        task.advance(1)
    write_adapter(output / "zero_shot.adapter", zero_shot_adapter(bundle, KNOWN))
    before = _segment_and_score(output, "before", ["zero_shot"], KNOWN, progress)
    adapt(
        bundle.path,
        output / "support" / "images",
        output / "support" / "labels",
        NOVEL,
        output / "parotids.adapter",
        training=TrainingSettings(blocks=_BLOCKS),
        validate=False,
        cache=output / "cache",
        progress=progress,
    )
    organs = (*KNOWN, *NOVEL)
    after = _segment_and_score(output, "after", ["zero_shot", "parotids"], organs, progress)
    result = DemoResult(before, after, output / "index.html")
    _write_page(output, result)
    return result


def _prepare_folder(output: Path) -> None:
    if output.exists():
        if not (output / _MARKER).is_file():
            raise UsageError(
                f"{output} exists and is not the folder of a demonstration.", remedy="Choose another --output."
            )
        shutil.rmtree(output)
    for folder, cases in (("support", SUPPORT), ("query", QUERIES)):
        for kind, part in (("ct", "images"), ("label", "labels")):
            (output / folder / part).mkdir(parents=True)
            for case in cases:
                with as_file(files("fseft_edge") / "demonstration_data" / kind / f"{case}.nii.gz") as scan:
                    shutil.copyfile(scan, output / folder / part / scan.name)
    (output / _MARKER).touch()


def _segment_and_score(
    output: Path, name: str, adapters: Sequence[str], organs: Sequence[OrganLabel], progress: Progress
) -> Evaluation:
    paths = [output / f"{adapter}.adapter" for adapter in adapters]
    segment([output / "query" / "images"], paths, output / name, cache=output / "cache", progress=progress)
    labels = {organ.name: organ.label for organ in organs}
    return evaluate(output / name, output / "query" / "labels", labels, progress=progress)


def _write_page(output: Path, result: DemoResult) -> None:
    novel = {organ.name for organ in NOVEL}
    changes = result.changes()
    sections = [
        Section(
            "Known organs, zero-shot",
            [
                Paragraph(
                    "The built-in encoder knows the brainstem, the spinal cord and the mandible. It segments these "
                    "organs in two new patients without any training."
                ),
                *_pictures(output, "before", KNOWN, "before"),
            ],
        ),
        Section(
            "New organs, learned from four scans",
            [
                Paragraph(
                    "The encoder has never seen a contour of a parotid. Four annotated scans teach it both parotids. "
                    "Before, there is no mask of a parotid. Afterwards:"
                ),
                *_pictures(output, "after", NOVEL, "after"),
            ],
        ),
        Section(
            "Agreement with the contours of radiation oncologists",
            [
                dice_change_table([change for change in changes if change.organ not in novel]),
                dice_change_table([change for change in changes if change.organ in novel]),
            ],
        ),
        Section(
            "Data",
            [
                Paragraph(
                    "Six head-and-neck planning CTs of OpenKBP (Babier et al., Medical Physics 48 (2021) 5549-5561; "
                    "repository ababier/open-kbp, MIT; images from The Cancer Imaging Archive)."
                )
            ],
        ),
    ]
    write_page(
        result.page,
        "fseft-edge demonstration",
        sections,
        summary="Real CT of head and neck: known organs without training, and two new organs from four annotated "
        "scans. Two patients show that the method works, not how accurate it is.",
    )


def _pictures(output: Path, name: str, organs: Sequence[OrganLabel], when: str) -> list[Picture]:
    """Write a picture of each query scan with the given organs outlined."""
    pictures = []
    for case in QUERIES:
        volume = read_ct(output / "query" / "images" / f"{case}.nii.gz")
        truth = read_label_map(output / "query" / "labels" / f"{case}.nii.gz").array
        mask = output / name / f"{case}.nii.gz"
        found, labels = read_label_map(mask).array, organ_labels(mask.with_name(f"{case}.json"), mask)
        masks = {organ.name: (np.equal(found, labels[organ.name]), np.equal(truth, organ.label)) for organ in organs}
        path = output / f"{case}_{when}.png"
        three_plane_picture(volume, masks, path)
        pictures.append(Picture(path, f"{case}: mask in orange, contour of the oncologist in blue"))
    return pictures
