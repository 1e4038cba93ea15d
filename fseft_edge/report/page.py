"""One self-contained HTML page: text, tables and pictures, nothing fetched and nothing run.

Pictures are inlined; the page can be mailed or kept in an archive, prints well, and follows the reader's light or dark
setting. All text is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

from fseft_edge._version import __version__
from fseft_edge.runtime.errors import UnreadableFileError
from fseft_edge.runtime.system.atomic import atomic_path


@dataclass(frozen=True)
class Paragraph:
    """A piece of running text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows under column headings; numbers stand to the right with the column's digits, None becomes a dash.

    Args:
        columns: headings.
        rows: as many cells each as there are columns.
        caption: what the table shows, with units.
        digits: decimal places of floating-point numbers, one for each column or None for 3 in all.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    caption: str = ""
    digits: Sequence[int] | None = None

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.rows} | {len(self.digits if self.digits is not None else self.columns)}
        if lengths != {len(self.columns)}:
            raise ValueError(f"a table of {len(self.columns)} columns has rows or digits for {sorted(lengths)}")


@dataclass(frozen=True)
class Picture:
    """A PNG file, inlined.

    Args:
        path: the PNG; read when the page is written.
        caption: what it shows; also what a screen reader reads.
    """

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    heading: str
    blocks: Sequence[Paragraph | Table | Picture]


@dataclass(frozen=True)
class DiceChange:
    """One organ of one case before and after adaptation; None where there is no figure.

    Attributes:
        before: DSC without adaptation, 0 to 1.
        after: DSC with it, 0 to 1.
        predicted_ml: volume after adaptation.
        reference_ml: annotated volume.
    """

    case: str
    organ: str
    before: float | None
    after: float | None
    predicted_ml: float
    reference_ml: float | None


def dice_change_table(changes: Sequence[DiceChange]) -> Table:
    """DSC before and after adaptation, and volumes, with the means of the cases that have both in a last row."""
    rows: list[tuple[str | float | None, ...]] = [
        (change.case, change.organ, change.before, change.after, change.predicted_ml, change.reference_ml)
        for change in changes
    ]
    both = [(c.before, c.after) for c in changes if c.before is not None and c.after is not None]
    if len(both) > 1:
        before, after = (sum(values) / len(both) for values in zip(*both, strict=True))
        rows.append(("mean", f"{len(both)} masks", before, after, None, None))
    return Table(
        columns=("case", "organ", "DSC before", "DSC after", "ml", "reference ml"),
        rows=rows,
        caption="Agreement with the reference before and after adaptation (DSC: 0 none, 1 perfect), volumes in ml.",
        digits=(0, 0, 3, 3, 1, 1),
    )


def write_page(path: Path, title: str, sections: Sequence[Section], *, summary: str = "") -> None:
    """Write the page; the same content gives the same bytes.

    Args:
        path: the HTML file, replaced atomically.
        title: of the page and of the browser's tab.
        sections: in order.
        summary: one or two sentences under the title.

    Raises:
        UnreadableFileError: a picture is missing or no PNG.
        OutOfSpaceError: the disk is full or not writable.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    if summary:
        body.append(f'<p class="summary">{escape(summary)}</p>')
    for section in sections:
        body.append(f"<section>\n<h2>{escape(section.heading)}</h2>")
        body += [_block(block) for block in section.blocks]
        body.append("</section>")
    with atomic_path(path) as temporary:
        temporary.write_text(page_around("\n".join(body), title), encoding="utf-8")


def page_around(body: str, title: str, *, style: str = "") -> str:
    """Return a whole page around a body that is HTML already; the title is escaped here.

    Args:
        body: what stands between the top of the page and its footer.
        title: of the browser's tab.
        style: CSS beside that of every page, whose colours follow the reader's light or dark setting.
    """
    return _PAGE.format(title=escape(title), style=_STYLE + style, body=body, version=escape(__version__))


def _block(block: Paragraph | Table | Picture) -> str:
    match block:
        case Paragraph():
            return f"<p>{escape(block.text)}</p>"
        case Table():
            return _table(block)
        case Picture():
            return _picture(block)


def _table(table: Table) -> str:
    digits = table.digits if table.digits is not None else [3] * len(table.columns)
    numeric = [any(isinstance(row[n], int | float) for row in table.rows) for n in range(len(table.columns))]
    lines = ['<div class="scroll"><table>']
    if table.caption:
        lines.append(f"<caption>{escape(table.caption)}</caption>")
    headings = zip(table.columns, numeric, strict=True)
    lines.append(f"<thead><tr>{''.join(_cell('th', heading, right) for heading, right in headings)}</tr></thead>")
    lines.append("<tbody>")
    for row in table.rows:
        cells = (
            _cell("td", _cell_text(value, places), right)
            for value, places, right in zip(row, digits, numeric, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def _cell(tag: str, text: str, right: bool) -> str:
    opening = f'{tag} class="number"' if right else tag
    return f"<{opening}>{escape(text)}</{tag}>"


def _cell_text(value: str | float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _picture(picture: Picture) -> str:
    remedy = "Write the picture before the page that shows it."
    try:
        png = picture.path.read_bytes()
    except OSError as error:
        raise UnreadableFileError(f"Picture {picture.path} cannot be read: {error.strerror}.", remedy=remedy) from error
    if not png.startswith(_PNG_SIGNATURE):
        raise UnreadableFileError(f"Picture {picture.path} is no PNG file.", remedy=remedy)
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    caption = escape(picture.caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"

_STYLE: Final = """\
:root { color-scheme: light dark; --ink: #1b1d22; --soft: #5a6070; --paper: #ffffff; --line: #d8dce4; --band: #f4f6f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaee; --soft: #a3aab8; --paper: #15171b; --line: #343943; --band: #1d2026; }
}
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p { max-width: 46rem; margin: .5rem 0; }
.summary { font-size: 1.08rem; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: var(--soft); font-size: .88rem; padding-top: .4rem; }
th, td { padding: .35rem .9rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid var(--line); }
tbody tr:nth-child(even) { background: var(--band); }
.number { text-align: right; }
figure { margin: 1rem 0 1.6rem; break-inside: avoid; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
"""

_PAGE: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
<footer>Written by fseft-edge {version}. For research; a clinician must check every contour before it is used.</footer>
</body>
</html>
"""
