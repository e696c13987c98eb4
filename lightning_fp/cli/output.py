"""How commands print."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lightning_fp.records.jsonl import json_text


def console(*, stderr: bool = False) -> Console:
    """Standard output: in colour on a terminal; plain in a pipe, 80 wide unless COLUMNS is set.

    Args:
        stderr: whether to print to standard error, because JSON goes to the output.
    """
    return Console(highlight=False, stderr=stderr)


def print_json(value: Any) -> None:
    """Print as JSON without inf and NaN, which JSON does not know: null stands for them."""
    print(json_text(value))
