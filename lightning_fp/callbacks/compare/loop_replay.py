"""A recorded batch once more through Lightning's own training loop.

The loop's `advance` itself is run, so that a replay takes the batch's whole way in the order of the
Lightning that is installed: `convert_input`, the transfer hooks, every hook and override of the
LightningModule, and the hooks of the user's callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_fp.callbacks.compare.loop_position import Position, go_to, loop_position
from lightning_fp.callbacks.run.replaced import replaced
from lightning_fp.callbacks.run.run import Run, RunCallback
from lightning_fp.plugins import LayerPrecision
from lightning_fp.stability.keep.host_batch import copy_batch
from lightning_fp.stability.keep.hyperparameters import hyperparameters, set_hyperparameters

_DEAF = (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    Run,
    RunCallback,
    ThroughputMonitor,
    Timer,
)
"""Callbacks that hear nothing of a replay: they write, show, measure time, or are ours."""

_BEFORE_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
)
"""Where users' code runs before an optimizer steps, besides the training step."""

_HOOKS = (*_BEFORE_STEP, "on_before_optimizer_step", "on_train_batch_end")
"""All hooks of a batch that callbacks have."""


class LoopReplay:
    """Runs recorded micro-batches through the loop of a Trainer.

    Args:
        trainer: the Trainer, in `fit`, between two optimizer steps.
        steps: whether optimizers step; else a batch ends after its backward.
        backward: whether there is one; else a batch ends when its loss is known. In manual
            optimization there always is.
    """

    def __init__(self, trainer: Trainer, *, steps: bool, backward: bool = True) -> None:
        self._trainer, self._steps = trainer, steps
        forward_only = not backward and trainer.lightning_module.automatic_optimization
        self._outputs = _Outputs(ends_batch=not steps, ends_forward=forward_only)

    @contextmanager
    def conditions(self) -> Generator[None, None, None]:
        """What must stand around `run`: nothing is told, and nothing of the loop is left.

        Loops, learning rates and all other plain numbers of the optimizers are afterwards as they
        are now, whatever hooks and schedulers have done to them.
        """
        trainer = self._trainer
        now = loop_position(trainer)
        rates = [hyperparameters(optimizer) for optimizer in trainer.optimizers]
        try:
            with self._quiet():
                yield
        finally:
            go_to(trainer, now)
            for optimizer, groups in zip(trainer.optimizers, rates, strict=True):
                set_hyperparameters(optimizer, groups)

    def run(self, batch: Any, position: Position) -> Tensor | None:
        """One micro-batch.

        Args:
            batch: as it comes from the loader; the loop gets a copy.
            position: where the loops stood before it.

        Returns:
            The loss as callbacks see it, in automatic optimization divided by the number of
            micro-batches of a step; None if there was none.
        """
        trainer = self._trainer
        go_to(trainer, position)
        self._outputs.loss = None
        fetched: Any = _Fetched(copy_batch(batch), position["is_last_batch"])
        with suppress(_EndOfBatch, StopIteration):  # on_train_batch_start may ask for the latter
            trainer.fit_loop.epoch_loop.advance(fetched)
        return self._outputs.loss

    def _quiet(self) -> AbstractContextManager[object]:
        trainer, plugin = self._trainer, self._trainer.precision_plugin
        epoch_loop = trainer.fit_loop.epoch_loop
        # All of it is set on instances, never on classes: another Trainer notices nothing.
        stack = ExitStack()
        stack.enter_context(muted(trainer))
        if isinstance(plugin, LayerPrecision):
            table = plugin.precision_map
            stack.enter_context(plugin.replaying())
            # hooks that write to the table have done so in their time
            stack.enter_context(
                replaced(table, set=lambda pattern, *_, **__: table.matching(pattern))
            )
        callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        for callback in callbacks:
            if isinstance(callback, _DEAF):  # it stays in the list, where others look for it
                stack.enter_context(replaced(callback, **dict.fromkeys(_HOOKS, nothing)))
        # In front, since it may end the batch: what `on_train_batch_end` means to others, a step
        # that was made, has not happened then.
        stack.enter_context(replaced(trainer, callbacks=[self._outputs, *callbacks]))
        # A loop that restarts may leave `advance` without training. SIGTERM ends the run between
        # batches of its own; asking for it is a collective besides.
        silent = {"update_lr_schedulers": nothing, "_broadcast_sigterm_tensor": nothing}
        stack.enter_context(replaced(epoch_loop, _restarting=False, **silent))
        # The loop's own calls are silent by now; in manual optimization the step calls them.
        for config in trainer.lr_scheduler_configs:
            stack.enter_context(replaced(config.scheduler, step=nothing))
        if not self._steps:
            # Lightning then runs forward and backward, without exchange of gradients
            stack.enter_context(replaced(trainer.fit_loop, _should_accumulate=lambda: True))
        return stack


class _EndOfBatch(Exception):  # noqa: N818 - no error
    """All is known of this batch."""


class _Outputs(Callback):
    """Hears the outputs of a batch before anybody else."""

    def __init__(self, *, ends_batch: bool, ends_forward: bool) -> None:
        self.loss: Tensor | None = None
        self._ends_batch, self._ends_forward = ends_batch, ends_forward

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if self._ends_forward:
            self.loss = loss.detach()
            raise _EndOfBatch

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self.loss = loss if isinstance(loss, Tensor) else None
        if self._ends_batch:
            raise _EndOfBatch


class _Fetched:
    """Stands in for the loop's data fetcher, with one batch."""

    def __init__(self, batch: Any, done: bool) -> None:
        self._batch, self.done = batch, done

    def __next__(self) -> tuple[Any, int, int]:
        return self._batch, 0, 0


def hearing_callbacks(trainer: Trainer) -> list[Callback]:
    """The user's callbacks whose hooks are part of a training step."""
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return [callback for callback in callbacks if not isinstance(callback, _DEAF)]


def hooks_before_step(trainer: Trainer) -> bool:
    """Whether code of the user's besides the training step runs before an optimizer steps."""
    module = trainer.lightning_module
    of_callbacks = any(
        is_overridden(hook, callback)
        for callback in hearing_callbacks(trainer)
        for hook in _BEFORE_STEP
    )
    return of_callbacks or any(is_overridden(hook, module) for hook in _BEFORE_STEP)


def written_by_hooks(trainer: Trainer) -> list[object]:
    """What hooks write into besides the model: themselves, and what they find in the Trainer."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    data: list[object] = [] if trainer.datamodule is None else [trainer.datamodule]  # pyright: ignore
    return [trainer, *data, *hearing_callbacks(trainer), *trainer.optimizers, *schedulers]


def muted(trainer: Trainer) -> AbstractContextManager[object]:
    """No logging: not by `self.log`, not through the loggers, not to the console; no checkpoint."""
    # A replay may run within a hook that is being profiled, and the loop calls that hook again,
    # which Lightning's SimpleProfiler refuses ("already started").
    stack = ExitStack()
    loggers = [DummyLogger() for _ in trainer.loggers]
    quiet = {"_loggers": loggers, "profiler": PassThroughProfiler(), "save_checkpoint": nothing}
    stack.enter_context(replaced(trainer, **quiet))
    hooks = ("on_batch_start", "on_batch_end", "update_train_step_metrics")
    silent: dict[str, Callable[..., None]] = dict.fromkeys(hooks, nothing)
    stack.enter_context(replaced(trainer._logger_connector, **silent))
    for module in trainer.lightning_module.modules():
        if isinstance(module, LightningModule):
            silent = {"log": nothing, "log_dict": nothing, "print": nothing}
            stack.enter_context(replaced(module, **silent))
    return stack


def heard_backward(
    trainer: Trainer, hear: Callable[[Tensor], object]
) -> AbstractContextManager[object]:
    """In manual optimization somebody hears each loss that `manual_backward` is given."""
    run_backward = trainer.strategy.backward

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hear(loss.detach())  # before the plugin scales it
        return run_backward(loss, *args, **kwargs)

    if trainer.lightning_module.automatic_optimization:
        return nullcontext()
    return replaced(trainer.strategy, backward=backward)


def nothing(*_: Any, **__: Any) -> None:
    """Stands in for a method that must not act."""
