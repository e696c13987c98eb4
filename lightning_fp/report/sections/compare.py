"""Several runs beside each other: their curves in one chart, their differences in one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning_fp.report.draw.curves import INK, curve, panel, panels, told_apart
from lightning_fp.report.draw.parts import Section, Table, decibels, duration, number
from lightning_fp.report.read.cost import RunCost
from lightning_fp.report.read.format_history import ever_low, format_histories
from lightning_fp.report.read.incidents import incidents
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.sections.headline import low_precision
from lightning_fp.report.sections.over_time import difference
from lightning_fp.statistic_names import share


def comparison(runs: Sequence[RunRecords], costs: Sequence[RunCost]) -> Section:
    """The section that compares runs.

    Args:
        runs: two or more.
        costs: what each cost.
    """
    # The last is drawn on top: those in high precision, as dots through which the others are seen.
    drawn = sorted(enumerate(runs), key=lambda each: _is_high(each[1]))
    curves = [
        curve(
            f"{run.name} (dots)" if _is_high(run) else run.name,
            run.steps.steps,
            run.steps.losses,
            color=INK if _is_high(run) else told_apart(i),
            smooth=True,
            last=run.steps.final_loss(),
            dotted=_is_high(run),
        )
        for i, run in drawn
        if run.steps is not None
    ]
    norms = [
        curve(
            run.name,
            run.steps.steps,
            run.steps.grad_norms,
            color=INK if _is_high(run) else told_apart(i),
            smooth=True,
            dotted=_is_high(run),
        )
        for i, run in drawn
        if run.steps is not None and run.steps.grad_norms.isfinite().any()
    ]
    fields = [panel("loss", curves, height=240)] if curves else []
    fields += _apart(runs)
    if norms:
        fields.append(panel("gradient norm", norms, height=140))
    last = max(run.last_step for run in runs)
    look = "Faint: every step. Strong: running mean. Where the lines part, look at what differs."
    chart = panels("Loss and gradient norm by optimizer step", look, fields, last=last)
    return Section(
        id="comparison",
        title="The runs compared",
        look="Differences in loss, formats and cost; the same batches make them comparable.",
        charts=(chart,) if fields else (),
        tables=(differences(runs, costs),),
        missing="" if fields else "No loss is recorded: add ClampMonitor() to the callbacks.",
    )


def _is_high(run: RunRecords) -> bool:
    """Whether a run was in high precision throughout, as far as it is recorded."""
    return bool(run.starts) and not ever_low(run) and run.statistics is None


def _apart(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """Each run's loss minus that of the one they are compared with, step by step."""
    known = [(i, run, run.steps) for i, run in enumerate(runs) if run.steps is not None]
    of = next((each for each in known if _is_high(each[1])), known[0] if known else None)
    if of is None:
        return []
    lines = [
        line
        for i, run, steps in known
        if run is not of[1] and (line := difference(run.name, steps, of[2], told_apart(i)))
    ]
    return (
        [panel(f"loss minus that of {of[1].name}", lines, log=False, height=100)] if lines else []
    )


def differences(runs: Sequence[RunRecords], costs: Sequence[RunCost]) -> Table:
    """A row for each figure, a column for each run; the loss also against the first one's."""
    losses = [run.steps.final_loss() if run.steps else None for run in runs]
    first = losses[0]

    def against(loss: float | None) -> str:
        return "" if loss is None or not first else f"{loss / first - 1:+.2%}"

    layers = [low_precision(run) for run in runs]
    rows: list[list[str]] = [
        ["final loss", *(number(loss) or "unknown" for loss in losses)],
        ["against the first run", "", *(against(loss) for loss in losses[1:])],
        ["steps of the run", *(f"{cost.attempted:,}" for cost in costs)],
        ["steps kept", *(f"{cost.useful:,}" for cost in costs)],
        ["skipped / undone", *(f"{c.skipped:,} / {c.rolled_back:,}" for c in costs)],
        ["time in all", *(duration(cost.seconds) for cost in costs)],
        ["time per step, median", *(duration(cost.step_seconds) for cost in costs)],
        ["speed-up, everything counted", *(_speedup(cost) for cost in costs)],
        [
            "layers in low precision",
            *(f"{low} of {all}" if all else "unknown" for low, all, _ in layers),
        ],
        ["formats at the end", *(_formats(run) for run in runs)],
        ["largest clamped mass", *(_worst(run, "clamped_mass") for run in runs)],
        ["largest underflow", *(_worst(run, "underflow_fraction") for run in runs)],
        ["smallest SQNR", *(_worst(run, "sqnr_db") for run in runs)],
        ["alarms", *(_count(run, "suspect") for run in runs)],
        ["incidents, low precision at fault", *(_faults(run) for run in runs)],
    ]
    return Table(
        title="Differences",
        columns=("", *(run.name for run in runs)),
        rows=rows,
        numbers=frozenset(range(1, len(runs) + 1)),
    )


def _formats(run: RunRecords) -> str:
    counts = Counter(history[-1][1] for history in format_histories(run).values())
    return ", ".join(f"{many} {format}" for format, many in counts.most_common(4)) or "unknown"


def _worst(run: RunRecords, ranking: str) -> str:
    if run.statistics is None:
        return "not recorded"
    cells = {str(name): cells for name, cells in run.statistics.worst.items()}.get(ranking, [])
    shown = decibels if ranking == "sqnr_db" else share
    return shown(cells[0].value) if cells else "none lost"


def _count(run: RunRecords, kind: str) -> str:
    return f"{sum(event.kind == kind for event in run.events):,}"


def _faults(run: RunRecords) -> str:
    found = [incident for incident in incidents(run.events) if incident.finding == "precision"]
    return f"{len(found):,}"


def _speedup(cost: RunCost) -> str:
    if cost.emulated:
        return "FP8 emulated"
    return "unknown" if cost.effective_speedup is None else f"{cost.effective_speedup:.2f}x"
