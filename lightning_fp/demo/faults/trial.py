"""Trials: a fault, an arm that has to cope with it, and what came of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import lightning as L

from lightning_fp.callbacks import PrecisionFallback
from lightning_fp.demo.faults.cases import CASES, FaultCase
from lightning_fp.demo.faults.run import STEPS, FaultRun, fault_plugin, fault_run
from lightning_fp.layers import linear_format
from lightning_fp.plugins import LayerPrecision
from lightning_fp.plugins.guard import StepGuard
from lightning_fp.records.events import FormatChange, Rollback, SkippedStep, read_events
from lightning_fp.stability.actions import Survey, Surveyed
from lightning_fp.stability.judge.conviction import Conclusion
from lightning_fp.stability.respond.ladder import LADDER
from lightning_fp.stability.watch import Watch

Arm = Literal["high precision", "unprotected", "skip-step", "rollback and skip", "fallback"]
"""What a run is protected by: nothing to protect, nothing, leaving non-finite steps out, going back
to a snapshot at every suspicion while the data moves on, the fallback."""

HEALTHY = "healthy"
"""The name of the trial in which nothing is wrong."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run, and what the arm did in it."""

    case: str
    arm: Arm
    seed: int

    final_loss: float
    """Mean training loss over the last steps."""

    held_out_loss: float
    changed: dict[str, str]
    """The layers whose format was changed, with the format at the end."""

    first_change: int | None
    """The step of the first of these changes."""

    skipped: int
    rolled_back: int
    replayed: int

    @property
    def blamed(self) -> bool:
        """Whether precision was: some layer was given a safer format."""
        return bool(self.changed)

    def gap(self, reference: Trial) -> float:
        """By what share the final loss is higher than another run's."""
        return self.final_loss / reference.final_loss - 1

    @property
    def no_further_than_needed(self) -> bool:
        """Whether only layers at fault were changed, none beyond the format that spares it."""
        case = CASES[self.case]
        if not all(fnmatchcase(layer, case.layers) for layer in self.changed):
            return False
        return all(_rung(format) <= _rung(case.healed_by) for format in self.changed.values())


def trial(case: str, arm: Arm, seed: int, *, steps: int = STEPS) -> Trial:
    """Run one.

    Args:
        case: a name of `CASES`, or "healthy".
        arm: what protects it.
        seed: of weights and batches.
        steps: optimizer steps.
    """
    known: FaultCase | None = None if case == HEALTHY else CASES[case]
    fault = None if known is None else known.make()
    scaling = "fp8-delayed" if known is None else known.scaling
    plugin = None if arm == "high precision" else fault_plugin(scaling)
    with tempfile.TemporaryDirectory() as directory:
        callbacks = _protection(arm, Path(directory))
        run = fault_run(fault, plugin, callbacks, seed=seed, steps=steps)
        return _told(case, arm, seed, run, Path(directory), callbacks)


def _protection(arm: Arm, directory: Path) -> list[L.Callback]:
    if arm == "fallback":
        return [PrecisionFallback(dirpath=directory)]
    if arm == "rollback and skip":
        return [_RollbackAndSkip(dirpath=directory, limit=None, probe_every_n_steps=None)]
    return [_SkipStep()] if arm == "skip-step" else []


class _GoesBack(Watch):
    """Has the run go back whenever a case is opened, without a verdict."""

    def _evidence(self, turn: Any, question: object, answer: object) -> None:
        if not isinstance(question, Survey) or not isinstance(answer, Surveyed):
            return
        step = question.at
        self._sentence.go_back(
            turn, step, answer, Conclusion(finding="unclear", start=answer.start)
        )
        calm = replace(self.fallback.acquitted(turn.state.fallback, step), acquittals=0)
        turn.state = replace(turn.state, inquiry=None, fallback=calm)


class _SkipStep(L.Callback):
    """Leaves out steps that are not finite, and does nothing else."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        plugin = trainer.precision_plugin
        if isinstance(plugin, LayerPrecision):
            plugin.guard = StepGuard()


class _RollbackAndSkip(PrecisionFallback):
    """The control arm: goes back at every suspicion, and never touches a format."""

    machine = _GoesBack


def _told(
    case: str,
    arm: Arm,
    seed: int,
    run: FaultRun,
    directory: Path,
    callbacks: Sequence[L.Callback],
) -> Trial:
    events = read_events(directory) if (directory / "events.jsonl").exists() else []
    changes = [event for event in events if isinstance(event, FormatChange)]
    changed = {layer: after for event in changes for layer, (_, after) in event.formats.items()}
    fallback = next((c for c in callbacks if isinstance(c, PrecisionFallback)), None)
    return Trial(
        case=case,
        arm=arm,
        seed=seed,
        final_loss=run.final_loss,
        held_out_loss=run.held_out_loss,
        changed=changed,
        first_change=changes[0].step if changes else None,
        skipped=sum(isinstance(event, SkippedStep) for event in events),
        rolled_back=sum(e.step - e.to_step for e in events if isinstance(e, Rollback)),
        replayed=0 if fallback is None else fallback.steps.replayed,
    )


def _rung(format: str) -> int:
    """Where a format stands on the ladder; high precision is above it."""
    if format == "high" or linear_format(format).is_high_precision:
        return len(LADDER)
    return LADDER.index(format)
