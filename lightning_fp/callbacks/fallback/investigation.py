"""An investigation: the replays of one incident, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_fp.callbacks.compare.step_replay import StepReplay
from lightning_fp.callbacks.fallback.trajectory import Trajectory, TrajectoryReplay
from lightning_fp.layers import LinearFormat, PrecisionMap
from lightning_fp.plugins import LayerPrecision
from lightning_fp.stability.keep.batch_ring import BatchRing, RecordedStep
from lightning_fp.stability.keep.snapshot import Snapshot
from lightning_fp.stability.replay.one_step import Replay, compare
from lightning_fp.stability.respond.attribution import (
    HEALTHY_ERROR,
    Attribution,
    Attributor,
    gradient_error,
)
from lightning_fp.stability.respond.likely_cause import CauseEvidence, likely_cause
from lightning_fp.stability.respond.probe import FIRST
from lightning_fp.stability.respond.verdict import (
    Anomaly,
    Finding,
    Judgement,
    OneStep,
    judge_one_step,
    judge_trajectory,
)

LEAST_STEPS = 8
"""Steps that a trajectory should have: fewer tell little."""

MOST_PROBED = 2 * FIRST
"""Steps that a probe's suspicion may replay: those to the probe before, and as many again. The
oldest snapshots are older, and each suspicion would replay most of a young run."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an investigation has come to; alike on all ranks."""

    finding: Finding
    one_step: Judgement | None = None
    trajectory: Judgement | None = None

    start: Snapshot | None = None
    """Where the trajectory began, or where the run has to go back to."""

    end: Snapshot | None = None
    """The state that the trajectory in high precision ended in."""

    losses: Sequence[float] = ()
    """Of the trajectory, by step since `start`; NaN for those it left out."""

    made: int = 0
    """Steps of the trajectory that were not left out."""

    attribution: Attribution | None = None
    """Who is to blame, if precision is."""

    likeness: str = ""
    """What it looks like, if precision is not to blame."""

    replayed: int = 0
    """Training steps that were run again, of all kinds."""

    weights_finite: bool = True
    """Whether the weights are, as they stand."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is to be investigated."""

    step: int
    """Optimizer steps so far."""

    onset: int
    """The first anomalous one."""

    anomaly: Anomaly
    healthy_error: float = HEALTHY_ERROR
    """Relative error of the gradients in these formats while the run was healthy."""

    risen: bool = True
    """Whether the loss has risen; if not, the question is whether it could be lower, and the
    trajectory for it begins at most `MOST_PROBED` steps ago, where there is a snapshot since."""

    overflow: str | None = None
    """Why FP16's range seems not to suffice, if that is the question."""


class Investigation:
    """Runs the replays.

    Args:
        trainer: the Trainer, in `fit`, between two optimizer steps.
        plugin: the precision plugin.
        ring: the recorded steps.
        snapshots: those there are, oldest first.
        take: takes a snapshot of the state now.
        restore: goes back to one: model, optimizers, averages.
    """

    def __init__(
        self,
        trainer: Trainer,
        plugin: LayerPrecision,
        ring: BatchRing,
        snapshots: Sequence[Snapshot],
        take: Callable[[], Snapshot],
        restore: Callable[[Snapshot], None],
    ) -> None:
        self._trainer, self._plugin = trainer, plugin
        self._ring, self._snapshots = ring, snapshots
        self._take, self._restore = take, restore
        self._table: PrecisionMap = plugin.precision_map
        self._replayed = 0

    def run(self, case: Case) -> Findings:
        """Both tiers, and the attribution if precision is convicted. The run stays as it is.

        Args:
            case: what is to be investigated.
        """
        start, steps = self._trajectory_of(case)
        finite = self._weights_finite()
        if not finite and start is None:
            reason = "the weights are not finite, and there is no snapshot to go back to"
            unclear = Judgement(finding="unclear", reason=reason, numbers={})
            return Findings(finding="unclear", one_step=unclear, weights_finite=False)
        before: Snapshot | None = None
        if not finite and start is not None:  # nothing can be learned from such weights
            before = self._take()
            self._restore(start)
        try:
            if case.overflow is not None:
                return self._overflow(case.overflow, start, finite)
            return self._run(case, start, steps, finite)
        finally:
            if before is not None:
                self._restore(before)

    def _run(
        self, case: Case, start: Snapshot | None, steps: Sequence[RecordedStep], finite: bool
    ) -> Findings:
        one_step, seen = self._one_step(case.anomaly)
        second, trajectory = self._second_tier(case, start, steps)
        finding = _together(one_step, second)
        attribution: Attribution | None = None
        likeness = ""
        if finding == "precision":
            attribution = self._attribute(case, start)
        else:
            likeness = "the loss does not suffer from the error"
            if case.risen:
                likeness = likely_cause(self._evidence(case, seen, steps))
        return Findings(
            finding=finding,
            one_step=one_step,
            trajectory=second,
            start=start,
            end=trajectory.end,
            losses=trajectory.losses,
            made=trajectory.made,
            attribution=attribution,
            likeness=likeness,
            replayed=self._replayed,
            weights_finite=finite,
        )

    def _overflow(self, reason: str, start: Snapshot | None, finite: bool) -> Findings:
        """Whether the last batch has finite gradients in a format of larger range.

        The overflows themselves are the evidence against FP16, so no trajectory is needed; the
        steps that overflowed were left out, so nothing has to be undone while weights are finite.
        """
        run = self._step_replay(self._ring.last)
        high = None if run is None else self._replay(run, self.all_high())
        finding: Finding = "unclear"
        said = f"{reason}; the batch could not be run in {self._plugin.high_precision.name}"
        numbers: dict[str, float] = {}
        if run is not None and high is not None:
            numbers["high_loss"] = compare(high, high, run.model, self._table).losses[0]
            held = self._is_finite(run, high)
            finding = "precision" if held else "not precision"
            said = f"{reason}; in {self._plugin.high_precision.name} they "
            said += "are finite" if held else "are not finite either"
        return Findings(
            finding=finding,
            one_step=Judgement(finding=finding, reason=said, numbers=numbers),
            start=None if finite else start,
            likeness="" if finding == "precision" else "inf or NaN comes from elsewhere",
            replayed=self._replayed,
            weights_finite=finite,
        )

    def probe(self) -> float | None:
        """Relative error of the last batch's gradients against high precision: two replays.

        Returns:
            inf where only the current formats give inf or NaN; None if nothing can be said.
        """
        run = self._step_replay(self._ring.last)
        current = None if run is None else self._replay(run, {})
        high = None if run is None or current is None else self._replay(run, self.all_high())
        if run is None or current is None or high is None or not self._is_finite(run, high):
            return None
        return gradient_error(compare(current, high, run.model, self._table))

    # -- one step -------------------------------------------------------------------------------

    def _one_step(self, anomaly: Anomaly) -> tuple[Judgement | None, OneStep | None]:
        run = self._step_replay(self._ring.last)
        if run is None:
            return None, None
        seen = self._measure(run)
        return (None, None) if seen is None else (judge_one_step(seen, anomaly), seen)

    def _measure(self, run: StepReplay) -> OneStep | None:
        """Twice in the current formats, for the noise, and once in high precision."""
        current, again = self._replay(run, {}), self._replay(run, {})
        if current is None or again is None:
            return None
        floor = compare(again, current, run.model, self._table).all.error
        del again
        high = self._replay(run, self.all_high())
        if high is None:
            return None
        gap = compare(current, high, run.model, self._table)
        return OneStep(
            loss=gap.losses[0],
            high_loss=gap.losses[1],
            grad_norm_ratio=gap.all.norm_ratio,
            finite=self._is_finite(run, current),
            high_finite=self._is_finite(run, high),
            grad_error=gap.all.error,
            floor=floor if math.isfinite(floor) else 0.0,  # NaN differs from itself
        )

    def _is_finite(self, run: StepReplay, replay: Replay) -> bool:
        """Whether loss and gradients are, on all ranks: x - x is 0 for what is finite."""
        own = compare(replay, replay, run.model, self._table)
        return math.isfinite(own.losses[0]) and math.isfinite(own.all.error)

    def _step_replay(self, step: RecordedStep | None) -> StepReplay | None:
        if step is None or not step.micro_batches:
            return None
        micro = step.micro_batches[0]
        position = dict(micro.position)
        run = StepReplay(
            self._trainer, self._table, micro.batch, micro.batch_idx, micro.rng, position
        )
        return run if run.possible else None

    def _replay(self, run: StepReplay, formats: Mapping[str, LinearFormat]) -> Replay | None:
        self._replayed += 1
        replay = run(formats)
        return replay if replay.outcome == "done" else None

    def all_high(self) -> dict[str, LinearFormat]:
        """Every layer in low precision, in high precision."""
        return dict.fromkeys(self._plugin.low_layers(), self._plugin.high_precision)

    # -- trajectory -----------------------------------------------------------------------------

    def _trajectory_of(self, case: Case) -> tuple[Snapshot | None, Sequence[RecordedStep]]:
        """The newest snapshot from before the anomaly, and all steps since."""
        wanted = min(case.onset, case.step - LEAST_STEPS)
        snapshots = list(self._snapshots)
        if not case.risen:
            first = case.step - MOST_PROBED
            snapshots = [s for s in snapshots if s.step >= first] or snapshots[-1:]
        before = [s for s in snapshots if s.step <= wanted]
        order = [*reversed(before), *(s for s in snapshots if s.step > wanted)]
        for snapshot in order:
            steps = self._ring.since(snapshot.step)
            if steps:
                return snapshot, steps
        return (order[0] if order else None), []

    def _second_tier(
        self, case: Case, start: Snapshot | None, steps: Sequence[RecordedStep]
    ) -> tuple[Judgement | None, Trajectory]:
        nothing = Trajectory(outcome="failed")
        if start is None or not steps:
            return None, nothing
        replay = TrajectoryReplay(self._trainer, self._plugin, self._take, self._restore)
        trajectory = replay(start, steps, self.all_high(), give_up=_hopeless)
        self._replayed += len(trajectory.losses)
        if trajectory.outcome != "done":
            reason = "memory does not suffice for a replay in high precision"
            return Judgement(finding="unclear", reason=reason, numbers={}), trajectory
        # The last step's loss may still be on its way from the device, which says nothing; a step
        # that was left out says much.
        losses = [math.nan if step.skipped else step.loss for step in steps]
        anomaly = case.anomaly if case.risen else Anomaly()
        return judge_trajectory(losses, trajectory.losses, anomaly), trajectory

    # -- who, and what else ---------------------------------------------------------------------

    def _attribute(self, case: Case, start: Snapshot | None) -> Attribution | None:
        """On the weights of now; if those have adapted to the fault, on those before it."""
        run = None if self._plugin.falls_back_whole else self._step_replay(self._ring.last)
        if run is None:
            return None
        found = self._attribution(run, case.healthy_error)
        if (found is None or not found.culprits) and start is not None:
            before = self._take()
            self._restore(start)
            try:
                earlier = self._attribution(run, case.healthy_error)
            finally:
                self._restore(before)
            found = earlier if earlier is not None and earlier.culprits else found
        return found

    def _attribution(self, run: StepReplay, healthy: float) -> Attribution | None:
        high = self._plugin.high_precision
        found = Attributor(run, run.model, self._table, high).attribute(healthy)
        self._replayed += 0 if found is None else found.replays
        return found

    def _evidence(
        self, case: Case, seen: OneStep | None, steps: Sequence[RecordedStep]
    ) -> CauseEvidence:
        oldest = self._ring.first
        older = self._older(oldest)
        return CauseEvidence(
            floor=None if seen is None else seen.floor,
            high_finite=seen is None or seen.high_finite,
            older_finite=older is None or math.isfinite(older),
            older_loss=older,
            older_loss_then=None if oldest is None else oldest.loss,
            noise=case.anomaly.noise,
            rates=[_rate(step) for step in steps],
        )

    def _older(self, step: RecordedStep | None) -> float | None:
        run = self._step_replay(step)
        replay = None if run is None else self._replay(run, self.all_high())
        if run is None or replay is None:
            return None
        loss = compare(replay, replay, run.model, self._table).losses[0]
        return loss if self._is_finite(run, replay) else math.nan

    def _weights_finite(self) -> bool:
        module = self._trainer.lightning_module
        with torch.no_grad():
            parameters: list[Any] = list(module.parameters())
            tensors = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
            wide = {True: torch.complex64, False: torch.float32}
            sums = [t.sum(dtype=wide[t.is_complex()]).abs() for t in tensors]
            finite = bool(torch.isfinite(torch.stack(sums)).all()) if sums else True
        return bool(self._trainer.strategy.reduce_boolean_decision(finite, all=True))


def _together(one_step: Judgement | None, trajectory: Judgement | None) -> Finding:
    """The trajectory weighs more; one step alone acquits only where there is no trajectory."""
    first = "unclear" if one_step is None else one_step.finding
    if trajectory is None:
        return first
    second = trajectory.finding
    if second == "unclear":
        return first if first == "precision" else "unclear"
    return "unclear" if (first, second) == ("precision", "not precision") else second


def _hopeless(losses: Sequence[float]) -> bool:
    """Whether high precision has met nothing but inf or NaN for a while."""
    return len(losses) >= LEAST_STEPS and not any(map(math.isfinite, losses[-LEAST_STEPS:]))


def _rate(step: RecordedStep) -> float:
    """The learning rate of the first parameter group."""
    groups = step.hyperparameters[0] if step.hyperparameters else []
    return float(groups[0].get("lr", 0.0)) if groups else 0.0
