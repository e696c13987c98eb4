"""Write a run's report as one HTML file, and print a summary of it; several runs are compared."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path

from lightning_fp.cli.output import console, print_json
from lightning_fp.report.page import read_runs, render
from lightning_fp.report.terminal import as_plain, print_summary

FILE = "report.html"
"""Name of the file in the first run's directory."""


# `open` and `json` are the names of the options.
def run(
    runs: Sequence[str], output: str | None, baseline: str | None, *, open: bool, json: bool
) -> int:
    """Print the summary and write the report.

    Raises:
        ValueError: if a run has no records; or jinja2 is missing, after the summary.
    """
    records, costs = read_runs(runs, baseline)
    path = Path(runs[0], FILE) if output is None else Path(output)
    screen = console()
    if json:
        found = [as_plain(run, cost) for run, cost in zip(records, costs, strict=True)]
        print_json({"runs": found, "report": str(path)})
    else:
        print_summary(records, costs, screen)
    try:
        page = render(records, costs)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except ImportError as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    if not json:
        screen.print(f"report: {path}", markup=False, soft_wrap=True)
    if open:
        webbrowser.open(path.resolve().as_uri())
    return 0
