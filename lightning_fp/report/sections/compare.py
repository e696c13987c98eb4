"""Several runs beside each other: their curves in one chart, their differences in one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lightning_fp.report.draw.curves import curve, panel, panels, told_apart
from lightning_fp.report.draw.parts import Section, Table, decibels, duration, number, share
from lightning_fp.report.read.cost import RunCost
from lightning_fp.report.read.format_history import format_histories
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.sections.headline import low_precision


def comparison(runs: Sequence[RunRecords], costs: Sequence[RunCost]) -> Section:
    """The section that compares runs.

    Args:
        runs: two or more.
        costs: what each cost.
    """
    curves = [
        curve(
            run.name,
            run.steps.steps,
            run.steps.losses,
            color=told_apart(i),
            smooth=True,
            last=run.steps.final_loss(),
        )
        for i, run in enumerate(runs)
        if run.steps is not None
    ]
    norms = [
        curve(run.name, run.steps.steps, run.steps.grad_norms, color=told_apart(i), smooth=True)
        for i, run in enumerate(runs)
        if run.steps is not None and run.steps.grad_norms.isfinite().any()
    ]
    fields = [panel("loss", curves, height=240)] if curves else []
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
        ["steps attempted", *(f"{cost.attempted:,}" for cost in costs)],
        ["steps kept", *(f"{cost.useful:,}" for cost in costs)],
        ["skipped / rolled back", *(f"{c.skipped:,} / {c.rolled_back:,}" for c in costs)],
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
        ["demotions", *(_count(run, "demote") for run in runs)],
        ["suspicions", *(_count(run, "suspect") for run in runs)],
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


def _speedup(cost: RunCost) -> str:
    if cost.emulated:
        return "FP8 emulated"
    return "unknown" if cost.effective_speedup is None else f"{cost.effective_speedup:.2f}x"
