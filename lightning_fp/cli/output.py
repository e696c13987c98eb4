"""How commands print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from lightning_fp.terminal import FittedTable


def console(*, stderr: bool = False) -> Console:
    """Standard output: in colour on a terminal; plain in a pipe, 80 wide unless COLUMNS is set.

    Args:
        stderr: whether to print to standard error, because JSON goes to the output.
    """
    return Console(highlight=False, stderr=stderr)


def table(title: str, *columns: str, right: Sequence[str] = ()) -> FittedTable:
    """A table in the one style of the command line.

    Args:
        title: above it; may be empty.
        columns: headings.
        right: those whose cells are numbers.
    """
    return FittedTable(title, *columns, right=right)
