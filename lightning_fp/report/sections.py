"""The sections of one run: what is asked, what was recorded, and what to do where nothing was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_fp.records import StageChange
from lightning_fp.records.events import GateResult
from lightning_fp.report.advice import (
    advice_table,
    advise,
    delayed_would_do,
    limits_of,
    what_if_table,
)
from lightning_fp.report.cost import RunCost
from lightning_fp.report.curves import curve, panel, panels, points
from lightning_fp.report.digest import RANKINGS, Course
from lightning_fp.report.format_courses import format_courses, last_formats, layer_groups
from lightning_fp.report.headline import is_low
from lightning_fp.report.heatmaps import heatmap, worst_cells
from lightning_fp.report.marks import events_table, lanes
from lightning_fp.report.page_parts import (
    Chart,
    Section,
    Table,
    duration,
    not_recorded,
    number,
    share,
    size,
)
from lightning_fp.report.run_records import RunRecords

_COURSES = 6
"""Operands whose course is drawn."""

_ATTRIBUTED = 10
_GATES = 60


def sections(records: RunRecords, cost: RunCost) -> list[Section]:
    """All sections of a run's report; one without records says how to get them."""
    return [
        loss_section(records),
        events_section(records),
        formats_section(records),
        stages_section(records),
        casts_section(records),
        worst_section(records),
        parity_section(records),
        advice_section(records),
        evaluation_section(records),
        mismatch_section(records),
        cost_section(records, cost),
        settings_section(records),
    ]


def loss_section(records: RunRecords) -> Section:
    """Loss and gradient norm, with every event."""
    steps, events = records.steps, records.events
    look = "The loss should fall; a jump with a mark beneath it is explained by that event."
    marks = lanes(events, records.last_step)
    about = Section(id="loss", title="Loss and gradient norm", look=look)
    if steps is None and not marks:
        return _with(about, missing=not_recorded("add ClampMonitor() to the Trainer's callbacks"))
    fields: list[dict[str, Any]] = []
    notes: list[str] = []
    if steps is not None:
        fields.append(
            panel("loss", [curve("loss", steps.steps, steps.losses, smooth=True)], height=220)
        )
        if steps.grad_norms.isfinite().any():
            line = curve("gradient norm", steps.steps, steps.grad_norms, color=1, smooth=True)
            fields.append(panel("gradient norm", [line], height=130))
        else:
            notes.append(
                "The gradient norm is not recorded: call monitor.note_grad_norm(norm) where it is"
                " computed, or add PrecisionFallback()."
            )
        bad = int((~steps.losses.isfinite()).sum())
        if bad:
            notes.append(f"{bad:,} steps had a loss of inf or NaN; they are marked at the top.")
    else:
        notes.append("The loss is not recorded: add ClampMonitor() to the Trainer's callbacks.")
    chart = panels(
        "Loss, gradient norm and events by optimizer step",
        "Faint: every step. Strong: running mean. Beneath: what happened, one lane for each kind.",
        fields,
        last=records.last_step,
        lanes=marks,
    )
    return _with(about, charts=(chart,), text=notes)


def events_section(records: RunRecords) -> Section:
    """What happened, as a table."""
    about = Section(
        id="events",
        title="What happened",
        look="Every decision about precision, with its reason, in the order of the steps.",
    )
    if not records.events:
        return _with(
            about, missing=not_recorded("add PrecisionFallback() to the Trainer's callbacks")
        )
    table = events_table(records.events)
    return _with(about, tables=(table,), text=() if table.rows else ("Nothing has happened.",))


def formats_section(records: RunRecords) -> Section:
    """The format of every layer over time."""
    about = Section(
        id="formats",
        title="Formats over time",
        look="One row for each group of layers that changed alike; grey is high precision.",
    )
    courses = format_courses(records)
    if not courses:
        return _with(about, missing=not_recorded("add ClampMonitor() to the Trainer's callbacks"))
    last = max(records.last_step, 1)
    groups = layer_groups(courses)
    used = list(dict.fromkeys(format for group in groups for _, format in group.course))
    rows = [
        {
            "label": group.label,
            "title": f"{len(group.layers)} layers" if len(group.layers) > 1 else group.label,
            "segments": _segments(group.course, last),
        }
        for group in groups
    ]
    chart: Chart = {
        "type": "strips",
        "title": "Format by layer and optimizer step",
        "look": "A change of colour is a change of format; the table above says why it was made.",
        "last": last,
        "rows": rows,
        "names": [{"name": name, "high": not is_low(name)} for name in used],
    }
    ends = [(course[0][1], course[-1][1], len(course) - 1) for course in courses.values()]
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
    return _with(about, charts=(chart,), tables=tables, text=inferred)


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
        return _with(about, missing=not_recorded("train with StagedRollout(recipe)"))
    last = max(records.last_step, 1)
    course = [(event.step, event.stage) for event in stages]
    if stages and stages[0].previous and stages[0].step > 0:
        course.insert(0, (0, stages[0].previous))
    names = list(dict.fromkeys(name for _, name in course))
    chart: Chart = {
        "type": "strips",
        "title": "Stage by optimizer step",
        "look": "How long each stage lasted; the marks beneath are the gates that were asked.",
        "last": last,
        "rows": [{"label": "stage", "title": "stage", "segments": _segments(course, last)}],
        "names": [{"name": name, "high": False} for name in names],
        "lanes": lanes(gates, last),
    }
    rows = [
        [
            f"{gate.step:,}",
            gate.stage,
            gate.statistic,
            number(gate.numbers.get("value")),
            " and ".join(
                f"{bound} {number(gate.numbers[bound])}"
                for bound in ("above", "below")
                if bound in gate.numbers
            ),
            "passed" if gate.passed else "held",
            gate.reason,
        ]
        for gate in gates
    ]
    table = Table(
        title="Gates",
        columns=("step", "stage", "statistic", "value", "must be", "result", "why"),
        rows=rows[-_GATES:],
        numbers=frozenset({0, 3}),
        note=f"The last {_GATES} of {len(rows)}." if len(rows) > _GATES else "",
    )
    return _with(about, charts=(chart,) if course else (), tables=(table,) if rows else ())


def casts_section(records: RunRecords) -> Section:
    """What the casts lost: heatmaps, and the exact worst cells."""
    about = Section(
        id="casts",
        title="What the casts lost",
        look="Layers from top to bottom, steps from left to right; blue is fine, orange is not.",
    )
    digest = records.statistics
    if digest is None:
        return _with(about, missing=not_recorded("add ClampMonitor() to the Trainer's callbacks"))
    limits = limits_of(records.settings)
    charts = [
        {
            **heatmap(digest, ranking, limits[ranking]),
            "table": worst_cells(digest.worst[ranking], ranking),
        }
        for ranking in RANKINGS
    ]
    cut = f"{digest.rows:,} rows, {len(digest.layers):,} layers, {digest.intervals:,} intervals."
    return _with(about, charts=charts, text=(cut,))


def worst_section(records: RunRecords) -> Section:
    """The worst operands over the steps."""
    about = Section(
        id="worst",
        title="Worst operands over time",
        look="Whether the worst is getting worse, is over, or was one moment.",
    )
    digest = records.statistics
    if digest is None:
        return _with(about, missing=not_recorded("add ClampMonitor() to the Trainer's callbacks"))
    limits = limits_of(records.settings)
    charts = [_course(course, limits, records) for course in _chosen(digest.courses)]
    return _with(
        about, charts=charts, small=True, text=() if charts else ("No operand has lost anything.",)
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
        return _with(about, missing=not_recorded("add ParityProbe() to the Trainer's callbacks"))
    charts: list[Chart] = []
    if probes:
        at = list(probes)
        fields = [
            panel(
                "gradient error",
                [
                    points("of the formats", at, [p["grad_error"] for p in probes.values()]),
                    points("noise", at, [p["noise"] for p in probes.values()], color=2),
                ],
                log=False,
                height=130,
            ),
            panel(
                "loss gap",
                [points("low minus high", at, [p["loss_gap"] for p in probes.values()], color=1)],
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
    return _with(about, charts=charts, tables=tables)


def advice_section(records: RunRecords) -> Section:
    """What the statistics advise."""
    about = Section(
        id="advice",
        title="What to change",
        look="Advice from this run's own numbers. Change one thing at a time.",
    )
    digest = records.statistics
    if digest is None:
        remedy = "add ClampMonitor(what_if=True) to the Trainer's callbacks"
        return _with(about, missing=not_recorded(remedy))
    advice = advise(digest, limits_of(records.settings), last_formats(records))
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
    return _with(about, tables=tables, text=[sentence for sentence in text if sentence])


def evaluation_section(records: RunRecords) -> Section:
    """What serving in another precision would cost."""
    about = Section(
        id="evaluation",
        title="Evaluation gap",
        look=(
            "The same validation batches in the training formats and in high precision. A gap away"
            " from 0 means that the model has fitted itself to its formats."
        ),
    )
    columns = records.evaluation
    if not {"loss", "loss_high"} <= columns.keys():
        return _with(about, missing=not_recorded("add EvaluationGap() to the Trainer's callbacks"))
    at = columns["step"].tolist()
    loss, high = columns["loss"], columns["loss_high"]
    gap = columns.get("gap", (loss - high) / high.abs())
    fields = [
        panel(
            "validation loss",
            [
                points("training formats", at, loss.tolist()),
                points("high precision", at, high.tolist(), color=2),
            ],
            height=140,
        ),
        panel(
            "gap",
            [points("gap", at, (gap * 100).tolist(), color=1)],
            unit="%",
            log=False,
            height=100,
        ),
    ]
    look = "Where the two lines part, one of the two ways to serve the model is worse."
    chart = panels("Validation loss in two precisions", look, fields, last=records.last_step)
    return _with(about, charts=(chart,))


def mismatch_section(records: RunRecords) -> Section:
    """How far rollout and training are apart in reinforcement learning."""
    about = Section(
        id="mismatch",
        title="Training-inference mismatch",
        look=(
            "In reinforcement learning: how far the probabilities of the rollout are from those of"
            " training. Growth comes before collapse."
        ),
    )
    columns = {name: v for name, v in records.mismatch.items() if name != "step"}
    drawn = {name: values for name, values in columns.items() if values.isfinite().any()}
    if not drawn:
        remedy = "add MismatchMonitor() to the Trainer's callbacks, in reinforcement learning"
        return _with(about, missing=not_recorded(remedy))
    steps = records.mismatch["step"].long()
    usual = ("k3_kl", "abs_r", "k1_kl")
    first = [n for n in drawn if n in usual or n.removeprefix("mismatch/") in usual]
    names = [*first, *(name for name in drawn if name not in first)][:6]
    fields = [
        panel(name, [curve(name, steps, drawn[name], color=i % 5)], height=110)
        for i, name in enumerate(names)
    ]
    look = "Each metric by itself; the page on training-inference mismatch says what is usual."
    chart = panels("Mismatch by optimizer step", look, fields, last=records.last_step)
    ends = [
        [name, number(values[-1].item()), number(values.max().item())]
        for name, values in drawn.items()
    ]
    table = Table(
        title="All metrics",
        columns=("metric", "last", "largest"),
        rows=ends,
        numbers=frozenset({1, 2}),
        folded=True,
    )
    return _with(about, charts=(chart,), tables=(table,))


def cost_section(records: RunRecords, cost: RunCost) -> Section:
    """What the run cost."""
    known = records.steps is not None and cost.seconds is not None
    facts: list[tuple[str, str]] = [
        ("steps attempted", f"{cost.attempted:,}"),
        (
            "useful",
            f"{cost.useful:,}" + (f" ({share(cost.useful_share)})" if cost.attempted else ""),
        ),
        ("skipped", f"{cost.skipped:,}"),
        ("rolled back", f"{cost.rolled_back:,}, of these {cost.made_good:,} made good"),
        ("with layers in a safer format", f"{cost.in_fallback:,}"),
        ("repeated after a resume", f"{cost.repeated:,}"),
        (
            "replays",
            f"{cost.replays:,}"
            + ("" if cost.replayed_steps is None else f", {cost.replayed_steps:,} training steps"),
        ),
        ("time in all", duration(cost.seconds)),
        ("time per step, median", duration(cost.step_seconds)),
        ("sampled steps took more", _part(cost.telemetry_seconds, cost.seconds)),
        ("parity probes took", _part(cost.probe_seconds, cost.seconds)),
        ("incidents took", _part(cost.incident_seconds, cost.seconds)),
        ("baseline's time per step, median", duration(cost.baseline_step_seconds)),
        ("speed-up per step", _times(cost.raw_speedup)),
        ("speed-up after all losses", _times(cost.effective_speedup)),
        *((f"memory: {what}", size(value)) for what, value in cost.memory.items()),
    ]
    text = [cost.sentence()]
    if not known:
        text.append("Times are not recorded: add ClampMonitor() to the Trainer's callbacks.")
    if records.finished is None and cost.attempted:
        text.append("The run has not said what became of its steps: this is made from its events.")
    return Section(
        id="cost",
        title="What the run cost",
        look=(
            "Speed-up after all losses is what counts: the time the baseline takes for as many"
            " useful steps, over all the time of this run."
        ),
        facts=facts,
        text=text,
    )


def settings_section(records: RunRecords) -> Section:
    """How the run was set up."""
    about = Section(id="settings", title="How it was run", look="Everything to run it again.")
    if not records.starts:
        return _with(about, missing=not_recorded("add ClampMonitor() to the Trainer's callbacks"))
    info = records.starts[-1]
    resumed = ", ".join(f"{start.step:,}" for start in records.starts[1:])
    facts = [
        ("directory", str(records.path)),
        ("device", info.device or "unknown"),
        ("processes", f"{info.world_size} ({info.strategy})"),
        ("parameters", f"{info.parameters:,}"),
        *(("resumed at step", resumed) for _ in [0] if resumed),
        *((name, version) for name, version in info.versions.items()),
    ]
    tables = [
        Table(
            title=name,
            columns=("option", "value"),
            rows=[[key, _plain(value)] for key, value in options.items()],
            folded=True,
        )
        for name, options in info.settings.items()
    ]
    return _with(about, facts=facts, tables=[table for table in tables if table.rows])


# -- parts ----------------------------------------------------------------------------------------


def _with(section: Section, **changes: Any) -> Section:
    from dataclasses import replace

    return replace(section, **changes)


def _segments(course: Sequence[tuple[int, str]], last: int) -> list[dict[str, Any]]:
    ends = [step for step, _ in course[1:]] + [max(last, course[-1][0])]
    return [
        {"from": step, "to": end, "name": name}
        for (step, name), end in zip(course, ends, strict=True)
    ]


def _chosen(courses: Sequence[Course]) -> list[Course]:
    """Some of each ranking's worst: they come ranking by ranking, the worst first."""
    each = max(1, len(courses) // _COURSES)
    return list(courses[::each])[:_COURSES]


def _course(course: Course, limits: Mapping[Any, float], records: RunRecords) -> Chart:
    steps = torch.tensor(course.steps)
    fields: list[dict[str, Any]] = []
    for color, (name, title, unit) in enumerate(
        (
            ("clamped_mass", "clamped mass", "%"),
            ("underflow_fraction", "underflow", "%"),
            ("sqnr_db", "SQNR", "dB"),
        )
    ):
        factor = 100.0 if unit == "%" else 1.0
        values = torch.tensor(
            [float("nan") if v is None else v * factor for v in course.values[name]]
        )
        if values.isfinite().any() and (unit == "dB" or values.nan_to_num().max() > 0):
            limit = (limits[name] * factor, "limit")
            line = curve(title, steps, values, color=color)
            fields.append(panel(title, [line], unit=unit, log=False, limit=limit, height=90))
    formats = ", then ".join(dict.fromkeys(course.formats))
    title = f"{course.layer}, {course.operand}"
    return panels(title, f"In {formats}.", fields, last=records.last_step)


def _removed(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The layers whose high precision alone took most of the gradients' error away."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        value = row["removed_error"]
        if (
            value is not None
            and value > best.get(row["layer"], {"removed_error": -1})["removed_error"]
        ):
            best[row["layer"]] = row
    worst = sorted(best.values(), key=lambda row: -row["removed_error"])[:_ATTRIBUTED]
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
            for row in worst
        ],
        numbers=frozenset({2, 3, 4}),
        note="By ParityProbe. Healthy layers remove a small share each; one that removes most of it"
        " is the one to put into another format.",
    )


def _blamed(records: RunRecords) -> Table:
    """Whom the fallback's attribution named."""
    rows: list[list[str]] = []
    for event in records.events:
        alone = {
            name.removeprefix("alone/"): value
            for name, value in event.numbers.items()
            if name.startswith("alone/")
        }
        for layer, value in sorted(alone.items(), key=lambda item: -item[1]):
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


def _part(seconds: float | None, all: float | None) -> str:
    if seconds is None:
        return "unknown"
    return duration(seconds) + (f" ({share(seconds / all)})" if all else "")


def _times(factor: float | None) -> str:
    return (
        "unknown: record a baseline with lightning-fp baseline"
        if factor is None
        else f"{factor:.2f}x"
    )


def _plain(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)
