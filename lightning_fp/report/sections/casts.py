"""What the formats did: what casts lost, what replays measured, and what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_fp.counting import counted
from lightning_fp.report.draw.curves import GREY, curve, panel, panels, points, told_apart
from lightning_fp.report.draw.heatmaps import NAMES, UNITS, heatmap, worst_cells
from lightning_fp.report.draw.marks import errors_alone
from lightning_fp.report.draw.parts import (
    Chart,
    Section,
    Table,
    number,
    share,
)
from lightning_fp.report.read.digest import RANKINGS, OperandHistory
from lightning_fp.report.read.format_history import last_formats
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.sections.advice import (
    advice_table,
    advise,
    backend_of,
    delayed_would_do,
    limits_of,
    what_if_table,
)
from lightning_fp.report.sections.missing import why_no_probes, why_no_statistics

_HISTORIES = 6
"""Operands whose history is drawn."""
_ATTRIBUTED = 10


def casts_section(records: RunRecords) -> Section:
    """What the casts lost: heatmaps, and the exact worst cells."""
    about = Section(
        id="casts",
        title="What the casts lost",
        look="Layers from top to bottom, steps from left to right; blue is fine, orange is not.",
    )
    digest = records.statistics
    if digest is None:
        return replace(about, missing=why_no_statistics(records))
    limits = limits_of(records.settings)
    charts = [
        {
            **heatmap(digest, ranking, limits[ranking]),
            "table": worst_cells(digest.worst[ranking], ranking),
        }
        for ranking in RANKINGS
    ]
    of = (digest.rows, "row"), (len(digest.layers), "layer"), (digest.intervals, "interval")
    cut = ", ".join(counted(number, thing) for number, thing in of) + "."
    return replace(about, charts=charts, text=(cut,))


def worst_section(records: RunRecords) -> Section:
    """The worst operands over the steps."""
    about = Section(
        id="worst",
        title="Worst operands over time",
        look="Whether the worst is getting worse, is over, or was one moment.",
    )
    digest = records.statistics
    if digest is None:
        return replace(about, missing=why_no_statistics(records))
    limits = limits_of(records.settings)
    charts = [_history(history, limits, records) for history in _chosen(digest.histories)]
    return replace(
        about, charts=charts, small=True, text=() if charts else ("No operand has lost anything.",)
    )


def gradients_section(records: RunRecords) -> Section:
    """What the range of FP16 did to the gradients; only of a run that FP16Monitor looked at."""
    rows = records.gradients
    at = [row.step for row in rows]
    zero, subnormal = (
        [max((100 * getattr(of, name) for of in row.layers.values()), default=0.0) for row in rows]
        for name in ("zero", "subnormal")
    )
    lines = [points("zero", at, zero), points("subnormal", at, subnormal, color=told_apart(1))]
    fields = [
        panel("loss scale", [points("loss scale", at, [row.scale for row in rows])], height=90),
        panel("worst layer", lines, unit="%", log=False, height=130),
    ]
    look = "Shares of the gradients under the loss scale of the step, of the layer with most."
    chart = panels("Gradients in FP16 by optimizer step", look, fields, last=records.last_step)
    largest: dict[str, tuple[float, ...]] = {}
    for row in rows:
        for layer, of in row.layers.items():
            seen = (of.overflow, of.subnormal, of.zero)
            largest[layer] = tuple(map(max, largest.get(layer, seen), seen))
    ranked = sorted(largest.items(), key=lambda item: item[1], reverse=True)[:_ATTRIBUTED]
    table = Table(
        title="Layers by what they lost",
        columns=("layer", "inf or NaN", "subnormal", "zero"),
        rows=[[layer or "the model itself", *map(share, lost)] for layer, lost in ranked],
        numbers=frozenset({1, 2, 3}),
        note="The largest share of any step looked at. Zeros may have been zero to begin with.",
    )
    return Section(
        id="gradients",
        title="Gradients in the range of FP16",
        look="Subnormal gradients lose bits, zeros may have been flushed: a larger scale helps.",
        charts=(chart,),
        tables=(table,),
    )


def parity_section(records: RunRecords) -> Section:
    """The same batch in the current formats and in high precision, and who is to blame."""
    about = Section(
        id="parity",
        title="Against high precision",
        look=(
            "The same batch in the current formats and in high precision: an error that grows"
            " means that the formats fit less and less."
        ),
    )
    probes = {row["step"]: row for row in records.parity}
    blamed = _blamed(records)
    if not probes and not blamed.rows:
        return replace(about, missing=why_no_probes(records))
    charts: list[Chart] = []
    if probes:
        at = list(probes)
        fields = [
            panel(
                "gradient error",
                [
                    points("of the formats", at, [p["grad_error"] for p in probes.values()]),
                    points("noise", at, [p["noise"] for p in probes.values()], color=GREY),
                ],
                log=False,
                height=130,
            ),
            panel(
                "loss gap",
                [points("low minus high", at, [p["loss_gap"] for p in probes.values()])],
                log=False,
                height=110,
            ),
        ]
        look = (
            "Gradient error: norm of the difference over the norm in high precision. What is not"
            " well above the noise means nothing. The loss gap should scatter around 0."
        )
        charts.append(panels("Parity by optimizer step", look, fields, last=records.last_step))
    tables = [table for table in (_removed(records.parity), blamed) if table.rows]
    return replace(about, charts=charts, tables=tables)


def advice_section(records: RunRecords) -> Section:
    """What the statistics advise."""
    about = Section(
        id="advice",
        title="What to change",
        look="Advice from this run's own numbers. Change one thing at a time.",
    )
    digest = records.statistics
    if digest is None:
        return replace(about, missing=why_no_statistics(records, "what_if=True"))
    advice = advise(
        digest, limits_of(records.settings), last_formats(records), backend_of(records.settings)
    )
    text = [] if advice else ["No operand is over a limit on average: nothing needs to change."]
    tables = [advice_table(advice)] if advice else []
    compared = what_if_table(digest)
    if compared is None:
        text.append(
            "What other scalings would have lost is not recorded: ClampMonitor(what_if=True) does."
        )
    else:
        tables.append(compared)
        text.append(delayed_would_do(digest))
    return replace(about, tables=tables, text=[sentence for sentence in text if sentence])


def _chosen(histories: Sequence[OperandHistory]) -> list[OperandHistory]:
    """Some of each ranking's worst: they come ranking by ranking, the worst first."""
    each = max(1, len(histories) // _HISTORIES)
    return list(histories[::each])[:_HISTORIES]


def _history(history: OperandHistory, limits: Mapping[Any, float], records: RunRecords) -> Chart:
    steps = torch.tensor(history.steps)
    fields: list[dict[str, Any]] = []
    for name in RANKINGS:
        unit = UNITS[name]
        factor = 100.0 if unit == "%" else 1.0
        values = torch.tensor(
            [float("nan") if v is None else v * factor for v in history.values[name]]
        )
        if values.isfinite().any() and (unit == "dB" or values.nan_to_num().max() > 0):
            limit = (limits[name] * factor, "limit")
            line = curve(NAMES[name], steps, values)
            fields.append(panel(NAMES[name], [line], unit=unit, log=False, limit=limit, height=90))
    formats = ", then ".join(dict.fromkeys(history.formats))
    title = f"{history.layer}, {history.operand}"
    return panels(title, f"In {formats}.", fields, last=records.last_step)


def _removed(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The layers whose high precision alone took most of the gradients' error away."""
    tried = [row for row in rows if row["removed_error"] is not None and row["removed_error"] > -1]
    best: dict[str, Mapping[str, Any]] = {}
    for row in sorted(tried, key=lambda row: -row["removed_error"]):
        best.setdefault(row["layer"], row)
    return Table(
        title="Error that is gone when this layer alone runs in high precision",
        columns=("layer", "format", "step", "error removed", "its own casts' error"),
        rows=[
            [
                row["layer"],
                row["format"],
                f"{row['step']:,}",
                share(row["removed_error"]),
                number(row["cast_error"], ".3g"),
            ]
            for row in list(best.values())[:_ATTRIBUTED]
        ],
        numbers=frozenset({2, 3, 4}),
        note="By ParityProbe. Healthy layers remove a small share each; one that removes most of it"
        " is the one to put into another format.",
        long=True,
    )


def _blamed(records: RunRecords) -> Table:
    """Whom the fallback's attribution named."""
    rows: list[list[str]] = []
    for event in records.events:
        for layer, value in sorted(errors_alone(event).items(), key=lambda item: -item[1]):
            all_of_it = event.numbers.get("grad_error")
            rows.append([f"{event.step:,}", layer, number(value, ".3f"), number(all_of_it, ".3f")])
    return Table(
        title="Blamed for an incident",
        columns=(
            "step",
            "layer",
            "gradient error, alone in low precision",
            "of all layers together",
        ),
        rows=rows[:_ATTRIBUTED],
        numbers=frozenset({0, 2, 3}),
        note="By PrecisionFallback, on the batch that was looked into.",
    )
