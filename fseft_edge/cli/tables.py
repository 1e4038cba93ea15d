"""Printing a table."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def echo_table(table: Table) -> None:
    """Print a table at the terminal's width, or whole where stdout is none."""
    from rich.console import Console  # noqa: PLC0415 - only where a table is shown

    Console(width=None if sys.stdout.isatty() else 160).print(table)
