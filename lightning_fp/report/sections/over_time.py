"""How the run went: its losses and events, the formats over time, the stages of a rollout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_fp.counting import counted
from lightning_fp.format_names import LADDER
from lightning_fp.records import StageChange
from lightning_fp.records.events import GateResult
from lightning_fp.report.draw.curves import INK, curve, panel, panels
from lightning_fp.report.draw.decisions import events_table
from lightning_fp.report.draw.marks import lanes, undone, undone_in_words
from lightning_fp.report.draw.parts import (
    Chart,
    Section,
    Table,
    not_recorded,
)
from lightning_fp.report.draw.sentences import listed
from lightning_fp.report.read.format_history import (
    FormatHistory,
    LayerGroup,
    format_histories,
    is_low,
    layer_groups,
)
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.read.steps import Steps
from lightning_fp.report.sections.answer import baseline_name, name_of_low
from lightning_fp.report.sections.missing import why_no_events, why_no_loss, why_no_stages
from lightning_fp.report.sections.story import story
from lightning_fp.statistic_names import called, measured

_GATES = 60


def loss_section(records: RunRecords) -> Section:
    """Loss and gradient norm, with every event."""
    steps, events = records.steps, records.events
    marks = lanes(events, records.last_step, name_of_low(records))
    look = "The loss should fall."
    look += " The marks beneath it say what was noticed and done, and when." * bool(marks)
    about = Section(id="loss", title="Loss and gradient norm", look=look)
    if steps is None and not marks:
        return replace(about, missing=why_no_loss(records))
    fields: list[dict[str, Any]] = []
    notes: list[str] = []
    if steps is not None:
        fields += loss_fields(steps, records.baseline)
        if steps.grad_norms.isfinite().any():
            line = curve("this run", steps.steps, steps.grad_norms, smooth=True)
            fields.append(panel("gradient norm", [line], height=130))
        else:
            notes.append(
                "The gradient norm is not recorded: add LossRecorder() or PrecisionFallback()."
            )
        bad = int((~steps.losses.isfinite()).sum())
        if bad:
            notes.append(f"{counted(bad, 'step')} had a loss of inf or NaN, marked at the top.")
    else:
        notes.append(f"The loss: {why_no_loss(records)}")
    chart = panels(
        f"{_listed(fields, marks)} by optimizer step",
        _how_to_read(records),
        fields,
        last=records.last_step,
        lanes=marks,
        undone=undone(events),
    )
    return replace(about, charts=(chart,), text=notes)


def loss_fields(steps: Steps, baseline: RunRecords | None) -> list[dict[str, Any]]:
    """The loss; with a baseline its loss too, in dots on top, and the difference beneath.

    Args:
        steps: the run's.
        baseline: what it is compared with.
    """
    lines = [curve("this run", steps.steps, steps.losses, smooth=True, last=steps.final_loss())]
    against = None if baseline is None else baseline.steps
    if baseline is None or against is None:
        return [panel("loss", lines, height=220)]
    same = against.up_to(max(steps.last, 1))
    last = same.final_loss() if len(same) else None
    name = f"{baseline_name(baseline)} (dots)"
    lines.append(
        curve(name, same.steps, same.losses, color=INK, smooth=True, last=last, dotted=True)
    )
    fields = [panel("loss", lines, height=220)]
    if apart := difference("this run", steps, same):
        fields.append(panel("loss minus the baseline's", [apart], log=False, height=80))
    return fields


def difference(name: str, steps: Steps, other: Steps, color: int = 0) -> dict[str, Any] | None:
    """How much higher a run's loss is than another's at the same steps; None if there are none.

    Args:
        name: of the line.
        steps: the run's.
        other: those of the run it is compared with.
        color: of the line.
    """
    both = torch.isin(steps.steps, other.steps)
    apart = steps.losses[both] - other.losses[torch.isin(other.steps, steps.steps)]
    if not apart.isfinite().any():
        return None
    return curve(name, steps.steps[both], apart, color=color, smooth=True)


def _listed(fields: Sequence[dict[str, Any]], marks: Sequence[object]) -> str:
    """What a chart shows, for its title."""
    titles = [str(field["title"]) for field in fields]
    names = [title for title in titles if " minus " not in title] + ["events"] * bool(marks)
    text = listed(names)
    return f"{text[0].upper()}{text[1:]}"


def _how_to_read(records: RunRecords) -> str:
    """What is drawn."""
    parts = ["Faint: every step. Strong: running mean."]
    if records.steps is not None and len(records.steps):
        over = counted(records.steps.final_steps(), "step")
        parts.append(f"At the right: the final loss, the mean of the last {over}.")
    parts.append(undone_in_words(records.events))
    return " ".join(part for part in parts if part)


def events_section(records: RunRecords) -> Section:
    """What happened, as a table."""
    about = Section(id="events", title="What happened", look="")
    if not records.events:
        return replace(about, missing=why_no_events(records))
    table = events_table(records.events, name_of_low(records))
    return replace(about, tables=(table,), text=story(records))


def formats_section(records: RunRecords) -> Section:
    """The format of every layer over time."""
    about = Section(
        id="formats",
        title="Formats over time",
        look="One row for each group of layers that changed alike; grey is high precision.",
    )
    histories = format_histories(records)
    if not histories:
        return replace(about, missing=not_recorded("add ClampMonitor() to the Trainer's callbacks"))
    last = max(records.last_step, 1)
    groups = layer_groups(histories)
    used = list(dict.fromkeys(format for group in groups for _, format in group.history))
    rows = [
        {
            "label": group.label if groups[1:] else f"all {counted(len(group.layers), 'layer')}",
            "title": counted(len(group.layers), "layer") if group.layers[1:] else group.label,
            "segments": _segments(group.history, last),
        }
        for group in groups
    ]
    chart: Chart = {
        "type": "strips",
        "title": "Format by layer and optimizer step",
        "look": " ".join(filter(None, (_format_look(groups), undone_in_words(records.events)))),
        "last": last,
        "undone": undone(records.events),
        "rows": rows,
        "names": [
            {"name": name, "high": not is_low(name), "number": number}
            for name, number in _numbered(used).items()
        ],
    }
    ends = [(history[0][1], history[-1][1], len(history) - 1) for history in histories.values()]
    counts = {key: ends.count(key) for key in dict.fromkeys(ends)}
    table = Table(
        title="Layers by format",
        columns=("at first", "at the end", "changes", "layers"),
        rows=[[a, b, f"{n}", f"{many:,}"] for (a, b, n), many in counts.items()],
        numbers=frozenset({2, 3}),
    )
    left = [
        [info.name, info.format, info.reason] for info in records.layers if info.reason is not None
    ]
    alone = Table(
        title="Left in high precision",
        columns=("layer", "format", "why"),
        rows=left[:50],
        note=f"{len(left) - 50} more." if len(left) > 50 else "",
        folded=True,
    )
    inferred = () if records.layers else ("Inferred from the statistics, interval by interval.",)
    tables = (table, alone) if left else (table,)
    return replace(about, charts=(chart,), tables=tables, text=inferred)


def _format_look(groups: Sequence[LayerGroup]) -> str:
    if all(len(group.history) == 1 for group in groups):
        return "No layer changed its format."
    return "A change of colour is a change of format; what happened, above, says why."


def _numbered(formats: Sequence[str]) -> dict[str, int]:
    """The colour of each format: the same in every report, as far as the ladder goes."""
    others = [format for format in formats if format not in LADDER and is_low(format)]
    order = [*LADDER, *others]
    return {format: order.index(format) if format in order else 0 for format in formats}


def stages_section(records: RunRecords) -> Section:
    """The stages of a rollout, and its gates."""
    about = Section(
        id="stages",
        title="Rollout stages and gates",
        look="Each stage puts more layers into low precision; a gate that fails holds it back.",
    )
    stages = [event for event in records.events if isinstance(event, StageChange)]
    gates = [event for event in records.events if isinstance(event, GateResult)]
    if not stages and not gates:
        return replace(about, missing=why_no_stages(records))
    last = max(records.last_step, 1)
    history = [(event.step, event.stage) for event in stages]
    if stages and stages[0].previous and stages[0].step > 0:
        history.insert(0, (0, stages[0].previous))
    names = list(dict.fromkeys(name for _, name in history))
    formats = format_histories(records).values()
    high = {name for step, name in history if not any(is_low(_at(step, f)) for f in formats)}
    chart: Chart = {
        "type": "strips",
        "title": "Stage by optimizer step",
        "look": "How long each stage lasted, and beneath it the gates.",
        "last": last,
        "rows": [{"label": "stage", "title": "stage", "segments": _segments(history, last)}],
        "names": [{"name": name, "high": name in high} for name in names],
        "lanes": lanes(gates, last),
    }
    rows = [
        [
            f"{gate.step:,}",
            gate.stage,
            called(gate.statistic),
            measured(gate.statistic, gate.numbers.get("value", math.nan)),
            " and ".join(
                f"{bound} {measured(gate.statistic, gate.numbers[bound])}"
                for bound in ("above", "below")
                if bound in gate.numbers
            ),
            "passed" if gate.passed else "failed",
        ]
        for gate in gates
    ]
    table = Table(
        title="Gates",
        columns=("step", "stage", "statistic", "value", "must be", "result"),
        folded=True,
        rows=rows[-_GATES:],
        numbers=frozenset({0, 3}),
        note=f"The last {_GATES} of {len(rows)}." if len(rows) > _GATES else "",
    )
    return replace(about, charts=(chart,) if history else (), tables=(table,) if rows else ())


def _at(step: int, history: FormatHistory) -> str:
    """A layer's format from a step on."""
    before = [format for since, format in history if since <= step]
    return before[-1] if before else history[0][1]


def _segments(history: Sequence[tuple[int, str]], last: int) -> list[dict[str, Any]]:
    ends = [step for step, _ in history[1:]] + [max(last, history[-1][0])]
    return [
        {"from": step, "to": end, "name": name}
        for (step, name), end in zip(history, ends, strict=True)
    ]
