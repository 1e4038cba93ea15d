"""Tables of a speed report, for a terminal with 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fseft_edge.machine.speed_stages import STAGES

if TYPE_CHECKING:
    from rich.table import Table

    from fseft_edge.machine.speed_results import ScanSpeed, SpeedReport, Spread


_BUSY = 0.25
_HEADINGS = ("backend", "precision", "batch", "s", "win/s", "first", "open", "GiB")


def speed_tables(report: SpeedReport) -> Iterator[Table]:
    """Yield the table for windows, then one table for each scan."""
    yield _encoder(report)
    for scan in dict.fromkeys(row.scan for row in report.scans):
        yield _scan(scan, [row for row in report.scans if row.scan == scan])


def _table(title: str, caption: str, texts: int, headings: tuple[str, ...]) -> Table:
    """Return an empty table; the first ``texts`` columns are left-aligned, the others right-aligned."""
    from rich.table import Table  # noqa: PLC0415 - only needed for tables
    from rich.text import Text  # noqa: PLC0415 - only needed for tables

    table = Table(title=Text(title, "bold"), caption=caption, title_justify="left", caption_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < texts else "right")
    return table


def _encoder(report: SpeedReport) -> Table:
    gpu = any(row.peak_vram_bytes is not None for row in report.encoder)
    ceilings = ", ".join(f"{precision} {rate / 1e9:.0f}" for precision, rate in report.ceilings.items())
    table = _table(
        f"{report.encoder_name}: windows of {' x '.join(map(str, report.window))} on {report.device}",
        f"s: median seconds per batch (quartiles), {report.rounds} rounds; first: first batch of a process;\n"
        "open: opening the encoder; GiB: peak memory of the process; peak: share of the speed of a large\n"
        f"matrix product (GFLOP/s: {ceilings}). One window needs {report.flop_a_window / 1e9:.1f} GFLOP."
        f"{_busy(report)}",
        2,
        (*_HEADINGS, "VRAM", "peak") if gpu else (*_HEADINGS, "peak"),
    )
    for row in report.encoder:
        memory = [_gib(row.peak_ram_bytes), *([_gib(row.peak_vram_bytes)] if gpu else [])]
        speed = [f"{row.windows_a_second:.2f}", f"{row.first_seconds:.2f}", f"{row.open_seconds:.2f}"]
        cells = [str(row.batch), _spread(row.seconds), *speed, *memory, f"{row.share_of_ceiling:.0%}"]
        table.add_row(row.backend, row.precision, *cells)
    return table


def _busy(report: SpeedReport) -> str:
    if report.load_before < _BUSY:
        return ""
    return (
        f"\nOther programs were using the processor (load {report.load_before:.1f} per core before the start),\n"
        "so these times can be too long."
    )


def _scan(scan: str, rows: list[ScanSpeed]) -> Table:
    stages = [stage for stage in STAGES if any(stage in row.stages for row in rows)]
    table = _table(
        f"{scan}: from the scan file to the {'mask' if 'write' in stages else 'feature map'}, seconds and share",
        "total: median (quartiles) without opening the encoder; stages: median.",
        2,
        ("stage", "", *(row.backend for row in rows)),
    )
    for stage in stages:
        table.add_row(stage, STAGES[stage], *(_share(row, stage) for row in rows))
    table.add_section()
    table.add_row("total", "", *(_spread(row.seconds) for row in rows), style="bold")
    table.add_row("RAM", "GiB", *(_gib(row.peak_ram_bytes) for row in rows))
    if any(row.peak_vram_bytes is not None for row in rows):
        table.add_row("VRAM", "GiB, PyTorch only", *(_gib(row.peak_vram_bytes) for row in rows))
    return table


def _share(row: ScanSpeed, stage: str) -> str:
    seconds = row.stages.get(stage, 0.0)
    return f"{seconds:.2f} {seconds / sum(row.stages.values()):4.0%}"


def _spread(seconds: Spread) -> str:
    digits = 1 if seconds.median >= 10 else 2 if seconds.median >= 0.1 else 4
    low, high = f"{seconds.low:.{digits}f}", f"{seconds.high:.{digits}f}"
    return f"{seconds.median:.{digits}f} ({low}–{high})"


def _gib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**30:.2f}"
