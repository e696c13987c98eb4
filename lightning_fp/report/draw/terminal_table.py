"""The one look of tables on a terminal."""

from __future__ import annotations

from collections.abc import Collection

from rich import box
from rich.table import Table


def table(title: str, *columns: str, right: Collection[str] = ()) -> Table:
    """A table without rows.

    Args:
        title: above it; may be empty.
        columns: headings.
        right: those whose cells are numbers.
    """
    grid = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        grid.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return grid
