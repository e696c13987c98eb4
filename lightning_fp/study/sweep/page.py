"""sweep.html: one offline page of what a sweep has found."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_fp.recipes.format_evidence import what_evidence_cannot_say
from lightning_fp.report.draw.curves import panel, panels, points, told_apart
from lightning_fp.report.draw.parts import Section, Table, number
from lightning_fp.report.page import render_sections
from lightning_fp.study.sweep.findings import Findings, FormatFindings
from lightning_fp.study.sweep.verdict import curve_stretch
from lightning_fp.study.sweep.words import (
    SUMMARY,
    format_cells,
    headline,
    interval,
    rate_text,
    ratio_interval,
)
from lightning_fp.study.total_cost import TotalCost

FILE = "sweep.html"


def write_page(directory: Path, findings: Findings, costs: Sequence[TotalCost] = ()) -> Path:
    """Write the page.

    Args:
        directory: of the sweep.
        findings: what it has found.
        costs: what each format comes to.

    Returns:
        The file.
    """
    sections = [_rates(findings), _ranges(findings), _costs(findings, costs), _losses(findings)]
    if findings.errors:
        sections.append(_errors(findings.errors))
    path = directory / FILE
    text = render_sections(
        kind="sweep of formats",
        title=", ".join(dict.fromkeys(each.format for each in findings.formats)) or "no cells",
        headline=headline(findings),
        sections=sections,
        source=str(directory),
    )
    passing = path.with_name(f".{FILE}.{uuid.uuid4().hex[:8]}")
    try:
        passing.write_text(text, encoding="utf-8")
        os.replace(passing, path)  # whole, or not at all
    finally:
        passing.unlink(missing_ok=True)
    return path


def _rates(findings: Findings) -> Section:
    lrs = sorted({rate.lr for each in findings.formats for rate in each.rates})
    rows: list[list[str]] = []
    for each in findings.formats:
        by_lr = {rate.lr: rate for rate in each.rates}
        rows.append([each.name, *(rate_text(by_lr[lr]) if lr in by_lr else "" for lr in lrs)])
    rates: dict[str, Any] = {
        "type": "rates",
        "title": "Share of runs that failed, by learning rate",
        "look": (
            "Bars are 95% intervals (Wilson). Where a format's points rise before BF16's do, it"
            " costs you learning rates; bars that overlap say that more seeds are needed."
        ),
        "categories": [f"{lr:g}" for lr in lrs],
        "series": [
            {"name": each.name, "color": told_apart(i), "points": _points(each, lrs)}
            for i, each in enumerate(findings.formats)
        ],
    }
    return Section(
        id="failures",
        title="How often runs fail",
        look=(
            "A run has failed if it diverged, or if a tenth or more is missing of the way in loss"
            " that the reference has come at its best learning rate."
        ),
        charts=(rates,),
        tables=(
            Table(
                title="Failed runs of all, with 95% intervals",
                columns=("format", *(f"lr {lr:g}" for lr in lrs)),
                rows=rows,
                numbers=frozenset(range(1, len(lrs) + 1)),
            ),
        ),
        missing="" if rows else "No cell has run yet.",
    )


def _points(each: FormatFindings, lrs: Sequence[float]) -> list[dict[str, float] | None]:
    by_lr = {rate.lr: rate for rate in each.rates}
    return [
        {"value": by_lr[lr].rate, "low": by_lr[lr].low, "high": by_lr[lr].high}
        if lr in by_lr
        else None
        for lr in lrs
    ]


def _ranges(findings: Findings) -> Section:
    rows = [
        [
            each.name,
            *format_cells(each).values(),
            interval(each.narrower, each.narrower_low, each.narrower_high),
        ]
        for each in findings.formats
    ]
    return Section(
        id="ranges",
        title="What each format costs",
        look=(
            "Stable decades: how much of the learning rate's range a format trains over, in powers"
            " of ten, each rate weighted by the share of runs that do not fail. Gap: of the final"
            " loss, each at its own best rate."
        ),
        tables=(
            Table(
                title="By format",
                columns=("format", *SUMMARY, "decades lost"),
                rows=rows,
                numbers=frozenset(range(1, len(SUMMARY) + 2)),
                note=(
                    "95% intervals are of the posterior under Jeffreys' prior. Spikes are per 1,000"
                    " steps, times are of the processor. Learning rates were tried at the points"
                    " shown only; between them rates are taken to be linear."
                ),
            ),
            _every_rate(findings),
        ),
    )


def _every_rate(findings: Findings) -> Table:
    rows = [
        [
            each.name,
            f"{rate.lr:g}",
            f"{rate.failed}/{rate.runs}",
            f"{rate.diverged}",
            number(rate.final_loss),
            "" if rate.gap is None else f"{rate.gap:+.2%}",
            f"{rate.spikes:.2g}",
        ]
        for each in findings.formats
        for rate in each.rates
    ]
    return Table(
        title="By format and learning rate",
        columns=("format", "lr", "failed", "diverged", "final loss", "gap at this lr", "spikes"),
        rows=rows,
        numbers=frozenset(range(1, 7)),
        folded=True,
    )


def _costs(findings: Findings, costs: Sequence[TotalCost]) -> Section:
    rows = [
        [
            f"{each.format} ({each.setting})" if each.setting else each.format,
            "none" if math.isinf(each.break_even) else f"{each.break_even:.2f}x",
            ratio_interval(each),
            "never" if math.isinf(each.attempts) else f"{each.attempts:.2f}",
            f"{each.kept:.0%}",
            f"{each.besides:.0%}",
            f"{each.undone:.0%}",
        ]
        for each in costs
    ]
    columns = ("format", "break-even", "95%", "runs until one is done", "steps in the format")
    return Section(
        id="cost",
        title="From which speed-up on it pays",
        look=(
            "Runs that fail are tried again, from another seed or at a lower learning rate; steps"
            " that a fallback runs again, or in high precision, are counted. Below the break-even"
            " the format costs more than it saves."
        ),
        text=(
            *(each.sentence() for each in costs),
            *what_evidence_cannot_say(each.format for each in findings.formats),
        ),
        tables=(
            Table(
                title="By format",
                columns=(*columns, "replayed", "rolled back or left out"),
                rows=rows,
                numbers=frozenset(range(1, 7)),
            ),
        ),
        missing="" if costs else "There is no high precision that trains, to compare with.",
    )


def _losses(findings: Findings) -> Section:
    stretch = curve_stretch(findings.steps)
    curves: list[Mapping[str, Any]] = []
    for color, each in enumerate(findings.formats):
        if each.best is None or not each.curve:
            continue
        at = [min(findings.steps, (i + 1) * stretch) for i in range(len(each.curve))]
        known = [None if loss is None or not math.isfinite(loss) else loss for loss in each.curve]
        curves.append(points(f"{each.name}, lr {each.best.lr:g}", at, known, told_apart(color)))
    chart = panels(
        "Loss by step, median over seeds",
        "Where a line leaves the reference's and stays away, the loss is higher at every rate.",
        [panel("loss", curves, height=240)],
        last=findings.steps,
    )
    return Section(
        id="losses",
        title="Each format at its best learning rate",
        look="The lowest final loss of the rates at which at most half of the runs fail.",
        charts=(chart,) if curves else (),
        missing="" if curves else "No format trains at any of these learning rates.",
    )


def _errors(errors: Mapping[str, str]) -> Section:
    return Section(
        id="errors",
        title="Cells that could not run",
        look="They count nowhere; the same command tries them again.",
        tables=(
            Table(
                title="", columns=("cell", "error"), rows=[list(each) for each in errors.items()]
            ),
        ),
    )
