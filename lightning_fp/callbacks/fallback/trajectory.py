"""The steps since a snapshot once more, in other formats: the second tier of the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import Trainer

from lightning_fp.callbacks.compare.loop_position import before_batch
from lightning_fp.callbacks.compare.loop_replay import (
    LoopReplay,
    heard_backward,
    replaced,
    written_by_hooks,
)
from lightning_fp.layers import LinearFormat
from lightning_fp.plugins import LayerPrecision
from lightning_fp.plugins.guard import set_hyperparameters
from lightning_fp.stability import untouched
from lightning_fp.stability.keep.batch_ring import RecordedStep
from lightning_fp.stability.keep.snapshot import Snapshot
from lightning_fp.stability.replay.one_step import is_out_of_memory
from lightning_fp.telemetry import StepRecorder

Outcome = Literal["done", "out of memory", "failed"]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a stretch of training came to in other formats."""

    outcome: Outcome
    losses: Sequence[float] = ()
    """By step, of its micro-batches as `StepRecord` has it, mean over ranks."""

    made: int = 0
    """Optimizer steps that were not left out."""

    end: Snapshot | None = None
    """The state it ended in."""


class TrajectoryReplay:
    """Trains on from a snapshot with the recorded batches, and leaves the run as it was.

    Every batch goes its whole way from the loader to the end of the batch, through all hooks and
    overrides, with the random state, the learning rates and momenta, and the loops' counters of its
    time. Logs are mute, schedulers do not step, formats cannot change in between. What hooks do
    besides to other objects than themselves, they do again.

    Args:
        trainer: the Trainer, in `fit`, between two optimizer steps.
        plugin: the precision plugin.
        take: takes a snapshot of the state now.
        restore: goes back to one: model, optimizers, averages and plain attributes.
    """

    def __init__(
        self,
        trainer: Trainer,
        plugin: LayerPrecision,
        take: Callable[[], Snapshot],
        restore: Callable[[Snapshot], None],
    ) -> None:
        self._trainer, self._plugin = trainer, plugin
        self._take, self._restore = take, restore
        self._loop = LoopReplay(trainer, steps=True)
        self._made = 0
        self._record = StepRecorder()

    def __call__(
        self,
        start: Snapshot,
        steps: Sequence[RecordedStep],
        formats: Mapping[str, LinearFormat],
        *,
        give_up: Callable[[Sequence[float]], bool] = lambda _: False,
    ) -> Trajectory:
        """Run the steps; call it alike on all ranks.

        Args:
            start: where to begin.
            steps: the steps since then, in order.
            formats: by layer; the others keep theirs.
            give_up: looks at the losses so far and may end it.

        Returns:
            Losses and the state it ended in. The run is back where it was.
        """
        model = self._trainer.strategy.model
        if model is None:
            raise RuntimeError("a trajectory can be replayed only during fit")
        before = self._take()
        losses: list[float] = []
        end: Snapshot | None = None
        outcome: Outcome = "done"
        self._made = 0
        others = written_by_hooks(self._trainer)
        formats_then = self._plugin.precision_map.overridden(formats)
        try:
            with (
                untouched(model, others),
                formats_then,
                self._loop.conditions(),
                self._guarded(),
                heard_backward(self._trainer, self._record.backward),
            ):
                self._restore(start)
                for step in steps:
                    losses.append(self._mean(self._step(step)))
                    if give_up(losses):
                        break
                end = self._take()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            outcome = "out of memory"
        finally:
            self._restore(before)
        return Trajectory(outcome=outcome, losses=losses, made=self._made, end=end)

    def _guarded(self) -> AbstractContextManager[object]:
        """The guard keeps no record."""
        guard = self._plugin.guard
        if guard is None:
            raise RuntimeError("a trajectory needs the guard")
        return replaced(guard, replaying=True, replay_skipped=False, replay_hyperparameters=None)

    def _step(self, step: RecordedStep) -> float:
        """One optimizer step, of all its micro-batches; its loss as `StepRecord` has it.

        NaN if the step was left out.
        """
        trainer, guard = self._trainer, self._plugin.guard
        self._record.begin(step.step)
        for optimizer, groups in zip(trainer.optimizers, step.begun_with, strict=True):
            set_hyperparameters(optimizer, groups)
        automatic = trainer.lightning_module.automatic_optimization
        if guard is not None:
            guard.replay_skipped = False
            guard.replay_hyperparameters = step.hyperparameters[0] if automatic else None
        for micro in step.micro_batches:
            micro.rng.restore()
            position = before_batch(dict(micro.position), micro.batch_idx)
            loss = self._loop.run(micro.batch, position)
            self._record.micro_batch(loss, trainer.accumulate_grad_batches if automatic else 1)
        record = self._record.end(step.step + 1)
        if guard is not None and guard.replay_skipped:
            return math.nan
        self._made += 1
        return math.nan if record is None or record.loss is None else float(record.loss)

    def _mean(self, loss: float) -> float:
        if self._trainer.world_size == 1:
            return loss
        value = torch.tensor(loss, device=self._trainer.strategy.root_device)
        return float(self._trainer.strategy.reduce(value, reduce_op="mean"))  # pyright: ignore
