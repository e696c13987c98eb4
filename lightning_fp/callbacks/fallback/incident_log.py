"""What PrecisionFallback says: to `events.jsonl`, to the loggers, one line each to the console."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_fp.callbacks.fallback.accounting import Accounting
from lightning_fp.callbacks.fallback.investigation import Findings
from lightning_fp.callbacks.fallback.step_count import StepCount
from lightning_fp.callbacks.run.event_log import EventLog
from lightning_fp.layers import Change, LinearFormat
from lightning_fp.records.events import (
    Demotion,
    Event,
    LayerClimb,
    Note,
    Promotion,
    Replayed,
    Rollback,
    SkippedStep,
    Started,
    StateChange,
    Suspicion,
    Verdict,
)
from lightning_fp.stability.detect.detector import Decision
from lightning_fp.stability.detect.signals import StepSignals
from lightning_fp.stability.respond.limits import Excess
from lightning_fp.stability.respond.verdict import Judgement

log = logging.getLogger("lightning_fp.fallback")

AUTHOR = "fallback"
"""Of the writes to the table that have events of their own in here."""


class IncidentLog:
    """Puts what the fallback does into the run's log.

    Args:
        run: the log of the run; by default one that writes nowhere.
        count: of the steps that events are told with.
    """

    def __init__(self, run: EventLog | None = None, count: StepCount | None = None) -> None:
        self._run = EventLog(None) if run is None else run
        self._run.own.add(AUTHOR)
        self._count = StepCount() if count is None else count
        self._misbehaving = False

    def write(self, event: Event, *, quiet: bool = False) -> None:
        """One event, everywhere, with the Trainer's `global_step`; quietly not on the console."""
        at = self._count.global_step
        if isinstance(event, Rollback):
            event = replace(event, to_step=at(event.to_step))
        self._run.write(replace(event, step=at(event.step)), quiet=quiet)

    # -- what happens ---------------------------------------------------------------------------

    def started(self, step: int, memory: Mapping[str, float], *, dry_run: bool) -> None:
        """The watch begins."""
        snapshots = memory["all_snapshots_bytes"] / 2**20
        reason = (
            f"snapshots take {snapshots:.1f} MiB of host memory, recorded batches at most"
            f" {memory['ring_bytes_at_most'] / 2**20:.0f} MiB; all layers in high precision keep"
            f" {memory['high_precision_bytes_per_token'] / 2**10:.1f} KiB more per token"
        )
        action = "only logging, nothing is changed" if dry_run else ""
        self.write(Started(step=step, reason=reason, numbers=dict(memory), action=action))

    def skipped(self, seen: StepSignals, in_a_row: int, layer: str | None = None) -> None:
        """A step was left out; of many in a row the console names the first and every 100th."""
        where = "" if layer is None else f", in backward first that of {layer}"
        reason = f"a gradient was inf or NaN{where}: the optimizer step was left out"
        numbers = {} if seen.loss is None else {"loss": seen.loss}
        layers = () if layer is None else (layer,)
        event = SkippedStep(step=seen.step, reason=reason, numbers=numbers, layers=layers)
        self.write(event, quiet=in_a_row > 4 and in_a_row % 100 != 0)
        self._run.count("skipped_steps", self._count.global_step(seen.step))

    def state(self, step: int, before: str, after: str, reason: str) -> None:
        """The fallback went from one state to another."""
        if before != after:
            self.write(StateChange(step=step, before=before, after=after, reason=reason))

    def suspicion(
        self, step: int, decision: Decision, *, skips: int, overflow: str | None = None
    ) -> None:
        """Loss or gradient norm left their range, or gradients that of FP16."""
        numbers = {
            "skips": float(skips),
            **{
                name: float(value)
                for name, value in (
                    ("onset", decision.onset),
                    ("baseline", decision.baseline),
                    ("noise", decision.noise),
                    ("score", decision.score),
                )
                if value is not None
            },
        }
        reason = decision.reason
        if skips and decision.kind in ("ok", "skip"):
            reason = f"{skips} steps in a row were left out as not finite"
        if overflow is not None:
            reason = overflow
        action = "replay in high precision"
        self.write(Suspicion(step=step, reason=reason, numbers=numbers, action=action))
        self._run.count("suspicions", self._count.global_step(step))

    def probe_suspicion(self, step: int, error: float, usual: float) -> None:
        """A probe's gradients were out of the usual."""
        reason = f"the gradients' error against high precision is {error:.2f}, usual is {usual:.2f}"
        numbers = {"grad_error": error, "usual": usual}
        action = "replay in high precision"
        self.write(Suspicion(step=step, reason=reason, numbers=numbers, action=action))
        self._run.count("suspicions", self._count.global_step(step))

    def findings(self, step: int, findings: Findings) -> None:
        """What the replays measured and what it means."""
        tiers = (("one step", findings.one_step), ("trajectory", findings.trajectory))
        for tier, verdict in tiers:
            if verdict is not None:
                self._verdict(step, tier, verdict, findings)

    def _verdict(self, step: int, tier: Any, verdict: Judgement, findings: Findings) -> None:
        self.write(Replayed(step=step, reason=tier, numbers=verdict.numbers))
        self.write(
            Verdict(
                step=step,
                reason=verdict.reason,
                numbers=verdict.numbers,
                verdict=verdict.finding,
                tier=tier,
            )
        )

    def attribution(self, step: int, findings: Findings) -> None:
        """Who is to blame."""
        found = findings.attribution
        if found is None:
            return
        worst = sorted(found.cast_errors.items(), key=lambda item: -item[1])[:4]
        numbers = {
            "grad_error": found.error,
            "grad_error_without": found.rest,
            **{f"alone/{name}": error for name, error in found.culprits.items()},
            **{f"cast_error/{name}": error for name, error in worst},
        }
        reason = (
            "alone in low precision these layers make most of the gradients' error"
            if found.culprits
            else "no few layers make most of the gradients' error"
        )
        self.write(
            Replayed(step=step, reason=reason, numbers=numbers, layers=tuple(found.culprits))
        )

    def demoted(
        self,
        step: int,
        changes: Sequence[Change],
        before: Mapping[str, str],
        formats: Mapping[str, LinearFormat],
        reason: str,
        *,
        dry_run: bool,
    ) -> None:
        """Layers were given a safer format, or would be."""
        wanted = {n: (before[n], format.name) for n, format in formats.items()}
        done = {change.layer: (change.before, change.after) for change in changes}
        action = "dry run: nothing was changed" if dry_run else ""
        event = Demotion(step=step, reason=reason, formats=done or wanted, action=action)
        self.write(event)
        self._run.count("demotions", self._count.global_step(step))

    def promoted(self, step: int, changes: Sequence[Change], reason: str) -> None:
        """Layers got their format back."""
        formats = {change.layer: (change.before, change.after) for change in changes}
        self.write(Promotion(step=step, reason=reason, formats=formats))
        self._run.count("promotions", self._count.global_step(step))

    def climbed(
        self,
        step: int,
        excess: Excess,
        before: str,
        after: LinearFormat,
        changes: Sequence[Change],
        *,
        dry_run: bool,
    ) -> None:
        """A layer over its limit climbed a rung."""
        done = {change.layer: (change.before, change.after) for change in changes}
        formats = done or {excess.layer: (before, after.name)}
        action = "dry run: nothing was changed" if dry_run else ""
        numbers = {excess.statistic: excess.value, "limit": excess.limit}
        self.write(
            LayerClimb(
                step=step,
                reason=excess.sentence,
                numbers=numbers,
                formats=formats,
                action=action,
            )
        )

    def rolled_back(self, step: int, to_step: int, replayed: int) -> None:
        """The run went back."""
        reason = (
            "the same batches in high precision become the run"
            if replayed
            else "the data moves on, the batches since then are lost"
        )
        self.write(Rollback(step=step, to_step=to_step, replayed=replayed, reason=reason))

    def note(self, step: int, text: str) -> None:
        """Something to know."""
        self.write(Note(step=step, reason=text))

    def preflight(self, step: int, outcome: str) -> None:
        """Whether a step in high precision fits into memory."""
        if outcome == "done":
            self.note(step, "a step with all layers in high precision fits into memory")
        else:
            text = f"a step with all layers in high precision does not work here: {outcome}"
            self.note(step, f"{text}; verdicts that need one will be unclear")

    def all_high(self, step: int) -> None:
        """A suspicion that no format can explain."""
        text = "every layer is in high precision already: precision is not to blame"
        self.note(step, f"{text}; look at the data and the learning rate")

    def still_misbehaves(self, step: int, decision: Decision) -> None:
        """High precision, for good, misbehaves too; said once."""
        if not self._misbehaving:
            text = f"high precision misbehaves too ({decision.reason}): look at data, learning rate"
            self.note(step, f"{text} and hardware; precision is left alone")
        self._misbehaving = True

    def failed(self, step: int, error: Exception) -> None:
        """An investigation raised; the training goes on."""
        log.warning("an investigation failed at step %d: %s", step, error, exc_info=error)
        self.note(step, f"an investigation failed, the training goes on: {error}")

    def finished(self, step: int, steps: Accounting) -> None:
        """What became of the steps."""
        numbers = {
            "attempted": float(steps.attempted),
            "useful": float(steps.useful),
            "skipped": float(steps.skipped),
            "rolled_back": float(steps.rolled_back),
            "made_good": float(steps.made_good),
            "replayed": float(steps.replayed),
        }
        self.write(Note(step=step, reason=steps.sentence(), numbers=numbers))
