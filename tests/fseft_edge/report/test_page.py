from __future__ import annotations

import base64
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from doubles.errors import refused
from doubles.repository import ROOT
from jinja2 import UndefinedError
from PIL import Image

from fseft_edge.report.page import DiceChange, Paragraph, Picture, Section, Table, dice_change_table, write_page
from fseft_edge.report.rendering import rendered
from fseft_edge.runtime.errors import UnreadableFileError

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """A parser that checks the nesting of elements and records text, attributes and table rows."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (3, 2), (255, 0, 0)).save(path)
    return path


def test_page_is_self_contained_and_runs_no_script(tmp_path: Path, png: Path) -> None:
    path = tmp_path / "report" / "index.html"
    write_page(path, "Demo", [Section("Query 1", [Paragraph("Text."), Picture(png, "Three planes")])], summary="Short.")
    page = read(path)
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["alt"] == "Three planes"
    assert base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,")) == png.read_bytes()
    assert "prefers-color-scheme: dark" in html
    assert all(text in page.text for text in ("Demo", "Short.", "Query 1", "Text."))
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]


def test_all_text_is_escaped(tmp_path: Path, png: Path) -> None:
    hostile = '<script>alert("1")</script>&\'{title}'
    table = Table(columns=[hostile, "b"], rows=[[hostile, 1.0]], caption=hostile)
    path = tmp_path / "p.html"
    write_page(path, hostile, [Section(hostile, [Paragraph(hostile), table, Picture(png, hostile)])], summary=hostile)
    page = read(path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.rows == [[hostile, "b"], [hostile, "1.000"]]
    assert page.text.count(hostile) == 9  # title, h1, summary, heading, paragraph, column, cell, two captions


def test_table_of_dice_before_and_after_has_a_row_of_means(tmp_path: Path) -> None:
    changes = [
        DiceChange("query_1", "liver", before=0.4, after=0.9, predicted_ml=1501.26, reference_ml=1490.0),
        DiceChange("query_2", "liver", before=0.5, after=0.8, predicted_ml=1380.0, reference_ml=1400.0),
        DiceChange("query_2", "spleen", before=None, after=0.7, predicted_ml=150.0, reference_ml=None),
    ]
    path = tmp_path / "p.html"
    write_page(path, "Demo", [Section("Scores", [dice_change_table(changes)])])
    assert read(path).rows == [
        ["case", "organ", "DSC before", "DSC after", "ml", "reference ml"],
        ["query_1", "liver", "0.400", "0.900", "1501.3", "1490.0"],
        ["query_2", "liver", "0.500", "0.800", "1380.0", "1400.0"],
        ["query_2", "spleen", "–", "0.700", "150.0", "–"],
        ["mean", "2 masks", "0.450", "0.850", "–", "–"],
    ]


def test_same_content_gives_the_same_bytes(tmp_path: Path, png: Path) -> None:
    sections = [Section("A", [Picture(png, "c"), Table(["n"], [[3]])])]
    for name in ("a.html", "b.html"):
        write_page(tmp_path / name, "Demo", sections)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize("content", [None, b"<svg/>"])
def test_missing_or_wrong_picture_is_refused_and_no_page_is_written(tmp_path: Path, content: bytes | None) -> None:
    picture = tmp_path / "missing.png"
    if content is not None:
        picture.write_bytes(content)
    with refused(UnreadableFileError, "missing.png"):
        write_page(tmp_path / "p.html", "Demo", [Section("A", [Picture(picture, "c")])])
    assert not (tmp_path / "p.html").exists()


def test_table_with_a_row_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 columns"):
        Table(["a", "b"], [["only one"]])
    with pytest.raises(ValueError, match="2 columns"):
        Table(["a", "b"], [], digits=(1,))


def test_templates_are_installed_with_their_packages() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    folders = {path.parent for path in (ROOT / "fseft_edge").rglob("*.j2")}
    packages = {".".join(folder.parent.relative_to(ROOT).parts) for folder in folders}
    assert packages == {"fseft_edge.batch", "fseft_edge.report"}
    assert all("templates/*" in data[package] for package in packages)


def test_jinja2_is_not_imported_before_a_page_is_written() -> None:
    program = "import sys, fseft_edge.report.page, fseft_edge.batch.report; sys.exit('jinja2' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)  # noqa: S603 - our own program


def test_missing_value_of_a_template_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        rendered("fseft_edge.report", "page.html.j2", title="Demo", summary="")
