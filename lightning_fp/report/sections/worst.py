"""The operands that lost most, over the steps, each with what to think of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_fp.counting import counted
from lightning_fp.layers import linear_format
from lightning_fp.report.draw.curves import curve, panel, panels
from lightning_fp.report.draw.heatmaps import NAMES, UNITS
from lightning_fp.report.draw.marks import undone
from lightning_fp.report.draw.parts import Chart, Section
from lightning_fp.report.read.digest import RANKINGS, Cell, OperandHistory, Ranking
from lightning_fp.report.read.format_history import FormatHistory, format_histories
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.sections.advice import backend_of, limits_of
from lightning_fp.report.sections.missing import why_no_statistics
from lightning_fp.statistic_names import measured

_HISTORIES = 6
"""Operands whose history is drawn."""

_NEGLIGIBLE = 1e-3
"""Share of the limit below which a statistic is not drawn."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How one statistic of an operand stood to its limit."""

    ranking: Ranking
    limit: float

    worst: float
    """The worst value that was measured."""

    over: tuple[int, ...]
    """Steps at which it was over the limit."""

    lasts: bool
    """Whether it was in the last quarter of the measurements."""

    def worst_beside_limit(self) -> str:
        """E.g. "underflow 80% (limit 25%)"."""
        worst, limit = measured(self.ranking, self.worst), measured(self.ranking, self.limit)
        return f"{NAMES[self.ranking]} {worst} (limit {limit})"


def courses(history: OperandHistory, limits: Mapping[Ranking, float]) -> list[Course]:
    """How an operand's statistics stood to their limits, of those that were measured.

    Args:
        history: of the operand.
        limits: by ranking.
    """
    found: list[Course] = []
    for ranking in RANKINGS:
        known = [
            (step, value)
            for step, value in zip(history.steps, history.values[ranking], strict=True)
            if value is not None
        ]
        if not known:
            continue
        low_is_bad = ranking == "sqnr_db"
        limit, sign = limits[ranking], -1 if low_is_bad else 1
        over = tuple(step for step, value in known if sign * (value - limit) > 0)
        found.append(
            Course(
                ranking=ranking,
                limit=limit,
                worst=(min if low_is_bad else max)(value for _, value in known),
                over=over,
                lasts=bool(over) and over[-1] >= known[-max(1, len(known) // 4)][0],
            )
        )
    return found


def worst_section(records: RunRecords) -> Section:
    """The worst operands over the steps, and whether there is something to do."""
    about = Section(id="worst", title="Worst operands over time", look="")
    digest = records.statistics
    if digest is None:
        return replace(about, missing=why_no_statistics(records))
    limits = limits_of(records.settings)
    chosen = _chosen(digest.histories)
    if not chosen:
        return replace(about, text=("No operand has lost anything.",))
    standing = [courses(history, limits) for history in chosen]
    if not any(course.over for each in standing for course in each):
        return replace(about, text=(_all_within(digest.worst, limits),))
    formats = format_histories(records)
    charts = [
        _chart(history, each, formats, records)
        for history, each in zip(chosen, standing, strict=True)
        if any(course.over for course in each)
    ]
    lasting = sum(
        any(course.lasts for course in each) and not _left(history, formats)
        for history, each in zip(chosen, standing, strict=True)
    )
    if lasting:
        verb = "is" if lasting == 1 else "are"
        text = (
            f"{counted(lasting, 'operand')} {verb} still over a limit now and then in the last"
            " quarter of the measurements: each chart says what to do."
        )
    else:
        text = (
            "All of this has passed: at the end every operand is within its limits. Nothing to do."
        )
    stamp = "A value is the worst of the log interval that ends at its step."
    return replace(about, charts=charts, small=True, text=(f"{text} {stamp}",))


def _all_within(cells: Mapping[Ranking, Sequence[Cell]], limits: Mapping[Ranking, float]) -> str:
    """Nothing was over a limit: the worst values beside the limits."""
    worst = [
        Course(ranking=ranking, limit=limits[ranking], worst=found[0].value, over=(), lasts=False)
        for ranking, found in cells.items()
        if found
    ]
    listed = ", ".join(course.worst_beside_limit() for course in worst)
    return f"Every operand was within its limits at all times. The worst: {listed}."


def _chart(
    history: OperandHistory,
    standing: Sequence[Course],
    formats: Mapping[str, FormatHistory],
    records: RunRecords,
) -> Chart:
    steps = torch.tensor(history.steps)
    fields: list[dict[str, Any]] = []
    for course in standing:
        unit = UNITS[course.ranking]
        if unit == "%" and course.worst < _NEGLIGIBLE * course.limit:
            continue
        factor = 100.0 if unit == "%" else 1.0
        values = [float("nan") if v is None else v * factor for v in history.values[course.ranking]]
        line = {**curve(NAMES[course.ranking], steps, torch.tensor(values)), "bad": []}
        limit = (course.limit * factor, "limit")
        name = NAMES[course.ranking]
        fields.append(panel(name, [line], unit=unit, log=False, limit=limit, height=90))
    return panels(
        f"{history.layer}, {history.operand}",
        _what_to_think(history, standing, formats, records),
        fields,
        last=records.last_step,
        undone=undone(records.events),
    )


def _what_to_think(
    history: OperandHistory,
    standing: Sequence[Course],
    formats: Mapping[str, FormatHistory],
    records: RunRecords,
) -> str:
    # Imports Lightning, which nothing else in a report needs.
    from lightning_fp.telemetry.casts.remedies import remedy

    over = [course for course in standing if course.over]
    steps = sorted({step for course in over for step in course.over})
    when = f"step {steps[0]:,}" if not steps[1:] else f"steps {steps[0]:,} to {steps[-1]:,}"
    many = f"{len(steps)} of {counted(len(set(history.steps)), 'measurement')}"
    worst = ", ".join(course.worst_beside_limit() for course in over)
    what = f"Over a limit at {when}, in {many}; at worst {worst}."
    if left := _left(history, formats):
        return f"{what} {left} Nothing more to do."
    lasting = next((course for course in over if course.lasts), None)
    if lasting is None:
        return f"{what} It passed: nothing to do."
    try:
        format, backend = linear_format(history.formats[-1]), backend_of(records.settings)
        do = remedy(lasting.ranking, history.layer, history.operand, format, backend)
    except ValueError:  # a format of a later version
        return f"{what} It lasts."
    return f"{what} It lasts: {do}."


def _left(history: OperandHistory, formats: Mapping[str, FormatHistory]) -> str:
    """That the layer has left the format in which it was over a limit; or ""."""
    course = formats.get(history.layer, ())
    if not course[1:] or course[-1][1] == history.formats[0]:
        return ""
    return f"The layer left {history.formats[0]} and ended in {course[-1][1]}."


def _chosen(histories: Sequence[OperandHistory]) -> list[OperandHistory]:
    """Some of each ranking's worst: they come ranking by ranking, the worst first."""
    each = max(1, len(histories) // _HISTORIES)
    return list(histories[::each])[:_HISTORIES]
