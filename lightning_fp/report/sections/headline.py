"""A run in one sentence, and in a handful of figures."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lightning_fp.counting import counted
from lightning_fp.events import Rehearsed, Suspicion, WatchFailed
from lightning_fp.records import Demotion, Event, StageChange
from lightning_fp.report.draw.decisions import decisions
from lightning_fp.report.draw.parts import duration, number
from lightning_fp.report.draw.sentences import alarm
from lightning_fp.report.read.cost import RunCost
from lightning_fp.report.read.format_history import (
    ever_low,
    format_changes,
    is_low,
    last_formats,
)
from lightning_fp.report.read.incidents import Finding, incidents
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.sections.answer import loss_gap
from lightning_fp.statistic_names import share


def headline(records: RunRecords, cost: RunCost) -> str:
    """A few short sentences that need no knowledge of the package.

    Args:
        records: the run's.
        cost: what it cost.
    """
    never = never_low(records)
    incidents = "" if never else _incidents(records)
    rollout = "" if never else _rollout(records.events)
    unproven = _unproven(records.events)
    parts = [never, unwatched(records), _end(records), rollout, incidents, unproven]
    if cost.emulated and not never:
        parts.append(
            "FP8 was emulated: losses come close to those of FP8 hardware, times say nothing of it."
        )
    elif cost.effective_speedup is not None and not never:
        gain = cost.effective_speedup
        parts.append(f"With everything counted, it ran at {gain:.2f}x the baseline's speed.")
    elif cost.attempted and cost.useful < cost.attempted:
        parts.append(f"{cost.useful:,} of {cost.attempted:,} steps were kept.")
    return " ".join(part for part in parts if part)


def never_low(records: RunRecords) -> str:
    """What stands above all else: low precision was asked for, and no step was in it; or ""."""
    asked = [layer.format for layer in records.layers if layer.reason is None]
    if not asked or not records.last_step or ever_low(records):
        return ""
    stages = [event.stage for event in records.events if isinstance(event, StageChange)]
    why = f"; the rollout ended in stage {stages[-1]!r}" if stages else ""
    layers = "its only layer" if len(asked) == 1 else f"all {len(asked)} layers"
    what = "FP8" if any("fp8" in format for format in asked) else "Low precision"
    return (
        f"{what} was asked for but never on: {layers} stayed in high precision in every step{why}."
    )


def unwatched(records: RunRecords) -> str:
    """What the watch over the run did not do: it failed, or confined itself; or ""."""
    failed = [event.step for event in records.events if isinstance(event, WatchFailed)]
    if failed:
        return f"The watch failed: the run was unprotected from step {failed[0]:,}."
    rehearsed = [event for event in records.events if isinstance(event, Rehearsed)]
    if not rehearsed or rehearsed[-1].outcome == "passed":
        return ""
    reach = "single steps" if rehearsed[-1].outcome == "one step" else "limits"
    why = rehearsed[-1].differs[0] if rehearsed[-1].differs else "see the events"
    return f"From step {rehearsed[-1].step:,} on the watch was confined to {reach} ({why})."


def alarming(records: RunRecords) -> bool:
    """Whether the headline begins with what must not be missed."""
    return bool(never_low(records) or unwatched(records))


def key_figures(records: RunRecords, cost: RunCost) -> list[tuple[str, str, str]]:
    """What, how much, and a remark, for the top of a page."""
    steps = records.steps
    loss = steps.final_loss() if steps else None
    gap = loss_gap(records)
    low, all, now = low_precision(records)
    decided = sum(each.decides for each in decisions(records.events))
    found = [
        ("steps", f"{cost.attempted:,}", _kept(cost)),
        (
            "final loss",
            number(loss) or "unknown",
            "mean of the last steps" if gap is None else against(gap),
        ),
        (
            "in low precision",
            f"{low} of {all}" if all else "unknown",
            f"layers at the end, {now}" if now else "layers at the end",
        ),
        ("decisions", f"{decided:,}", "about precision" + ("; listed below" if decided else "")),
    ]
    if cost.emulated:
        return found
    found.append(("time per step", duration(cost.step_seconds), "median"))
    raw, effective = cost.raw_speedup, cost.effective_speedup
    if raw and effective and not never_low(records):
        found.append(("speed-up", f"{effective:.2f}x", f"everything counted; {raw:.2f}x per step"))
    return found


def _kept(cost: RunCost) -> str:
    """How many steps came to stand, and how many were made beside them."""
    more = f", {cost.replayed_steps:,} more in replays" if cost.replayed_steps else ""
    return f"{cost.useful:,} kept{more}"


def against(gap: float) -> str:
    """A difference of the loss from the baseline's, in a few words."""
    if abs(gap) < 5e-4:
        return "as the baseline"
    return f"{share(abs(gap))} {'above' if gap > 0 else 'below'} the baseline"


def low_precision(records: RunRecords) -> tuple[int, int, str]:
    """Layers in low precision at the end, all layers, and the former's share of FLOPs in words."""
    ends = last_formats(records)
    low = [layer for layer, format in ends.items() if is_low(format)]
    flops = {info.name: info.flops_share for info in records.layers}
    known = [flops.get(layer) for layer in low]
    shares = [value for value in known if value is not None]
    whole = bool(low) and len(shares) == len(low)
    return len(low), len(ends), f"{share(sum(shares))} of FLOPs" if whole else ""


def updated(records: RunRecords) -> float | None:
    """Unix time of the newest record."""
    files = [path for path in records.path.glob("*") if path.suffix in (".csv", ".jsonl")]
    files += list((records.path / "statistics").glob("*.parquet"))
    return max((path.stat().st_mtime for path in files), default=None)


def _end(records: RunRecords) -> str:
    loss = records.steps.final_loss() if records.steps else None
    with_loss = f" with a loss of {loss:.4g}" if loss is not None else ""
    if records.finished is not None:
        made = int(records.finished.numbers["attempted"])
        if made and records.last_step == 2 * made:  # two optimizers take turns
            return f"The run ended at step {records.last_step:,} (two for each batch){with_loss}."
        return f"The run ended after {counted(records.last_step, 'step')}{with_loss}."
    if not records.last_step:
        return "Nothing is recorded of this run's steps yet."
    when = updated(records)
    at = "" if when is None else time.strftime(" (%Y-%m-%d %H:%M)", time.localtime(when))
    if not any(event.kind == "started" for event in records.events):
        return f"The run is recorded up to step {records.last_step:,}{with_loss}."
    return (
        "No end is recorded: the run is still going, or was stopped, after"
        f" {counted(records.last_step, 'step')}{with_loss}{at}."
    )


def _incidents(records: RunRecords) -> str:
    """What the fallback found and did."""
    events = records.events
    convicted = _steps(events, "precision")
    demotions = [event for event in format_changes(events) if isinstance(event, Demotion)]
    if convicted:
        times = "once" if len(convicted) == 1 else f"{len(convicted)} times"
        layers = {layer for event in demotions for layer in event.formats}
        named = next(iter(layers)) if len(layers) == 1 else counted(len(layers), "layer")
        at = ", ".join(f"{step:,}" for step in convicted[:3])
        steps = "step" if len(convicted) == 1 else "steps"
        what = f"Low precision was proved to harm it {times}, at {steps} {at}"
        return f"{what}; {named} got a safer format.{_climbs(events)}" if layers else f"{what}."
    cleared = _steps(events, "not precision")
    climbs = _climbs(events)
    if cleared:
        times = "once" if len(cleared) == 1 else f"{len(cleared)} times"
        if climbs:
            looked = f"Something unusual was looked into {times}"
            return f"{looked}, and low precision was not at fault.{climbs}"
        return f"Something went wrong {times}, and replays showed that precision was not to blame."
    if climbs:
        return climbs.strip()
    if any(event.kind in ("suspect", "skip", "demote", "rollback") for event in events):
        raised = [event for event in events if isinstance(event, Suspicion)]
        what = alarm(raised[0]).partition(" (")[0] if raised else "something unusual happened"
        at = f"At step {raised[0].step:,} " if raised else ""
        said = f"{at}{what}" if at else f"{what[0].upper()}{what[1:]}"
        return f"{said}: What happened, below, says what was done about it."
    failed = any(isinstance(event, WatchFailed) for event in events)
    if not failed and any(event.kind == "started" for event in events):
        return "Nothing went wrong."
    return ""


def _rollout(events: Sequence[Event]) -> str:
    """That a rollout has ended in an earlier stage than it had reached; or ""."""
    stages = [event for event in events if isinstance(event, StageChange)]
    names = list(dict.fromkeys(name for e in stages for name in (e.previous, e.stage) if name))
    if not stages or names.index(stages[-1].stage) == len(names) - 1:
        return ""
    last = stages[-1]
    back = f"at step {last.step:,} it went back to stage {last.stage!r}"
    return f"The rollout did not finish: {back}."


def _unproven(events: Sequence[Event]) -> str:
    climbed = [event for event in format_changes(events) if event.kind == "unproven"]
    if not climbed:
        return ""
    layers = len({layer for event in climbed for layer in event.layers})
    times = len({event.step for event in climbed})
    often = "one suspicion" if times == 1 else f"{times} suspicions"
    moved = counted(layers, "layer")
    return f"Without proof, on {often}, {moved} got a safer format: nothing could be replayed."


def _climbs(events: Sequence[Event]) -> str:
    climbed = [event for event in format_changes(events) if event.kind == "limit"]
    layers = {layer for event in climbed for layer in event.layers}
    many = "1 layer was" if len(layers) == 1 else f"{len(layers)} layers were"
    return f" {many} over a limit and got a safer format." if layers else ""


def _steps(events: Sequence[Event], finding: Finding) -> list[int]:
    return [incident.step for incident in incidents(events) if incident.finding == finding]
