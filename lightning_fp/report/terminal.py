"""A run's report as a screenful of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lightning_fp.report.draw.heatmaps import NAMES, worst_cells
from lightning_fp.report.draw.marks import events_table
from lightning_fp.report.draw.parts import Table, number
from lightning_fp.report.draw.sparkline import sparkline
from lightning_fp.report.draw.terminal_table import table
from lightning_fp.report.page import read_runs
from lightning_fp.report.read.cost import RunCost
from lightning_fp.report.read.format_history import format_histories, last_formats, layer_groups
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.sections.advice import advise, limits_of
from lightning_fp.report.sections.compare import differences
from lightning_fp.report.sections.headline import headline, key_figures

_EVENTS = 10
_TELLING = (
    *("demotion", "rollback", "stage", "verdict", "promotion", "skipped", "suspicion", "blame"),
    *("resume", "layer limit", "gate", "format"),
)
"""Events as the report calls them; of too many, those are shown that come first here."""
_GROUPS = 6
_WORST = 2
_ADVICE = 3


def terminal_summary(
    run_dirs: Sequence[str | Path], console: Console, *, baseline: str | Path | None = None
) -> None:
    """Print what the reports of these runs would show, a screenful each.

    Args:
        run_dirs: the runs' directories.
        console: where to.
        baseline: a run in high precision to compare times with.

    Raises:
        ValueError: if a run has no records.
    """
    print_summary(*read_runs(run_dirs, baseline), console)


def print_summary(runs: Sequence[RunRecords], costs: Sequence[RunCost], console: Console) -> None:
    """The same of records that have been read."""
    if len(runs) > 1:
        _print_differences(differences(runs, costs), console)
    for run, cost in zip(runs, costs, strict=True):
        _print_run(run, cost, console, short=len(runs) > 1)


def _print_run(run: RunRecords, cost: RunCost, console: Console, *, short: bool) -> None:
    console.print(Text(run.name, style="bold"), Text(headline(run, cost)))
    for sentence in run.unreadable:
        console.print(Text(sentence, style="yellow"))
    if short:
        return
    grid = RichTable(box=None, show_header=False, padding=(0, 3, 0, 0))
    for what, value, remark in key_figures(run, cost):
        grid.add_row(Text(what, style="dim"), Text(value, style="bold"), Text(remark, style="dim"))
    console.print(grid)
    if run.steps is not None:
        losses: list[float] = run.steps.losses.tolist()
        finite = run.steps.losses[run.steps.losses.isfinite()]
        ends = f"{number(finite[0].item())} to {number(finite[-1].item())}" if len(finite) else ""
        console.print(Text("loss  ", style="dim"), sparkline(losses, 60), ends, sep="")
    _print_events(run, console)
    _print_formats(run, console)
    if run.statistics is None:
        console.print(Text("What the casts lost is not recorded: add ClampMonitor().", style="dim"))
    else:
        for ranking, cells in run.statistics.worst.items():
            for layer, operand, format, step, value in worst_cells(cells, ranking).rows[:_WORST]:
                where = f"{value}  {layer}, {operand}, in {format}, step {step}"
                console.print(Text(f"worst {NAMES[ranking]}: ", style="dim"), Text(where), sep="")
        advised = advise(run.statistics, limits_of(run.settings), last_formats(run))
        for advice in [found for found in advised if found.badness][:_ADVICE]:
            line = f"{advice.of.layer}, {advice.of.operand}: {advice.what}; {advice.do}"
            console.print(Text("advice: ", style="dim"), Text(line), sep="")
    console.print(Text("cost: ", style="dim"), Text(cost.sentence()), sep="")


def _print_events(run: RunRecords, console: Console) -> None:
    rows = [row for row in events_table(run.events).rows if row[1] in _TELLING]
    ranked = sorted(range(len(rows)), key=lambda row: _TELLING.index(rows[row][1]))
    for step, what, why in (rows[row] for row in sorted(ranked[:_EVENTS])):
        line = Text(f"{step:>9}  {what:<11}  {why}", overflow="ellipsis", no_wrap=True)
        console.print(line)
    if len(rows) > _EVENTS:
        console.print(Text(f"           {len(rows) - _EVENTS} more", style="dim"))


def _print_formats(run: RunRecords, console: Console) -> None:
    groups = layer_groups(format_histories(run))
    groups.sort(key=lambda group: (-len(group.history), -len(group.layers)))
    for group in groups[:_GROUPS]:
        history = " -> ".join(
            format if not i else f"{format} (step {step:,})"
            for i, (step, format) in enumerate(group.history)
        )
        console.print(Text("format: ", style="dim"), Text(f"{group.label}: {history}"), sep="")
    if len(groups) > _GROUPS:
        console.print(Text(f"        {len(groups) - _GROUPS} more groups of layers", style="dim"))


def _print_differences(differ: Table, console: Console) -> None:
    numbers = [differ.columns[index] for index in differ.numbers]
    grid = table(differ.title, *differ.columns, right=numbers)
    for row in differ.rows:
        grid.add_row(*row)
    console.print(grid)
