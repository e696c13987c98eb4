"""What the formats did: what casts lost, what replays measured, and what to change."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_fp.report.draw.curves import GREY, panel, panels, points, told_apart
from lightning_fp.report.draw.heatmaps import NAMES, heatmap, worst_cells
from lightning_fp.report.draw.marks import undone, undone_in_words
from lightning_fp.report.draw.parts import Chart, Section, Table
from lightning_fp.report.draw.sentences import errors_alone, layers_named
from lightning_fp.report.read.digest import RANKINGS
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
from lightning_fp.report.sections.answer import name_of_low
from lightning_fp.report.sections.missing import why_no_probes, why_no_statistics
from lightning_fp.stability.respond.attribution import HEALTHY_ERROR
from lightning_fp.statistic_names import share

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
            "undone": undone(records.events),
            "table": worst_cells(digest.worst[ranking], ranking),
        }
        for ranking in RANKINGS
        if digest.worst[ranking]
    ]
    nothing = [f"No {NAMES[name]} anywhere." for name in RANKINGS if not digest.worst[name]]
    hatched = undone_in_words(records.events)
    return replace(about, charts=charts, text=[*nothing, *([hatched] if hatched else [])])


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
        look="The same batch on the same weights, in the formats of the run and in high precision.",
    )
    low = name_of_low(records)
    probes = {row["step"]: row for row in records.parity}
    blamed = _blamed(records)
    if not probes and not blamed.rows:
        return replace(about, missing=why_no_probes(records))
    charts: list[Chart] = []
    if probes:
        at = list(probes)
        error, noise = (
            [None if probe[name] is None else 100 * probe[name] for probe in probes.values()]
            for name in ("grad_error", "noise")
        )
        fields = [
            panel(
                "gradient error",
                [points(f"of {low}", at, error), points("noise", at, noise, color=GREY)],
                unit="%",
                log=False,
                height=130,
            ),
            panel(
                "loss gap",
                [points("loss gap", at, [p["loss_gap"] for p in probes.values()])],
                log=False,
                height=110,
            ),
        ]
        look = (
            "Gradient error: norm of the difference over the norm in high precision. Noise: the"
            " same of two runs alike; an error not well above it means nothing. Loss gap: the"
            f" loss in {low} minus that in high precision; it should scatter around 0."
        )
        charts.append(panels("Parity by optimizer step", look, fields, last=records.last_step))
    tables = [table for table in (_removed(records.parity), blamed) if table.rows]
    return replace(about, charts=charts, tables=tables, text=_usual_error(probes))


def _usual_error(probes: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
    """What the gradients' error was, in a sentence; none without probes."""
    errors = {step: row["grad_error"] for step, row in probes.items() if row["grad_error"]}
    if not errors:
        return ()
    usual, worst = statistics.median(errors.values()), max(errors, key=lambda step: errors[step])
    return (
        f"The gradients' error was usually {share(usual)}, and at most {share(errors[worst])}, at"
        f" step {worst:,}; up to {share(HEALTHY_ERROR)} is healthy.",
    )


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
    settled = [each for each in advice if not each.badness]
    advice = [each for each in advice if each.badness]
    text = [] if advice else ["No operand is over a limit on average: nothing needs to change."]
    if settled:
        layers = layers_named(list(dict.fromkeys(each.of.layer for each in settled)))
        text = [f"{layers} lost too much in a format that the run has moved them out of."]
        text += [] if advice else ["Nothing else is over a limit on average."]
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


def _removed(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The layers whose high precision alone took most of the gradients' error away."""
    tried = [row for row in rows if row["removed_error"] is not None and row["removed_error"] > -1]
    best: dict[str, Mapping[str, Any]] = {}
    for row in sorted(tried, key=lambda row: -row["removed_error"]):
        best.setdefault(row["layer"], row)
    return Table(
        title="Error that is gone when this layer alone runs in high precision",
        columns=("layer", "format", "step", "error", "of it removed", "error of its casts"),
        rows=[
            [
                row["layer"],
                row["format"],
                f"{row['step']:,}",
                share(row["grad_error"]),
                share(row["removed_error"]),
                share(row["cast_error"]),
            ]
            for row in list(best.values())[:_ATTRIBUTED]
        ],
        numbers=frozenset({2, 3, 4, 5}),
        note="By ParityProbe, which tries a few layers at a time; below 0 the error grows. A layer"
        f" that removes most of a large error, above {share(HEALTHY_ERROR)}, is the one to put into"
        " another format.",
        long=True,
    )


def _blamed(records: RunRecords) -> Table:
    """Whom the fallback's attribution named."""
    rows: list[list[str]] = []
    for event in records.events:
        for layer, value in sorted(errors_alone(event).items(), key=lambda item: -item[1]):
            all_of_it = event.numbers.get("grad_error")
            rows.append([f"{event.step:,}", layer, share(value), share(all_of_it)])
    return Table(
        title="Blamed for an incident",
        columns=(
            "step",
            "layer",
            "gradient error with only this layer in low precision",
            "with all layers",
        ),
        rows=rows[:_ATTRIBUTED],
        numbers=frozenset({0, 2, 3}),
        note="By PrecisionFallback, on the batch that was looked into.",
    )
