"""The Trainer as a loop whose steps can be made again."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.callbacks.compare.loop_position import before_batch
from lightning_fp.callbacks.compare.loop_replay import (
    LoopReplay,
    heard_backward,
    written_by_hooks,
)
from lightning_fp.callbacks.compare.step_replay import StepReplay, replayable
from lightning_fp.callbacks.fallback.rehearsed_state import fingerprint_of, watched_hooks
from lightning_fp.callbacks.fallback.trainer_state import state_of
from lightning_fp.callbacks.run.replaced import replaced
from lightning_fp.layers.regions import compiled_regions
from lightning_fp.plugins import LayerPrecision
from lightning_fp.plugins.guard import StepGuard
from lightning_fp.stability.keep.batch_ring import RecordedStep
from lightning_fp.stability.keep.hyperparameters import set_hyperparameters
from lightning_fp.stability.replay.fingerprint import Fingerprint, Item
from lightning_fp.stability.replay.loop import MadeStep, Train
from lightning_fp.stability.replay.parity import Run
from lightning_fp.stability.supervise.supervised_loop import TableLoop
from lightning_fp.telemetry import StepRecorder

FROM_LOADER = "training_step takes its batches out of the loader itself"
"""Why nothing can be replayed then; see `dataloader_iter` of Lightning."""


class TrainerLoop(TableLoop):
    """The Trainer's `SupervisedLoop`.

    Every batch goes its whole way from the loader to the end of the batch, through all hooks and
    overrides, with the random state, the learning rates and momenta, and the loops' counters of its
    time. Logs are mute, schedulers do not step, formats cannot change in between. What hooks do
    besides to other objects than themselves, they do again.

    Args:
        trainer: the Trainer, in `fit`, between two optimizer steps.
        plugin: the precision plugin.
    """

    def __init__(self, trainer: Trainer, plugin: LayerPrecision) -> None:
        super().__init__(plugin)
        self._trainer, self._plugin = trainer, plugin
        self.state = state_of(trainer, plugin)
        """See `SupervisedLoop.state`."""
        self._loop = LoopReplay(trainer, steps=True)

    @property
    @override
    def model(self) -> nn.Module:
        """What the strategy trains."""
        model = self._trainer.strategy.model
        if model is None:
            raise RuntimeError("steps can be replayed only during fit")
        return model

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """See `SupervisedLoop.optimizers`."""
        return self._trainer.optimizers

    @property
    def overflowed(self) -> Mapping[int, str]:
        """See `SupervisedLoop.overflowed`; by `global_step`."""
        guard = self._plugin.guard
        return {} if guard is None else guard.overflowed

    @property
    def own_gradients(self) -> bool:
        """See `SupervisedLoop.own_gradients`."""
        trainer = self._trainer
        alone = trainer.world_size == 1 and trainer.accumulate_grad_batches == 1
        plain = trainer.lightning_module.automatic_optimization and self._plugin.scaler is None
        return alone and plain and not compiled_regions(self.model, self.table.layers)

    @property
    def compiled(self) -> bool:
        """See `Loop.compiled`; a compiled function shows only in what was compiled at all."""
        dynamo = sys.modules.get("torch._dynamo")
        graphs = 0 if dynamo is None else dynamo.utils.counters["stats"]["unique_graphs"]
        return graphs > 0 or bool(compiled_regions(self.model, self.table.layers))

    def replay(
        self, step: RecordedStep, *, backward: bool = True, recompute: bool = True
    ) -> Run | None:
        """See `Loop.replay`."""
        micro = step.micro_batches[0]
        run = StepReplay(
            self._trainer,
            self.table,
            micro.batch,
            micro.batch_idx,
            micro.rng,
            dict(micro.position),
            backward=backward,
        )
        if not run.possible:
            return None
        return self.recomputation.run(run) if recompute else run

    @property
    @override
    def _written(self) -> Sequence[object]:
        return written_by_hooks(self._trainer)

    @contextmanager
    @override
    def _making(self) -> Generator[Train, None, None]:
        guard = self._plugin.guard
        if guard is None:
            raise RuntimeError("steps can be made again only where a guard leaves out bad ones")
        quiet = replaced(guard, replaying=True, replay_skipped=False, replay_hyperparameters=None)
        stretch = _Stretch(self._trainer, self._loop, guard)
        with self._loop.conditions(), quiet, stretch.heard():
            yield stretch.step

    def mean(self, value: float) -> float:
        """See `Loop.mean`."""
        if self._trainer.world_size == 1:
            return value
        device = self._trainer.strategy.root_device
        tensor = torch.tensor(value, device=device)
        return float(self._trainer.strategy.reduce(tensor, reduce_op="mean"))  # pyright: ignore

    def all(self, true: bool) -> bool:
        """See `Loop.all`."""
        return bool(self._trainer.strategy.reduce_boolean_decision(true, all=True))

    def unreplayable(self) -> str:
        """See `SupervisedLoop.unreplayable`."""
        return "" if replayable(self._trainer.lightning_module) else FROM_LOADER

    def fingerprint(self, wanted: Callable[[Item], bool] = lambda _: True) -> Fingerprint:
        """See `SupervisedLoop.fingerprint`."""
        return fingerprint_of(self._trainer, self._plugin, wanted)

    def hooks(
        self, wanted: Callable[[Item], bool]
    ) -> AbstractContextManager[dict[Item, tuple[str, str]]]:
        """See `SupervisedLoop.hooks`."""
        return watched_hooks(self._trainer, self._plugin, wanted)


class _Stretch:
    """Makes recorded steps again, one after the other."""

    def __init__(self, trainer: Trainer, loop: LoopReplay, guard: StepGuard) -> None:
        self._trainer, self._loop, self._guard = trainer, loop, guard
        self._record = StepRecorder()

    def heard(self) -> AbstractContextManager[object]:
        """In manual optimization the losses are heard in backward."""
        return heard_backward(self._trainer, self._record.backward)

    def step(self, step: RecordedStep) -> MadeStep:
        """All micro-batches of a step; its loss as `StepRecord` has it."""
        trainer, guard = self._trainer, self._guard
        self._record.begin(step.step)
        for optimizer, groups in zip(trainer.optimizers, step.begun_with, strict=True):
            set_hyperparameters(optimizer, groups)
        automatic = trainer.lightning_module.automatic_optimization
        guard.replay_skipped = False
        guard.replay_hyperparameters = step.hyperparameters[0] if automatic else None
        for micro in step.micro_batches:
            micro.rng.restore()
            position = before_batch(dict(micro.position), micro.batch_idx)
            loss = self._loop.run(micro.batch, position)
            self._record.micro_batch(loss, trainer.accumulate_grad_batches if automatic else 1)
        record = self._record.end(step.step + 1)
        if guard.replay_skipped or record is None or record.loss is None:
            return MadeStep(math.nan, not guard.replay_skipped)
        return MadeStep(float(record.loss), True)
