"""Answers what the watch asks, by replays. All of them leave the run as it was.

A replay that raises is an answer too: the watch goes on without it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from lightning_fp.layers import LinearFormat
from lightning_fp.layers.stored import is_stored
from lightning_fp.shown import a_kind
from lightning_fp.stability.keep.batch_ring import BatchRing, RecordedStep
from lightning_fp.stability.keep.snapshot import Snapshot
from lightning_fp.stability.keep.snapshots import Snapshots
from lightning_fp.stability.questions import (
    Answer,
    Attribute,
    Attributed,
    CheckCure,
    CompareLosses,
    CureChecked,
    Failed,
    HighReplayed,
    LossesCompared,
    Probed,
    ProbeStep,
    Question,
    ReplayHigh,
    ReplayStep,
    ReplayStretch,
    StepReplayed,
    StretchReplayed,
    Survey,
    Surveyed,
)
from lightning_fp.stability.replay.budget import FORWARD
from lightning_fp.stability.replay.gap import BATCHES
from lightning_fp.stability.replay.loop import Loop
from lightning_fp.stability.replay.one_step import Replay, compare
from lightning_fp.stability.replay.parity import Run
from lightning_fp.stability.replay.rehearsal import Outcome
from lightning_fp.stability.replay.trajectory import LEAST_STEPS, Trajectory, replay_trajectory
from lightning_fp.stability.respond.attribution import Attributor, gradient_error
from lightning_fp.stability.respond.verdict import OneStep

log = logging.getLogger("lightning_fp.fallback")

T = TypeVar("T")


class Answers:
    """Runs the replays.

    Args:
        loop: the training loop, between two optimizer steps.
        ring: the recorded steps.
        snapshots: those there are.
    """

    def __init__(self, loop: Loop, ring: BatchRing, snapshots: Snapshots) -> None:
        self._loop, self._ring, self._snapshots = loop, ring, snapshots
        self.reach: Outcome = "passed"
        """What the rehearsal has shown may be replayed."""
        self.trajectories: dict[ReplayStretch, Trajectory] = {}
        """What can become the run, by what was asked; of the case that is open."""

    def __call__(self, question: Question[Any]) -> Answer:
        """What a question comes to; alike on all ranks, but for what fails on one of them."""
        return _tried(lambda: self._answer(question))

    def _answer(self, question: Question[Any]) -> Answer:
        match question:
            case Survey():
                return self._survey(question)
            case ReplayStep(weights=weights, batch=batch, ago=ago):
                steps = self._batches(1, batch) if batch is not None else self._ago(ago)
                with self._on(weights):
                    return self._replay_step(steps)
            case CompareLosses(count=count, batch=batch):
                return self._compare_losses(self._batches(count, batch))
            case ReplayHigh(batch=batch, weights=weights):
                with self._on(weights):
                    return self._replay_high(
                        self._ring.last if batch == "last" else self._ring.first
                    )
            case ReplayStretch():
                return self._replay_stretch(question)
            case Attribute(healthy=healthy, weights=weights):
                with self._on(weights):
                    return self._attribute(healthy, self._shown(question))
            case ProbeStep(ago=ago):
                steps = self._ago(ago)
                return self._probe(step=steps[0]) if steps else Probed(error=None)
            case CheckCure(layers=layers, batch=batch):
                return self._check_cure(layers, batch)
            case _:
                raise TypeError(f"no replay answers {a_kind(question)}")

    # -- what there is --------------------------------------------------------------------------

    def _survey(self, question: Survey) -> Surveyed:
        # Their ends are whole snapshots: those of the case before are let go.
        self.trajectories.clear()
        loop = self._loop
        layers = loop.table.layers
        start = trajectory_start(
            self._snapshots.kept[::-1],
            lambda step: bool(self._ring.since(step)),
            onset=question.onset,
            at=question.at,
            most=None if question.risen else question.most,
        )
        steps: Sequence[RecordedStep] | None = None
        if start is not None and self.reach == "passed":
            steps = self._ring.since(start.step)
        return Surveyed(
            finite=self._weights_finite(),
            low={name: layers[name].format.name for name in loop.low()},
            high=loop.high,
            whole=loop.whole,
            compiled=loop.compiled,
            stored=sum(map(is_stored, layers.values())),
            start=None if start is None else start.step,
            # The last step's loss may still be on its way from the device, which says nothing; a
            # step that was left out says much.
            losses=None
            if steps is None
            else tuple(math.nan if step.skipped else step.loss for step in steps),
            rates=tuple(map(_rate, steps or [])),
            skipped=sum(step.skipped for step in steps or []),
            steps=tuple(step.step for step in steps or []),
            replayable=self.replayable,
        )

    @property
    def replayable(self) -> bool:
        """Whether batches are recorded, and the rehearsal lets them be run again."""
        last = self._ring.last
        return self.reach != "limits only" and (last is None or bool(last.micro_batches))

    def _weights_finite(self) -> bool:
        with torch.no_grad():
            parameters: list[Any] = list(self._loop.model.parameters())
            tensors = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
            # One sum for each tensor, which inf and NaN survive, and one wait for all of them.
            wide = {True: torch.complex64, False: torch.float32}
            sums = [t.sum(dtype=wide[t.is_complex()]).abs() for t in tensors]
            finite = bool(torch.isfinite(torch.stack(sums)).all()) if sums else True
        return self._loop.all(finite)

    @contextmanager
    def _on(self, step: int | None) -> Generator[None, None, None]:
        """On the weights of a snapshot for a while; None keeps those of now."""
        if step is None:
            yield
            return
        before = self._loop.take()
        self._loop.restore(self._snapshot(step))
        try:
            yield
        finally:
            self._loop.restore(before)

    def _snapshot(self, step: int) -> Snapshot:
        return next(snapshot for snapshot in self._snapshots.kept if snapshot.step == step)

    def _all_high(self) -> dict[str, LinearFormat]:
        return dict.fromkeys(self._loop.low(), self._loop.high)

    # -- one batch ------------------------------------------------------------------------------

    def _run(self, step: RecordedStep | None, *, backward: bool = True) -> Run | None:
        if step is None or not step.micro_batches or self.reach == "limits only":
            return None
        return self._loop.replay(step, backward=backward)

    def in_high_precision(self, step: RecordedStep | None) -> Replay | Failed | None:
        """Forward and backward of a step's first micro-batch; None where that is impossible."""

        def replay() -> Replay | None:
            run = self._run(step)
            return None if run is None else _done(run(self._all_high()))

        return _tried(replay)

    def _replay_step(self, steps: Sequence[RecordedStep]) -> StepReplayed:
        """The last of them, twice in the current formats, for the noise, once in high precision."""
        run = self._run(steps[-1] if steps else None)
        if run is None:
            return StepReplayed(seen=None)
        current, again = _done(run({})), _done(run({}))
        if current is None or again is None:
            return StepReplayed(seen=None, replays=2)
        floor = self._compare(again, current).all.error
        del again
        high = _done(run(self._all_high()))
        if high is None:
            return StepReplayed(seen=None, replays=3)
        gap = self._compare(current, high)
        seen = OneStep(
            loss=gap.losses[0],
            high_loss=gap.losses[1],
            grad_norm_ratio=gap.all.norm_ratio,
            finite=self._is_finite(current),
            high_finite=self._is_finite(high),
            grad_error=gap.all.error,
            worst_error=gradient_error(gap),
            high_norm=gap.all.norm,
            floor=floor if math.isfinite(floor) else 0.0,  # NaN differs from itself
        )
        return StepReplayed(seen=seen, replays=3)

    def _batches(self, count: int, step: int | None) -> list[RecordedStep]:
        """The last ones; or that of one step."""
        if step is None:
            return self._ring.latest(count)
        found = self._ring.find(step)
        return [] if found is None else [found]

    def _ago(self, count: int) -> list[RecordedStep]:
        """The one so many before the last; none if there are not so many."""
        return self._ring.latest(1 + count)[: -count or None][-1:]

    def _compare_losses(
        self, steps: Sequence[RecordedStep], formats: Mapping[str, LinearFormat] | None = None
    ) -> LossesCompared:
        """Forward; in `formats`, or in those of the run."""
        losses: list[float] = []
        high_losses: list[float] = []
        for step in steps:
            run = self._run(step, backward=False)
            low = None if run is None else _done(run(formats or {}))
            high = None if run is None or low is None else _done(run(self._all_high()))
            if low is None or high is None or low.loss is None or high.loss is None:
                break
            losses.append(self._loop.mean(float(low.loss)))
            high_losses.append(self._loop.mean(float(high.loss)))
        return LossesCompared(
            losses=tuple(losses),
            high_losses=tuple(high_losses),
            replays=math.ceil(2 * FORWARD * len(losses)),
        )

    def _check_cure(self, layers: Sequence[str], batch: int | None) -> CureChecked:
        shown = [] if batch is None else self._batches(1, batch)
        steps = [*shown, *self._ring.latest(BATCHES - len(shown))]
        alone = {n: f for n, f in self._all_high().items() if n not in set(layers)}
        seen = self._compare_losses(steps, alone)
        probed = self._probe(alone, steps[0] if shown else None)
        return CureChecked(
            losses=seen.losses,
            high_losses=seen.high_losses,
            grad_error=probed.error,
            replays=seen.replays + probed.replays,
        )

    def _replay_high(self, step: RecordedStep | None) -> HighReplayed:
        run = self._run(step)
        if run is None or step is None:
            return HighReplayed()
        high = _done(run(self._all_high()))
        if high is None:
            return HighReplayed(replays=1)
        loss = self._compare(high, high).losses[0]
        finite = self._is_finite(high)
        return HighReplayed(loss=loss, finite=finite, loss_then=step.loss, replays=1)

    def _probe(
        self,
        formats: Mapping[str, LinearFormat] | None = None,
        step: RecordedStep | None = None,
    ) -> Probed:
        """inf where only the current formats give inf or NaN; None if nothing can be said."""
        run = self._run(step or self._ring.last)
        current = None if run is None else _done(run(formats or {}))
        high = None if run is None or current is None else _done(run(self._all_high()))
        if current is None or high is None:
            return Probed(error=None)
        seen = self._compare(current, high)
        if not seen.finite:
            return Probed(error=None, replays=2)
        error = gradient_error(seen)
        return Probed(error=error, losses=seen.losses, norm=seen.all.norm, replays=2)

    def _shown(self, question: Attribute) -> list[RecordedStep]:
        """The batches that may show who is at fault, the last one last."""
        found = [self._ring.find(step) for step in question.batches]
        last = None if question.alone and any(found) else self._ring.last
        steps = {step.step: step for step in (*found, last) if step is not None}
        return list(steps.values())

    def _attribute(self, healthy: float, steps: Sequence[RecordedStep]) -> Attributed:
        runs = [run for step in steps if (run := self._run(step)) is not None]
        if not runs:
            return Attributed(found=None)
        loop = self._loop
        found = Attributor(runs, loop.model, loop.table, loop.high).attribute(healthy)
        return Attributed(found=found, replays=0 if found is None else found.replays)

    def _compare(self, one: Replay, other: Replay) -> Any:
        return compare(one, other, self._loop.model, self._loop.table)

    def _is_finite(self, replay: Replay) -> bool:
        """Whether loss and gradients are, on all ranks: x - x is 0 for what is finite."""
        own = self._compare(replay, replay)
        return math.isfinite(own.losses[0]) and math.isfinite(own.all.error)

    # -- many steps -----------------------------------------------------------------------------

    def _replay_stretch(self, question: ReplayStretch) -> StretchReplayed:
        steps = (self._ring.since(question.start) or [])[: question.steps]
        formats = self._all_high() if question.precision == "high" else None
        high = () if question.until is None else self.trajectories[question.until].losses
        made = replay_trajectory(
            self._loop,
            self._snapshot(question.start),
            steps,
            formats,
            compiled=question.compiled,
            placebo=question.precision == "placebo",
            # only what has run as the rehearsal did, eagerly, can become the run
            keep_end=question.precision == "high" and not question.compiled,
            against=high,
        )
        self.trajectories[question] = made
        return StretchReplayed(
            done=made.outcome == "done",
            losses=tuple(made.losses),
            made=made.made,
            replays=len(made.losses),
        )


def trajectory_start(
    snapshots: Sequence[Snapshot],
    has_steps: Callable[[int], bool],
    *,
    onset: int,
    at: int,
    most: int | None = None,
) -> Snapshot | None:
    """The newest snapshot from before the anomaly with all steps since; None if there is none.

    Args:
        snapshots: those there are, oldest first.
        has_steps: whether all steps since one are recorded.
        onset: the first anomalous step.
        at: steps so far.
        most: steps that the trajectory may have, where there is a snapshot since; None: as many
            as it takes, since the loss has risen.

    Returns:
        The best there is: without recorded steps one can still go back to it.
    """
    wanted = min(onset, at - LEAST_STEPS)
    if most is not None:
        recent = [snapshot for snapshot in snapshots if snapshot.step >= at - most]
        snapshots = recent or snapshots[-1:]
    before = [snapshot for snapshot in snapshots if snapshot.step <= wanted]
    order = [*reversed(before), *(snapshot for snapshot in snapshots if snapshot.step > wanted)]
    first = order[0] if order else None
    return next((snapshot for snapshot in order if has_steps(snapshot.step)), first)


def _tried(replay: Callable[[], T]) -> T | Failed:
    try:
        return replay()
    except Exception as failure:
        log.warning("an investigation failed: %s", failure, exc_info=failure)
        return Failed(error=str(failure))


def _done(replay: Replay) -> Replay | None:
    return replay if replay.outcome == "done" else None


def _rate(step: RecordedStep) -> float:
    """The learning rate of the first parameter group."""
    groups = step.hyperparameters[0] if step.hyperparameters else []
    return float(groups[0].get("lr", 0.0)) if groups else 0.0
