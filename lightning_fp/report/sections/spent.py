"""What came of it: evaluation in both precisions, the mismatch in RL, cost, how it was run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_fp.report.draw.curves import INK, curve, panel, panels, points
from lightning_fp.report.draw.parts import Section, Table, duration, not_recorded, number, size
from lightning_fp.report.read.cost import RunCost
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.sections.missing import (
    always_high,
    why_no_gap,
    why_no_loss,
    why_no_mismatch,
)
from lightning_fp.statistic_names import share

_NO_GAP = 5e-4
"""Gaps below this share of the loss are called none."""


def evaluation_section(records: RunRecords) -> Section:
    """What serving in another precision would cost."""
    about = Section(
        id="evaluation",
        title="Evaluation gap",
        look=(
            "The same validation batches in the training formats and in high precision. Above 0 the"
            " training formats are the worse ones to serve in; below 0 the model has fitted itself"
            " to them, and high precision is worse."
        ),
    )
    columns = records.evaluation
    if not {"loss", "loss_high"} <= columns.keys():
        return replace(about, missing=why_no_gap(records))
    at = columns["step"].tolist()
    loss, high = columns["loss"], columns["loss_high"]
    gap = columns.get("gap", (loss - high) / high.abs())
    fields = [
        panel(
            "validation loss",
            [
                points("training formats", at, loss.tolist()),
                {**points("high precision (dots)", at, high.tolist(), color=INK), "dotted": True},
            ],
            height=140,
        ),
        panel(
            "gap",
            [points("gap", at, (gap * 100).tolist())],
            unit="%",
            log=False,
            height=100,
        ),
    ]
    look = "Where the two lines part, one of the two ways to serve the model is worse."
    chart = panels("Validation loss in two precisions", look, fields, last=records.last_step)
    return replace(about, charts=(chart,), text=_last_gap(at, gap.tolist()))


def _last_gap(at: Sequence[float], gap: Sequence[float]) -> tuple[str, ...]:
    """The gap of the last validation, in words."""
    known = [(step, value) for step, value in zip(at, gap, strict=True) if math.isfinite(value)]
    if not known:
        return ()
    step, value = known[-1]
    side = "higher" if value > 0 else "lower"
    than = f"{share(abs(value))} {side} than" if abs(value) >= _NO_GAP else "the same as"
    return (f"At the last validation, step {int(step):,}, the loss was {than} in high precision.",)


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
        return replace(about, missing=why_no_mismatch(records))
    steps = records.mismatch["step"].long()
    first = [name for name in ("k3_kl", "logprob_abs_diff_mean", "kl") if name in drawn]
    names = [*first, *(name for name in drawn if name not in first)][:6]
    fields = [panel(name, [curve(name, steps, drawn[name])], height=110) for name in names]
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
    return replace(about, charts=(chart,), tables=(table,))


def cost_section(records: RunRecords, cost: RunCost) -> Section:
    """What the run cost."""
    known = records.steps is not None and cost.seconds is not None
    facts: list[tuple[str, str]] = [
        ("steps of the run", f"{cost.attempted:,}"),
        (
            "kept",
            f"{cost.useful:,}" + (f" ({share(cost.useful_share)})" if cost.attempted else ""),
        ),
        *_steps(cost),
        ("time in all", duration(cost.seconds)),
        ("time per step, median", duration(cost.step_seconds)),
        *_times_of_parts(cost),
        *(
            [("speed-up", "not given: FP8 was emulated")]
            if cost.emulated
            else []
            if always_high(records)
            else [
                ("speed-up per step", _times(cost.raw_speedup)),
                ("speed-up, everything counted", _times(cost.effective_speedup)),
            ]
        ),
        *((f"memory: {what}", size(value)) for what, value in cost.memory.items()),
    ]
    high = always_high(records)
    text = ["No layer was in low precision: there is nothing to compare."] if high else []
    text += [] if high else [cost.sentence()]
    text += [cost.replays_in_words()] if cost.replayed_steps else []
    if not known:
        text.append(f"Times: {why_no_loss(records)}")
    if records.finished is None and cost.attempted:
        text.append(
            "What became of the steps is counted from what is recorded: the run wrote no account"
            " of its own, as PrecisionFallback does at the end."
        )
    return Section(
        id="cost",
        title="What the run cost",
        look=(
            ""
            if cost.emulated or high
            else "The speed-up that matters has everything counted: the baseline's time for the"
            " steps that were kept, divided by all the time of this run."
        ),
        facts=facts,
        text=text,
    )


def settings_section(records: RunRecords) -> Section:
    """How the run was set up."""
    about = Section(
        id="settings",
        title="How it was run",
        look="Versions, and the settings of what this package adds.",
    )
    if not records.starts:
        return replace(about, missing=not_recorded("add ClampMonitor() to the Trainer's callbacks"))
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
    return replace(about, facts=facts, tables=[table for table in tables if table.rows])


def _steps(cost: RunCost) -> list[tuple[str, str]]:
    """What became of steps that are not simply kept; nothing of what there was none of."""
    again = f", {cost.made_good:,} of them trained again" if cost.made_good else ""
    found = [
        ("skipped", cost.skipped, ""),
        ("undone on the way", cost.rolled_back, again),
        ("with a layer in a safer format than asked for", cost.in_fallback, ""),
        ("repeated after a resume", cost.repeated, ""),
        ("replayed besides", cost.replayed_steps or 0, ""),
    ]
    return [(f"steps {what}", f"{steps:,}{more}") for what, steps, more in found if steps]


def _times_of_parts(cost: RunCost) -> list[tuple[str, str]]:
    """What the parts took, as far as they are known."""
    found = [
        ("measuring the casts took more", cost.telemetry_seconds),
        ("comparing with high precision took", cost.probe_seconds),
        ("looking into incidents took", cost.incident_seconds or None),
    ]
    parts = [(what, _part(seconds, cost.seconds)) for what, seconds in found if seconds is not None]
    baseline = cost.baseline_step_seconds
    step = ("baseline's time per step, median", duration(baseline))
    return [*parts, step] if baseline is not None else parts


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
