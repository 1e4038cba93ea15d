"""The demo, with a tiny encoder, small phantoms and one training step, so that every stage runs in seconds."""

from __future__ import annotations

import functools
import html.parser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles.encoder import SHAPE, SPACING, scan, write_tiny_encoder
from PIL import Image
from rich.console import Console

from fseft_edge import demonstration
from fseft_edge.adaptation.adapt import adapt
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.file import AdapterFile, read_adapter
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.demonstration import DemoResult, run_demo
from fseft_edge.phantom import ORGANS, SITES, phantom
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map
from fseft_edge.runtime.system.progress import SilentProgress

QUERIES = ("phantom_11", "phantom_12")


class Listening(SilentProgress):
    """Keeps the names of the tasks it was told of."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def task(self, name: str, total: float) -> Any:
        self.names.append(name)
        return super().task(name, total)


def _tiny_export(checkpoint: Path | None, *, model: str, output: Path) -> EncoderBundle:
    assert (checkpoint, model) == (None, "edge_base")
    return write_tiny_encoder(output)


def _brief_adapt(*arguments: Any, training: TrainingSettings | None = None, **options: Any) -> AdapterFile:
    step = TrainingSettings(epochs=1, block=16, batch=1, blocks_per_epoch=1)
    return adapt(*arguments, **options, settings=AdapterSettings("linear", "finest"), training=step)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstration, "export_encoder", _tiny_export)
        patch.setattr(demonstration, "adapt", _brief_adapt)
        patch.setattr(demonstration, "phantom", functools.partial(phantom, spacing=SPACING))
        patch.setattr(demonstration, "_SHAPE", SHAPE)
        yield


@pytest.fixture(scope="module")
def progress() -> Listening:
    return Listening()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, progress: Listening) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("work") / "new" / "demo", progress=progress)


def test_every_stage_leaves_its_results(result: DemoResult) -> None:
    folder = result.page.parent
    assert result.page.name == "index.html"
    for part, cases in (("support", ("phantom_01", "phantom_02", "phantom_03")), ("query", QUERIES)):
        for kind in ("images", "labels"):
            assert sorted(path.name for path in (folder / part / kind).iterdir()) == [f"{c}.nii.gz" for c in cases]
    bundle = EncoderBundle.open(folder / "edge_base.encoder")
    for name in ("zero_shot.adapter", "site.adapter"):
        assert read_adapter(folder / name).description.encoder_id == bundle.encoder_id
    for case in QUERIES:
        query = read_ct(folder / "query" / "images" / f"{case}.nii.gz")
        for when in ("before", "after"):
            mask = read_label_map(folder / when / f"{case}.nii.gz")
            assert mask.shape == query.shape
            np.testing.assert_array_equal(mask.affine, query.affine)


def test_the_demos_scans_are_of_another_site_than_the_encoders(result: DemoResult) -> None:
    """The same patient scanned at the reference site has other HU and the same anatomy."""
    folder = result.page.parent / "support"
    shifted = read_ct(folder / "images" / "phantom_01.nii.gz")
    reference = scan(1)
    np.testing.assert_array_equal(read_label_map(folder / "labels" / "phantom_01.nii.gz").array, reference.labels.array)
    expected = phantom(1, shape=SHAPE, spacing=SPACING, site=SITES["shifted"]).volume.array
    np.testing.assert_array_equal(np.asarray(shifted.array), expected)
    liver = reference.labels.array == ORGANS.index("liver") + 1
    assert abs(float(expected[liver].mean()) - float(reference.volume.array[liver].mean())) > 5


def test_changes_tell_of_every_organ_before_and_after(result: DemoResult) -> None:
    after = {(row.case, row.organ): row for row in result.after.rows}
    before = {(row.case, row.organ): row for row in result.before.rows}
    assert {case for case, _ in after} == set(QUERIES)
    assert {organ for _, organ in after} == set(demonstration._ORGANS)
    assert {organ for _, organ in before} == {"liver"}  # all that the tiny encoder's head knows of them
    changes = result.changes()
    assert [(change.case, change.organ) for change in changes] == list(after)
    for change in changes:
        key = (change.case, change.organ)
        assert change.after == after[key].dsc
        assert change.before == (before[key].dsc if key in before else None)


def test_the_table_shows_every_figure_and_what_it_is_not(result: DemoResult) -> None:
    console = Console(width=200, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115 - closed below
    console.print(result.table())
    console.file.close()
    text = console.export_text()
    for change in result.changes():
        line = next(line for line in text.splitlines() if change.case in line and change.organ in line)
        for value in (change.before, change.after):
            assert ("–" if value is None else f"{value:.3f}") in line
    assert "not how accurate it is on patients" in text


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_shows_a_picture_of_every_query_and_needs_no_network(result: DemoResult) -> None:
    page = result.page.read_text(encoding="utf-8")
    links = _Links()
    links.feed(page)
    assert sum("png" in source for source in links.sources) == len(QUERIES)
    for source in links.sources:
        assert source.startswith(("data:", "#")) or (result.page.parent / source).is_file()
    for case in QUERIES:
        assert case in page
        with Image.open(result.page.parent / f"{case}.png") as picture:
            assert min(picture.size) > 200
    assert "not how accurate it is on patients" in page


def test_progress_is_told_of_every_stage(result: DemoResult, progress: Listening) -> None:
    stages = ["make phantoms", "export edge_base", "encode", "adapt", "segment", "evaluate"]
    assert [name for name in stages if name not in progress.names] == []


def test_an_earlier_demo_is_replaced(result: DemoResult) -> None:
    folder = result.page.parent
    (folder / "stale.txt").write_text("of the last run")
    again = run_demo(folder)
    assert not (folder / "stale.txt").exists()
    assert again.after.rows == result.after.rows


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("five years")
    with pytest.raises(UsageError, match="is not a demo's folder"):
        run_demo(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a demo's folder"):
        run_demo(tmp_path / "file")
    assert (tmp_path / "thesis.tex").read_text() == "five years"
