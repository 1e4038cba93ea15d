"""One self-contained HTML page with text, tables and pictures. The page loads nothing and runs no script.

The pictures are part of the file, so that the page can be sent by mail or archived. The page can be printed, and its
colours follow the light or dark setting of the reader. All text is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from fseft_edge.report.rendering import rendered
from fseft_edge.runtime.errors import UnreadableFileError
from fseft_edge.runtime.system.atomic import atomic_path

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    kind: ClassVar = "paragraph"

    text: str


@dataclass(frozen=True)
class Table:
    """A table. Columns with numbers are aligned to the right; None is shown as a dash.

    Args:
        columns: column headings.
        rows: rows with one cell for each column.
        caption: description of the table, with units.
        digits: number of decimal places of floating-point numbers in each column; None means 3 in all columns.
    """

    kind: ClassVar = "table"

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    caption: str = ""
    digits: Sequence[int] | None = None

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.rows} | {len(self._digits)}
        if lengths != {len(self.columns)}:
            raise ValueError(f"a table of {len(self.columns)} columns has rows or digits for {sorted(lengths)}")

    @property
    def numeric(self) -> list[bool]:
        """Whether each column contains a number."""
        return [any(isinstance(row[n], int | float) for row in self.rows) for n in range(len(self.columns))]

    @property
    def texts(self) -> list[list[str]]:
        """The cells as text."""
        return [[_cell_text(*cell) for cell in zip(row, self._digits, strict=True)] for row in self.rows]

    @property
    def _digits(self) -> Sequence[int]:
        return [3] * len(self.columns) if self.digits is None else self.digits


@dataclass(frozen=True)
class Picture:
    """A PNG file that becomes part of the page.

    Args:
        path: the PNG file. It is read when the page is written.
        caption: description of the picture, also for screen readers.
    """

    kind: ClassVar = "picture"

    path: Path
    caption: str

    @property
    def source(self) -> str:
        """The picture as a ``data:`` address.

        Raises:
            UnreadableFileError: the file is missing or is not a PNG file.
        """
        remedy = "Write the picture before the page that contains it."
        try:
            png = self.path.read_bytes()
        except OSError as error:
            raise UnreadableFileError(
                f"Picture {self.path} cannot be read: {error.strerror}.", remedy=remedy
            ) from error
        if not png.startswith(_PNG_SIGNATURE):
            raise UnreadableFileError(f"Picture {self.path} is not a PNG file.", remedy=remedy)
        return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, tables and pictures."""

    heading: str
    blocks: Sequence[Paragraph | Table | Picture]


@dataclass(frozen=True)
class DiceChange:
    """Results for one organ of one case before and after adaptation; None means that there is no value.

    Attributes:
        case: name of the case.
        organ: name of the organ.
        before: DSC without adaptation, 0 to 1.
        after: DSC with adaptation, 0 to 1.
        predicted_ml: volume after adaptation in ml.
        reference_ml: volume of the annotation in ml.
    """

    case: str
    organ: str
    before: float | None
    after: float | None
    predicted_ml: float
    reference_ml: float | None


def dice_change_table(changes: Sequence[DiceChange]) -> Table:
    """Return a table of DSC before and after adaptation, and of volumes.

    If at least two rows have both DSC values, the last row contains the means over these rows.
    """
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
    """Write the page. The same content gives the same bytes.

    Args:
        path: the HTML file. An existing file is replaced in one step.
        title: title of the page and of the browser tab.
        sections: sections in the order of the page.
        summary: one or two sentences below the title.

    Raises:
        UnreadableFileError: a picture is missing or is not a PNG file.
        OutOfSpaceError: the disk is full or not writable.
    """
    html = rendered("fseft_edge.report", "page.html.j2", title=title, sections=sections, summary=summary)
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _cell_text(value: str | float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
