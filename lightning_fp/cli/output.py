"""How commands print."""

from __future__ import annotations

import os

from rich import box
from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 140
"""Columns where the output is no terminal and COLUMNS is not set: rich would take 80."""


def console() -> Console:
    """Standard output: in colour on a terminal, plain and wide in a pipe."""
    output = Console(highlight=False)
    if not output.is_terminal and "COLUMNS" not in os.environ:
        output.width = PIPE_WIDTH
    return output


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table in the one style of the command line.

    Args:
        title: above it; may be empty.
        columns: headings.
        right: those whose cells are numbers.
    """
    grid = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        grid.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return grid
