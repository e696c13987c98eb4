"""What PrecisionFallback says: to `events.jsonl`, to the loggers, one line each to the console."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_fp.callbacks.accounting import Accounting
from lightning_fp.callbacks.investigation import Findings
from lightning_fp.layers import LinearFormat
from lightning_fp.layers.precision_map import Change
from lightning_fp.records.events import (
    Demotion,
    Event,
    EventWriter,
    FormatChange,
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
from lightning_fp.stability.detector import Decision
from lightning_fp.stability.limits import Excess
from lightning_fp.stability.signals import StepSignals
from lightning_fp.stability.verdict import Verdict as Judgement

log = logging.getLogger("lightning_fp.fallback")

_QUIET = (StateChange, SkippedStep, Replayed, Started)
"""Events that are no warning."""


class IncidentLog:
    """Writes events; a failure to do so is said once and does no harm.

    Args:
        directory: where `events.jsonl` goes; None on other ranks, and where nothing is written.
        loggers: the Trainer's.
        step: the step the run begins or resumes at.
        position: where the log stood when the checkpoint was written that the run resumes from.
        console: whether to write lines.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        loggers: Sequence[Any] = (),
        step: int = 0,
        position: int | None = None,
        console: bool = False,
    ) -> None:
        self._writer = None
        self._loggers, self._console = loggers, console
        self._failed = False
        self._counts = {"demotions": 0, "promotions": 0, "skipped_steps": 0, "suspicions": 0}
        self._misbehaving = False
        if directory is not None:
            self._writer = EventWriter(directory, step=step, position=position)

    @property
    def position(self) -> int | None:
        """How far the file has come."""
        return None if self._writer is None else self._writer.position

    def write(self, event: Event, *, quiet: bool = False) -> None:
        """One event, everywhere; not on the console if `quiet`."""
        if self._console and not quiet:
            level = logging.INFO if isinstance(event, _QUIET) else logging.WARNING
            log.log(level, "%s", event.sentence())
        if self._writer is not None and not self._failed:
            try:
                self._writer.append(event)
            except OSError:
                self._failed = True
                log.exception("events cannot be written; the training goes on without them")

    def _count(self, name: str, step: int) -> None:
        self._counts[name] += 1
        for logger in self._loggers:
            logger.log_metrics({f"precision/{name}": float(self._counts[name])}, step)

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

    def skipped(self, seen: StepSignals, in_a_row: int) -> None:
        """A step was left out; of many in a row the console names the first and every 100th."""
        reason = "a gradient was inf or NaN: the optimizer step was left out"
        numbers = {} if seen.loss is None else {"loss": seen.loss}
        event = SkippedStep(step=seen.step, reason=reason, numbers=numbers)
        self.write(event, quiet=in_a_row > 4 and in_a_row % 100 != 0)
        self._count("skipped_steps", seen.step)

    def state(self, step: int, before: str, after: str, reason: str) -> None:
        """The fallback went from one state to another."""
        if before != after:
            self.write(StateChange(step=step, before=before, after=after, reason=reason))

    def suspicion(self, step: int, decision: Decision, *, skips: int) -> None:
        """Loss or gradient norm left their range."""
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
        action = "replay in high precision"
        self.write(Suspicion(step=step, reason=reason, numbers=numbers, action=action))
        self._count("suspicions", step)

    def probe_suspicion(self, step: int, error: float, usual: float) -> None:
        """A probe's gradients were out of the usual."""
        reason = f"the gradients' error against high precision is {error:.2f}, usual is {usual:.2f}"
        numbers = {"grad_error": error, "usual": usual}
        action = "replay in high precision"
        self.write(Suspicion(step=step, reason=reason, numbers=numbers, action=action))
        self._count("suspicions", step)

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
        self._count("demotions", step)

    def promoted(self, step: int, changes: Sequence[Change], reason: str) -> None:
        """Layers got their format back."""
        formats = {change.layer: (change.before, change.after) for change in changes}
        self.write(Promotion(step=step, reason=reason, formats=formats))
        self._count("promotions", step)

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

    def others(self, step: int, changes: Sequence[Change]) -> None:
        """What others wrote to the table."""
        by_reason: dict[str, dict[str, tuple[str, str]]] = {}
        for change in changes:
            formats = by_reason.setdefault(change.reason, {})
            formats[change.layer] = (change.before, change.after)
        for reason, formats in by_reason.items():
            self.write(FormatChange(step=step, reason=reason, formats=formats))

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
