"""The steps since a snapshot once more, in other formats: the second tier of the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_fp.callbacks.compare.step_replay import copied, muted, replaced
from lightning_fp.callbacks.fallback.run_state import set_hyperparameters
from lightning_fp.layers import LinearFormat
from lightning_fp.plugins import LayerPrecision
from lightning_fp.stability import untouched
from lightning_fp.stability.keep.batch_ring import RecordedStep
from lightning_fp.stability.keep.snapshot import Snapshot
from lightning_fp.stability.replay.one_step import is_out_of_memory

Outcome = Literal["done", "out of memory", "failed"]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a stretch of training came to in other formats."""

    outcome: Outcome
    losses: Sequence[float] = ()
    """By step, mean over micro-batches and ranks."""

    made: int = 0
    """Optimizer steps that were not left out."""

    end: Snapshot | None = None
    """The state it ended in."""


class TrajectoryReplay:
    """Trains on from a snapshot with the recorded batches, and leaves the run as it was.

    Every batch gets the random state, the learning rates and the momenta of its time; logs are
    mute, schedulers do not step, formats cannot change in between. What a training step does
    besides, in Python, it does again.

    Args:
        trainer: the Trainer, in `fit`, between two optimizer steps.
        plugin: the precision plugin.
        take: takes a snapshot of the state now.
        restore: goes back to one: model, optimizers and averages.
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
        self._made = 0
        self._given: list[Tensor] = []

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
        try:
            with untouched(model), self._plugin.precision_map.overridden(formats), self._quiet():
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
            for parameter in model.parameters():
                parameter.grad = None  # of the step before, which has been made
        return Trajectory(outcome=outcome, losses=losses, made=self._made, end=end)

    def _quiet(self) -> AbstractContextManager[object]:
        """No logs, no schedulers, no hooks, and the guard keeps no record."""
        trainer, plugin = self._trainer, self._plugin
        stack = ExitStack()
        stack.enter_context(muted(trainer))
        stack.enter_context(plugin.replaying())
        if plugin.guard is not None:
            stack.enter_context(replaced(plugin.guard, replaying=True))
        for config in trainer.lr_scheduler_configs:
            stack.enter_context(replaced(config.scheduler, step=lambda *_, **__: None))
        if not trainer.lightning_module.automatic_optimization:
            stack.enter_context(replaced(trainer.strategy, backward=self._backward))
        return stack

    def _backward(self, loss: Tensor, optimizer: object, *args: Any, **kwargs: Any) -> Tensor:
        """In manual optimization: backward without the callbacks' hooks."""
        self._given.append(loss.detach().float())
        self._plugin.backward(loss, self._trainer.lightning_module, None, *args, **kwargs)
        return loss.detach()

    def _step(self, step: RecordedStep) -> float:
        """One optimizer step, of all its micro-batches; its loss as `StepRecord` has it.

        NaN if the step was left out.
        """
        self._given.clear()
        trainer = self._trainer
        for optimizer, groups in zip(trainer.optimizers, step.hyperparameters, strict=True):
            set_hyperparameters(optimizer, groups)
        automatic = trainer.lightning_module.automatic_optimization
        losses: list[Tensor] = []
        if automatic:
            trainer.optimizers[0].zero_grad()
        for index, batch in enumerate(step.micro_batches):
            batch.rng.restore()
            last = index == len(step.micro_batches) - 1
            hold = automatic and not last and isinstance(trainer.strategy, ParallelStrategy)
            with trainer.strategy.block_backward_sync() if hold else nullcontext():  # pyright: ignore
                loss = self._micro_batch(batch.batch, batch.batch_idx)
            if loss is not None:
                losses.append(loss)
        if automatic:
            self._optimizer_step()
        guard = self._plugin.guard
        if guard is not None and guard.replay_skipped:
            return math.nan
        self._made += 1
        self._average(step.step)
        if self._given:
            return float(torch.stack(self._given).sum())
        return float(torch.stack(losses).mean()) if losses else math.nan

    def _micro_batch(self, batch: Any, index: int) -> Tensor | None:
        trainer = self._trainer
        module = trainer.lightning_module
        on_device = trainer.strategy.batch_to_device(tree_map(copied, batch))
        arguments = [on_device]
        if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
            arguments.append(index)
        output = trainer.strategy.training_step(*arguments)
        loss: Tensor | None = output.get("loss") if isinstance(output, Mapping) else output  # pyright: ignore
        if loss is not None and module.automatic_optimization:
            self._plugin.backward(loss / trainer.accumulate_grad_batches, module, None)
        return None if loss is None else loss.detach()

    def _optimizer_step(self) -> None:
        trainer = self._trainer
        optimizer, module = trainer.optimizers[0], trainer.lightning_module
        guard = self._plugin.guard
        if guard is None:
            raise RuntimeError("a trajectory needs the guard")
        guard.step(self._plugin, optimizer, module, lambda: None)

    def _average(self, step: int) -> None:
        """Averages of the weights go along."""
        callbacks: list[Any] = list(self._trainer.callbacks)  # pyright: ignore
        for callback in callbacks:
            if isinstance(callback, WeightAveraging) and callback.should_update(step_idx=step):
                average: Any = callback._average_model
                average.update_parameters(self._trainer.lightning_module)

    def _mean(self, loss: float) -> float:
        if self._trainer.world_size == 1:
            return loss
        value = torch.tensor(loss, device=self._trainer.strategy.root_device)
        return float(self._trainer.strategy.reduce(value, reduce_op="mean"))  # pyright: ignore
