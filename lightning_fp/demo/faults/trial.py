"""Trials: a fault, an arm that has to cope with it, and what came of it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from lightning_fp.callbacks import PrecisionFallback
from lightning_fp.demo.faults.cases import CASES, FaultCase
from lightning_fp.demo.faults.run import STEPS, FaultRun, fault_plugin, fault_run
from lightning_fp.layers import linear_format
from lightning_fp.records.events import FormatChange, Rollback, SkippedStep, read_events
from lightning_fp.stability.respond.ladder import LADDER

Arm = Literal["high precision", "unprotected", "fallback"]
"""What a run is protected by: nothing to protect, nothing, the fallback. Rivals are in
`benchmarks/proof/arms.py`."""

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
        fallback = PrecisionFallback(dirpath=directory) if arm == "fallback" else None
        watching = [] if fallback is None else [fallback]
        run = fault_run(fault, plugin, watching, seed=seed, steps=steps)
        return _told(case, arm, seed, run, Path(directory), fallback)


def _told(
    case: str,
    arm: Arm,
    seed: int,
    run: FaultRun,
    directory: Path,
    fallback: PrecisionFallback | None,
) -> Trial:
    events = read_events(directory) if (directory / "events.jsonl").exists() else []
    changes = [event for event in events if isinstance(event, FormatChange)]
    changed = {layer: after for event in changes for layer, (_, after) in event.formats.items()}
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
