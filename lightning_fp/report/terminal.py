"""A run's report as a screenful of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lightning_fp.counting import counted
from lightning_fp.report.draw.decisions import events_table
from lightning_fp.report.draw.heatmaps import NAMES, worst_cells
from lightning_fp.report.draw.parts import Table, number
from lightning_fp.report.draw.sparkline import sparkline
from lightning_fp.report.page import read_runs
from lightning_fp.report.read.cost import RunCost
from lightning_fp.report.read.format_history import format_histories, last_formats, layer_groups
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.sections.advice import Advice, advise, backend_of, limits_of
from lightning_fp.report.sections.answer import Tone, answer, name_of_low
from lightning_fp.report.sections.compare import differences
from lightning_fp.report.sections.headline import alarming, headline, key_figures
from lightning_fp.report.sections.missing import why_no_statistics
from lightning_fp.report.sections.title import title
from lightning_fp.terminal import FittedTable

_TONES: dict[Tone, str] = {
    "good": "bold green",
    "changed": "bold yellow",
    "bad": "bold red",
    "open": "bold",
}
_EVENTS = 10
_TELLING = (
    *("unprotected", "incident", "safer format", "steps undone", "rollout", "format back"),
    *("skipped", "alarm", "resume", "gate", "format"),
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
        _print_table(differences(runs, costs), console)
    for run, cost in zip(runs, costs, strict=True):
        _print_run(run, cost, console, short=len(runs) > 1)


def as_plain(run: RunRecords, cost: RunCost) -> dict[str, Any]:
    """The summary of a run as plain data, for JSON."""
    worst = {} if run.statistics is None else run.statistics.worst
    return {
        "name": run.name,
        "path": str(run.path),
        "title": title(run),
        "answer": asdict(answer(run)),
        "headline": headline(run, cost),
        "unreadable": list(run.unreadable),
        "steps": cost.attempted,
        "final_loss": run.steps.final_loss() if run.steps else None,
        "cost": asdict(cost),
        "events": [{"kind": event.kind, **asdict(event)} for event in run.events],
        "formats": [
            {"layers": list(group.layers), "history": list(group.history)}
            for group in layer_groups(format_histories(run))
        ],
        "worst": {ranking: [asdict(cell) for cell in cells] for ranking, cells in worst.items()},
        "advice": [
            {"layer": a.of.layer, "operand": a.of.operand, "what": a.what, "do": a.do}
            for a in _advice(run)
        ],
    }


def _advice(run: RunRecords) -> list[Advice]:
    if run.statistics is None:
        return []
    found = advise(
        run.statistics, limits_of(run.settings), last_formats(run), backend_of(run.settings)
    )
    return [advice for advice in found if advice.badness]


def _print_run(run: RunRecords, cost: RunCost, console: Console, *, short: bool) -> None:
    console.print(Text(title(run), style="bold"), Text(str(run.path), style="dim"))
    found = answer(run)
    line = ". ".join(part for part in (found.word, found.cost.rstrip(".")) if part)
    console.print(Text(f"{line}.", style=_TONES[found.tone]))
    console.print(Text(headline(run, cost), style="bold red" if alarming(run) else ""))
    if found.setting:
        console.print(Text("recommended: ", style="dim"), Text(found.setting), sep="")
    elif found.advice:
        console.print(Text(found.advice, style="dim"))
    for sentence in run.unreadable:
        console.print(Text(sentence, style="yellow"))
    if short:
        return
    grid = FittedTable("", "", "", "", bare=True)
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
        console.print(Text(f"what the casts lost: {why_no_statistics(run)}", style="dim"))
    else:
        for ranking, cells in run.statistics.worst.items():
            for layer, operand, format, step, value in worst_cells(cells, ranking).rows[:_WORST]:
                where = f"{value}  {layer}, {operand}, in {format}, step {step}"
                console.print(Text(f"worst {NAMES[ranking]}: ", style="dim"), Text(where), sep="")
        for advice in _advice(run)[:_ADVICE]:
            line = f"{advice.of.layer}, {advice.of.operand}: {advice.what}; {advice.do}"
            console.print(Text("advice: ", style="dim"), Text(line), sep="")
    console.print(Text("cost: ", style="dim"), Text(cost.sentence()), sep="")


def _print_events(run: RunRecords, console: Console) -> None:
    rows = [row for row in events_table(run.events, name_of_low(run)).rows if row[1] in _TELLING]
    ranked = sorted(range(len(rows)), key=lambda row: _TELLING.index(rows[row][1]))
    grid = FittedTable("", "step", "", "", right=("step",), bare=True)
    for step, what, why in (rows[row] for row in sorted(ranked[:_EVENTS])):
        grid.add_row(Text(step), Text(what), Text(why.partition("\n")[0]))
    console.print(grid)
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
        more = counted(len(groups) - _GROUPS, "more group")
        console.print(Text(f"        {more} of layers", style="dim"))


def _print_table(table: Table, console: Console) -> None:
    columns = list(table.columns)
    grid = FittedTable(table.title, *columns, right=[columns[i] for i in table.numbers])
    for row in table.rows:
        grid.add_row(*map(Text, row))
    console.print(grid)
