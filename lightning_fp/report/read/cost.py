"""What a run cost: what became of its steps and its time, and what low precision gained in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lightning_fp.counting import counted
from lightning_fp.records import Event, Rollback, Started
from lightning_fp.report.read.format_history import format_histories, steps_away_from
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.read.steps import Steps

_INCIDENT = ("suspect", "replay", "verdict", "rollback", "demote")
"""Events whose steps took longer because something was looked into."""


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What became of a run's steps and its time. None is unknown, never zero."""

    attempted: int
    """Optimizer steps that were begun."""

    useful: int
    """Of these, steps the model has learned from."""

    skipped: int
    """Of these, left out because a gradient was not finite."""

    rolled_back: int
    """Of these, undone by going back to a snapshot."""

    made_good: int
    """Of those rolled back, trained again on the same batches."""

    in_fallback: int
    """Of these, with some layer in a safer format than asked for."""

    repeated: int
    """Steps run again because the run resumed from a checkpoint before them."""

    replays: int
    """Times that something was measured by replaying steps."""

    replayed_steps: int | None
    """Training steps these took; known once the run has ended."""

    replay_budget: tuple[int, float] | None
    """What replays may take: training steps, and a share of the run's besides; None if not
    recorded."""

    seconds: float | None
    """All the time its steps took, with everything between them."""

    step_seconds: float | None
    """Median time of a step."""

    telemetry_seconds: float | None
    """What sampled steps took more than others, in all."""

    probe_seconds: float | None
    """What parity probes took."""

    incident_seconds: float | None
    """What the steps took more in which something was looked into."""

    baseline: str = ""
    """The run it is compared with."""

    baseline_step_seconds: float | None = None
    """Median time of a step of the baseline."""

    emulated: bool = False
    """Whether low precision was emulated: times then say nothing about hardware that has it."""

    memory: Mapping[str, float] = field(default_factory=dict[str, float])
    """Bytes, by what they are for."""

    def replays_in_words(self) -> str:
        """What replays took, beside what they may take; empty if neither is known."""
        parts: list[str] = []
        if self.replayed_steps is not None and self.attempted:
            steps = counted(self.replayed_steps, "training step")
            of = f"{self.replayed_steps / self.attempted:.0%} of the run's own {self.attempted:,}"
            parts.append(f"Replays took {steps}, {of}.")
        if self.replay_budget is not None:
            steps, share = self.replay_budget
            limit = f"{counted(steps, 'step')} plus {share:.0%} of the run's own"
            here = f"{round(steps + share * self.attempted):,} in a run of this length"
            parts.append(f"The limit is {limit}: {here}.")
        return " ".join(parts)

    @property
    def useful_share(self) -> float | None:
        """Useful steps over attempted ones."""
        return self.useful / self.attempted if self.attempted else None

    @property
    def raw_speedup(self) -> float | None:
        """The baseline's median step time over this run's."""
        if not self.baseline_step_seconds or not self.step_seconds:
            return None
        return self.baseline_step_seconds / self.step_seconds

    @property
    def effective_speedup(self) -> float | None:
        """The time the baseline takes for as many useful steps, over all of this run's time."""
        if not self.baseline_step_seconds or not self.seconds:
            return None
        return self.baseline_step_seconds * self.useful / self.seconds

    def sentence(self) -> str:
        """For somebody who has time for one sentence."""
        if not self.attempted:
            return "Nothing is known of what this run cost: no step is recorded."
        lost = self.attempted - self.useful
        kept = (
            f"All {self.attempted:,} steps were kept"
            if not lost
            else f"{self.useful:,} of {self.attempted:,} steps were kept"
        )
        raw, effective = self.raw_speedup, self.effective_speedup
        if self.emulated:
            return f"{kept}; FP8 was emulated, so its times say nothing about FP8 hardware."
        if effective is not None and raw is not None:
            gain = f"{effective:.2f}x as fast as the baseline, all counted ({raw:.2f}x per step)"
            return f"{kept}; the run was {gain}."
        unknown = "what low precision gained is unknown without a baseline"
        return f"{kept}; {unknown} (record one with `lightning-fp baseline`)."


def run_cost(records: RunRecords, baseline: RunRecords | None = None) -> RunCost:
    """What a run cost, from its records alone.

    A run that has not ended has no account of its steps; it is then made from the events.

    Args:
        records: the run's.
        baseline: those of a run in high precision to compare with.
    """
    steps, last = records.steps, records.last_step
    counts = _counts(records)
    away = steps_away_from(format_histories(records), records.events, last)
    usual = steps.seconds_per_step() if steps else None
    against = baseline.steps.seconds_per_step() if baseline and baseline.steps else None
    probes = {row["step"]: row.get("seconds") for row in records.parity}
    known = [seconds for seconds in probes.values() if seconds is not None]
    end = records.finished
    return RunCost(
        **counts,
        in_fallback=sum(to - since for since, to in away),
        repeated=steps.repeated if steps else 0,
        replays=sum(event.kind == "replay" for event in records.events),
        replayed_steps=None if end is None else int(end.numbers.get("replayed", 0)),
        replay_budget=_replay_budget(records.events),
        seconds=_all_seconds(steps, counts["attempted"]),
        step_seconds=usual,
        telemetry_seconds=_telemetry(records),
        probe_seconds=sum(known) if known else None,
        incident_seconds=_incidents(steps, records.events),
        baseline="" if baseline is None else baseline.name,
        baseline_step_seconds=against,
        emulated=any("emulated" in layer.kernel for layer in records.layers),
        memory=_memory(records),
    )


def _counts(records: RunRecords) -> dict[str, int]:
    """Attempted, useful, skipped, rolled back, made good: as the run says, or from its events."""
    names = ("attempted", "useful", "skipped", "rolled_back", "made_good")
    if records.finished is not None:
        numbers = records.finished.numbers
        return {name: int(numbers.get(name, 0)) for name in names}
    skips = [event.step for event in records.events if event.kind == "skip"]
    first = records.starts[0].step if records.starts else 0
    attempted = max(records.last_step - first, 0)
    rolled_back = made_good = undone = 0
    for event in records.events:
        if isinstance(event, Rollback):
            rolled_back += event.step - event.to_step
            made_good += event.replayed
            useless = sum(event.to_step < step <= event.step for step in skips)
            undone += event.step - event.to_step - useless
    return {
        "attempted": attempted,
        "useful": max(attempted - len(skips) - undone + made_good, 0),
        "skipped": len(skips),
        "rolled_back": rolled_back,
        "made_good": made_good,
    }


def _all_seconds(steps: Steps | None, attempted: int) -> float | None:
    """Of all attempted steps, also where a crash has lost the times of the last ones."""
    known = None if steps is None else steps.seconds[steps.seconds.isfinite()]
    if steps is None or known is None or not len(known):
        return None
    return known.mean().item() * max(attempted, len(known)) + steps.repeated_seconds


def _telemetry(records: RunRecords) -> float | None:
    """Sampled steps against the others, by medians, so that incidents do not count."""
    steps, statistics = records.steps, records.statistics
    if steps is None or statistics is None:
        return None
    sampled = torch.isin(steps.steps, statistics.sampled_at)
    known = steps.seconds.isfinite()
    with_it, without = steps.seconds[known & sampled], steps.seconds[known & ~sampled]
    if not len(with_it) or not len(without):
        return None
    more = with_it.median() - without.median()
    return max(more.item(), 0.0) * len(with_it)


def _incidents(steps: Steps | None, events: tuple[Event, ...]) -> float | None:
    """What is looked into between two steps counts to one of them: the longer one."""
    at = {event.step for event in events if event.kind in _INCIDENT}
    usual = steps.seconds_per_step() if steps else None
    if steps is None or usual is None:
        return None
    more = (steps.seconds - usual).clamp(min=0).nan_to_num(0.0)
    seconds = dict(zip(steps.steps.tolist(), more.tolist(), strict=True))
    around = {step + after for step in at for after in (0, 1)}
    return sum(seconds.get(step, 0.0) for step in around)


def _replay_budget(events: tuple[Event, ...]) -> tuple[int, float] | None:
    """What the watch has said of its budget."""
    told = [event.numbers for event in events if isinstance(event, Started)]
    known = [numbers for numbers in told if "replay_incident" in numbers]
    if not known:
        return None
    return round(known[-1]["replay_incident"]), known[-1].get("replay_share", 0.0)


def _memory(records: RunRecords) -> dict[str, float]:
    """What the run has said of memory, in words."""
    words = {
        "all_snapshots_bytes": "snapshots, host memory",
        "ring_bytes_at_most": "recorded batches, host memory, at most",
        "high_precision_bytes_per_token": "all layers in high precision, more per token",
        "peak_memory_bytes": "peak, device memory",
    }
    ends = [e for e in records.events if isinstance(e, Started) or e is records.finished]
    numbers = [number for event in ends for number in event.numbers.items()]
    return {words[name]: value for name, value in numbers if name in words and value}
