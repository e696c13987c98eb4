"""Write a run's report as one HTML file, and print a summary of it; several runs are compared."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from lightning_fp.cli.output import console
from lightning_fp.report.page import read_runs, render
from lightning_fp.report.terminal import print_summary

FILE = "report.html"
"""Name of the file in the first run's directory."""


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "runs", type=str, nargs="+", help="directories that ClampMonitor and the others wrote to"
    )
    parser.add_argument(
        "--output", type=str, default=None, help=f"the file; by default {FILE} in the first run"
    )
    parser.add_argument(
        "--baseline",
        type=str,
        default=None,
        help="a run in high precision to compare times with, e.g. of `lightning-fp baseline`",
    )
    parser.add_argument("--open", action="store_true", help="open the file in the browser")


# `open` is the name of the option.
def run(runs: Sequence[str], output: str | None, baseline: str | None, open: bool) -> int:
    """Print the summary and write the report.

    Raises:
        ValueError: if a run has no records; or jinja2 is missing, after the summary.
    """
    records, costs = read_runs(runs, baseline)
    screen = console()
    print_summary(records, costs, screen)
    path = Path(runs[0], FILE) if output is None else Path(output)
    try:
        page = render(records, costs)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except (ImportError, OSError) as error:
        raise ValueError(str(error)) from error
    screen.print(f"report: {path}", markup=False, soft_wrap=True)
    if open:
        webbrowser.open(path.resolve().as_uri())
    return 0
