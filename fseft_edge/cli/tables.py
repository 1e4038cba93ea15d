"""Printing of tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def echo_table(table: Table) -> None:
    """Print a table in the width of the terminal; if stdout is not a terminal, in a width of 160 characters."""
    from rich.console import Console  # noqa: PLC0415 - only commands with tables need the import

    Console(width=None if sys.stdout.isatty() else 160).print(table)
