"""Show which layers a run's formats hurt most, and any layer's course over the steps."""

from __future__ import annotations

import fnmatch
from typing import Any

import pyarrow as pa
import pyarrow.compute as functions
from rich.console import Console
from rich.text import Text

from lightning_fp.cli.output import console, print_json
from lightning_fp.counting import counted
from lightning_fp.records import read_statistics
from lightning_fp.report.draw.heatmaps import NAMES
from lightning_fp.report.draw.sparkline import sparkline
from lightning_fp.report.read.digest import RANKINGS, Ranking
from lightning_fp.report.read.run_records import read_records
from lightning_fp.report.sections.missing import why_no_statistics
from lightning_fp.terminal import FittedTable

# pyarrow makes its functions at import, out of sight of type checkers.
pc: Any = functions

_EXTREMES = {
    "clamped_mass": "max",
    "underflow_fraction": "max",
    "sqnr_db": "min",
    "headroom_bits": "min",
    "nonfinite": "sum",
}
"""How each column is brought together over a run."""

_COLUMNS = ["step", "layer", "operand", "format", "amax", *_EXTREMES]


# `json` is the name of the option.
def run(run: str, layer: str | None, top: int, *, json: bool) -> int:
    """Print the worst operands of a run, or the course of the layers that match.

    Raises:
        ValueError: if there are no statistics, or no layer matches.
    """
    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    try:
        rows = read_statistics(run, columns=_COLUMNS)
    except FileNotFoundError as error:
        raise ValueError(_why_none(run, str(error))) from error
    if not rows.num_rows:
        none = f"{run!r} has no rows yet; they come with the first log interval"
        raise ValueError(_why_none(run, none))
    if layer is None:
        found: dict[Ranking, list[dict[str, Any]]] = {n: worst(rows, n, top) for n in RANKINGS}
        if json:
            print_json({"run": run, "worst": found})
        else:
            _print_worst(run, rows, found, console())
        return 0
    curves = courses(rows, layer)
    if json:
        print_json({"run": run, "layers": curves})
    else:
        _print_courses(curves, console())
    return 0


def _why_none(run: str, otherwise: str) -> str:
    """Why there are no statistics, where other records of the run can tell."""
    try:
        return f"{run}: {why_no_statistics(read_records(run))}"
    except ValueError:
        return otherwise


def worst(rows: pa.Table, ranking: Ranking, top: int) -> list[dict[str, Any]]:
    """The worst operands of a run by one statistic.

    Args:
        rows: what `read_statistics` returned.
        ranking: what they are ranked by; of SQNR, small is bad.
        top: how many.

    Returns:
        For each operand of a layer: the extremes over the run, the worst first; none that lost
        nothing.
    """
    operands = rows.filter(pc.not_equal(rows["operand"].cast(pa.string()), "output"))
    value = operands[ranking]
    lossy = operands.filter(pc.is_finite(value) if ranking == "sqnr_db" else pc.greater(value, 0))
    keys = ["layer", "operand", "format"]
    names = [*keys, *_EXTREMES]
    found = lossy.group_by(keys).aggregate(list(_EXTREMES.items()))
    found = found.select([*keys, *(f"{name}_{how}" for name, how in _EXTREMES.items())])
    plain = [found[name].cast(pa.string()) for name in keys]
    found = pa.Table.from_arrays([*plain, *found.columns[len(keys) :]], names=names)
    worst_first = "ascending" if ranking == "sqnr_db" else "descending"
    order = [(ranking, worst_first), ("layer", "ascending"), ("operand", "ascending")]
    return found.sort_by(order).slice(0, top).to_pylist()


def courses(rows: pa.Table, glob: str) -> dict[str, dict[str, dict[str, list[Any]]]]:
    """The statistics over the steps, of the layers that match.

    Args:
        rows: what `read_statistics` returned.
        glob: over the whole layer name.

    Returns:
        `{layer: {operand: {column: values}}}`, with "step" and "format" among the columns.

    Raises:
        ValueError: if no layer matches.
    """
    names = rows["layer"].unique().to_pylist()
    matching = [name for name in names if fnmatch.fnmatchcase(name, glob)]
    if not matching:
        raise ValueError(
            f"--layer {glob!r} matches no layer of the run; it has {', '.join(names[:5])}"
        )
    chosen = rows.filter(pc.is_in(rows["layer"].cast(pa.string()), pa.array(matching)))
    curves: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for row in chosen.sort_by([("step", "ascending")]).to_pylist():
        operand = curves.setdefault(row.pop("layer"), {}).setdefault(row.pop("operand"), {})
        for name, value in row.items():
            operand.setdefault(name, []).append(value)
    return curves


def _print_worst(
    run: str, rows: pa.Table, found: dict[Ranking, list[dict[str, Any]]], screen: Console
) -> None:
    steps = pc.min_max(rows["step"]).as_py()
    layers = counted(len(rows["layer"].unique()), "layer")
    line = f"{run}: {layers} in low precision, steps {steps['min']} to {steps['max']}"
    screen.print(line, markup=False, soft_wrap=True)
    for ranking, entries in found.items():
        title = NAMES[ranking]
        if not entries:
            screen.print(f"\nNo operand has any {title}.", style="dim")
            continue
        numbers = ("clamped mass", "underflow", "SQNR", "headroom", "non-finite")
        grid = FittedTable(f"Worst by {title}", "layer, operand, format", *numbers, right=numbers)
        for entry in entries:
            grid.add_row(
                Text(f"{entry['layer']} {entry['operand']}\n{entry['format']}"),
                _text(entry["clamped_mass"], "{:.2%}"),
                _text(entry["underflow_fraction"], "{:.2%}"),
                _text(entry["sqnr_db"], "{:.1f} dB"),
                _text(entry["headroom_bits"], "{:+.1f} bits"),
                _text(entry["nonfinite"], "{}"),
            )
        screen.print(grid)


def _print_courses(curves: dict[str, dict[str, dict[str, list[Any]]]], screen: Console) -> None:
    for layer, operands in curves.items():
        for operand, columns in operands.items():
            formats = " -> ".join(dict.fromkeys(columns["format"]))
            numbers = ("first", "last")
            title = f"{layer}, {operand}: {formats}"
            grid = FittedTable(title, "statistic", *numbers, "course", right=numbers)
            for name, form in (
                ("amax", "{:.3g}"),
                ("headroom_bits", "{:+.2f}"),
                ("clamped_mass", "{:.3%}"),
                ("underflow_fraction", "{:.3%}"),
                ("sqnr_db", "{:.1f}"),
            ):
                values = columns[name]
                if any(value is not None for value in values):
                    first, last = _text(values[0], form), _text(values[-1], form)
                    worse = min if name in ("headroom_bits", "sqnr_db") else max
                    grid.add_row(name, first, last, sparkline(values, of=worse))
            screen.print(grid)


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
