"""The demonstration on its real scans, with a tiny encoder and one training step: each stage runs in seconds."""

from __future__ import annotations

import html.parser
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles.encoder import write_tiny_encoder
from doubles.errors import refused
from PIL import Image
from rich.console import Console

from fseft_edge import demonstration
from fseft_edge.adaptation.adapt import adapt
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.file import AdapterFile, read_adapter
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.demonstration import KNOWN, NOVEL, QUERIES, SUPPORT, DemoResult, run_demo
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.system.progress import SilentProgress

TINY_KNOWN = (OrganLabel("liver", 1), OrganLabel("left_lung", 2))
"""The names of the tiny encoder's classifiers with label values of the demonstration."""


class RecordedProgress(SilentProgress):
    """Records the names of the tasks."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def task(self, name: str, total: float) -> Any:
        self.names.append(name)
        return super().task(name, total)


def _tiny_export(checkpoint: Path | None, *, model: str, output: Path, onnx: bool) -> EncoderBundle:
    assert (checkpoint, model, onnx) == (None, "edge_base", False)
    return write_tiny_encoder(output)


def _brief_adapt(*arguments: Any, training: TrainingSettings | None = None, **options: Any) -> AdapterFile:
    step = TrainingSettings(epochs=1, block=16, batch=1, blocks_per_epoch=1)
    return adapt(*arguments, **options, settings=AdapterSettings("linear", "finest"), training=step)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstration, "export_encoder", _tiny_export)
        patch.setattr(demonstration, "adapt", _brief_adapt)
        patch.setattr(demonstration, "KNOWN", TINY_KNOWN)
        yield


@pytest.fixture(scope="module")
def progress() -> RecordedProgress:
    return RecordedProgress()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, progress: RecordedProgress) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("work") / "new" / "demo", progress=progress)


def test_each_stage_writes_its_results(result: DemoResult) -> None:
    folder = result.page.parent
    assert result.page.name == "index.html"
    for part, cases in (("support", SUPPORT), ("query", QUERIES)):
        for kind in ("images", "labels"):
            assert sorted(path.name for path in (folder / part / kind).iterdir()) == [f"{c}.nii.gz" for c in cases]
    bundle = EncoderBundle.open(folder / "edge_base.encoder")
    for name in ("zero_shot.adapter", "parotids.adapter"):
        assert read_adapter(folder / name).description.encoder_id == bundle.encoder_id
    for case in QUERIES:
        query = read_ct(folder / "query" / "images" / f"{case}.nii.gz")
        for stage in ("before", "after"):
            mask = read_label_map(folder / stage / f"{case}.nii.gz")
            assert mask.shape == query.shape
            np.testing.assert_array_equal(mask.affine, query.affine)


def test_the_installed_scans_are_annotated_with_all_organs_and_no_query_is_a_support_scan() -> None:
    assert not set(SUPPORT) & set(QUERIES)
    data = files("fseft_edge") / "demonstration_data"
    for case in (*SUPPORT, *QUERIES):
        labels = read_label_map(Path(str(data / "label" / f"{case}.nii.gz")))
        assert read_ct(Path(str(data / "ct" / f"{case}.nii.gz"))).shape == labels.shape
        assert {organ.label for organ in (*KNOWN, *NOVEL)} <= set(np.unique(labels.array).tolist())
        assert case in (data / "README.md").read_text(encoding="utf-8")


@pytest.mark.real_ct
def test_the_installed_scans_are_support_scans_of_the_benchmarks(real_ct: Path) -> None:
    support = json.loads((real_ct / "headneck" / "splits.json").read_text(encoding="utf-8"))["support"]
    data = files("fseft_edge") / "demonstration_data"
    for case in (*SUPPORT, *QUERIES):
        assert case in support
        for kind in ("ct", "label"):
            installed = (data / kind / f"{case}.nii.gz").read_bytes()
            assert installed == (real_ct / "headneck" / kind / f"{case}.nii.gz").read_bytes()


def test_changes_contain_each_organ_before_and_after(result: DemoResult) -> None:
    after = {(row.case, row.organ): row for row in result.after.rows}
    before = {(row.case, row.organ): row for row in result.before.rows}
    known = {organ.name for organ in TINY_KNOWN}
    assert set(after) == {(case, organ) for case in QUERIES for organ in known | {organ.name for organ in NOVEL}}
    assert set(before) == {(case, organ) for case in QUERIES for organ in known}
    changes = result.changes()
    assert [(change.case, change.organ) for change in changes] == list(after)
    for change in changes:
        key = (change.case, change.organ)
        assert change.after == after[key].dsc
        assert change.before == (before[key].dsc if key in before else None)


def test_the_table_shows_each_score(result: DemoResult) -> None:
    console = Console(width=200, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115 - closed below
    console.print(result.table())
    console.file.close()
    text = console.export_text()
    for change in result.changes():
        line = next(line for line in text.splitlines() if change.case in line and change.organ in line)
        for value in (change.before, change.after):
            assert ("–" if value is None else f"{value:.3f}") in line


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_shows_each_query_before_and_after_and_needs_no_network(result: DemoResult) -> None:
    page = result.page.read_text(encoding="utf-8")
    links = _Links()
    links.feed(page)
    assert sum("png" in source for source in links.sources) == 2 * len(QUERIES)
    for source in links.sources:
        assert source.startswith(("data:", "#")) or (result.page.parent / source).is_file()
    for case in QUERIES:
        assert case in page
        for stage in ("before", "after"):
            with Image.open(result.page.parent / f"{case}_{stage}.png") as picture:
                assert min(picture.size) > 200
    assert "OpenKBP" in page


def test_progress_contains_each_stage(result: DemoResult, progress: RecordedProgress) -> None:
    stages = ["export edge_base", "encode", "adapt", "segment", "evaluate"]
    assert [name for name in stages if name not in progress.names] == []


def test_an_earlier_demonstration_is_replaced(result: DemoResult) -> None:
    folder = result.page.parent
    (folder / "stale.txt").write_text("of the last run")
    again = run_demo(folder)
    assert not (folder / "stale.txt").exists()
    assert again.after.rows == result.after.rows


def test_another_folder_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("five years")
    with refused(UsageError, tmp_path):
        run_demo(tmp_path)
    (tmp_path / "file").touch()
    with refused(UsageError, tmp_path / "file"):
        run_demo(tmp_path / "file")
    assert (tmp_path / "thesis.tex").read_text() == "five years"
