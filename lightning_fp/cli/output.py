"""How commands print."""

from __future__ import annotations

import os

from rich.console import Console

from lightning_fp.report.draw.terminal_table import table as table

PIPE_WIDTH = 140
"""Columns where the output is no terminal and COLUMNS is not set: rich would take 80."""


def console() -> Console:
    """Standard output: in colour on a terminal, plain and wide in a pipe."""
    output = Console(highlight=False)
    if not output.is_terminal and "COLUMNS" not in os.environ:
        output.width = PIPE_WIDTH
    return output
