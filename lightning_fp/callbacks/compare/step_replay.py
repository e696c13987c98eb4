"""A training step of the Trainer as something that can be run again.

Lightning has no function that is a step: a batch passes transfer hooks, the hooks and overrides of
the module and the hooks of callbacks, and what it computes may depend on any of them. So a replay
is a batch of the real loop (`loop_replay`), ended before optimizers step, and wrapped into what
makes it leave nothing behind (`stability.replay.untouched`). Whole optimizer steps are made again
by `fallback.trainer_loop`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_fp.callbacks.compare.loop_position import Position, before_batch, loop_position
from lightning_fp.callbacks.compare.loop_replay import (
    LoopReplay,
    heard_backward,
    hooks_before_step,
    replaced,
    written_by_hooks,
)
from lightning_fp.layers import LinearFormat, PrecisionMap
from lightning_fp.stability import RandomState, Replay, replay_step
from lightning_fp.stability.keep.snapshot import restore, take
from lightning_fp.stability.replay.one_step import exchanges_in_any_case, on_all_ranks
from lightning_fp.stepping.loss_scaler import LossScaler


class StepReplay:
    """Runs a batch again, in any formats, and leaves nothing behind in the model or the Trainer.

    The batch goes its whole way from the loader to backward, through all hooks and overrides of the
    LightningModule and the hooks of the user's callbacks, with the loops' counters of its time; no
    optimizer and no scheduler steps. Besides what `untouched` keeps, `self.log` and the loggers are
    mute, and DDP neither reduces gradients nor broadcasts buffers. Where hooks could write into
    weights, these are copied to the host and back. Use it between optimizer steps.

    Args:
        trainer: the Trainer, in `fit`.
        table: the formats.
        batch: the batch as it comes from the loader; each replay gets a copy.
        batch_idx: its index.
        rng: the random state before that batch; None takes the present one.
        position: where the loops stood before that batch; None takes the present one.
        backward: whether gradients are wanted; a forward alone costs a third.
    """

    def __init__(
        self,
        trainer: Trainer,
        table: PrecisionMap,
        batch: Any,
        batch_idx: int,
        rng: RandomState | None = None,
        position: Position | None = None,
        *,
        backward: bool = True,
    ) -> None:
        self._trainer = trainer
        self._table = table
        self._batch = batch
        self._position = before_batch(position or loop_position(trainer), batch_idx)
        self._rng = RandomState.capture() if rng is None else rng
        self._loop = LoopReplay(trainer, steps=False, backward=backward)

    @property
    def model(self) -> nn.Module:
        """What the Trainer calls: the module with its wrappers."""
        model = self._trainer.strategy.model
        if model is None:
            raise RuntimeError("a training step can be replayed only during fit")
        return model

    @property
    def possible(self) -> bool:
        """See `exchanges_in_any_case`."""
        return not exchanges_in_any_case(self.model)

    def __call__(self, formats: Mapping[str, LinearFormat], *, observe: bool = False) -> Replay:
        """Replay in these formats; call it alike on all ranks, and the outcome is alike.

        Raises:
            Exception: what the training step raised, save for lack of memory.
        """
        # Weights are not copied as a rule: no optimizer steps, so only users' hooks may write them.
        module = self._trainer.lightning_module
        weights = take({"model": module}) if hooks_before_step(self._trainer) else None

        def replay() -> Replay:
            try:
                return replay_step(
                    self._forward_backward,
                    self.model,
                    self._table,
                    formats=formats,
                    rng=self._rng,
                    observe=observe,
                    others=written_by_hooks(self._trainer),
                )
            finally:
                if weights is not None:
                    restore(weights, {"model": module})

        return on_all_ranks(replay, self._trainer.strategy.root_device)

    def _forward_backward(self) -> Tensor | None:
        trainer = self._trainer
        with self._loop.conditions(), _without_sync(trainer), _own_steps(trainer) as losses:
            loss = self._loop.run(self._batch, self._position)
            if not trainer.lightning_module.automatic_optimization:
                return torch.stack(losses).sum() if losses else None
            # Lightning has divided the loss of a micro-batch by their number.
            return None if loss is None else loss * trainer.accumulate_grad_batches


def replayable(module: LightningModule) -> bool:
    """Whether the Trainer hands each batch to the training step; else only the step knows it."""
    return not is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)


def check_replayable(module: LightningModule) -> None:
    """Refuse a training step that draws its batches itself.

    Raises:
        ValueError: if `training_step` takes a `dataloader_iter`.
    """
    if not replayable(module):
        raise ValueError(
            "training_step(self, dataloader_iter) cannot be replayed: it takes its batches out of"
            " the loader itself; define training_step(self, batch, batch_idx)"
        )


@contextmanager
def _without_sync(trainer: Trainer) -> Generator[None, None, None]:
    """DDP exchanges nothing. FSDP has to: its gradients arrive reduced, in shards."""
    strategy, model = trainer.strategy, trainer.strategy.model
    blocked = isinstance(strategy, ParallelStrategy)
    ddp = isinstance(model, DistributedDataParallel)
    buffers = replaced(model, require_forward_param_sync=False) if ddp else nullcontext()
    with strategy.block_backward_sync() if blocked else nullcontext(), buffers:
        yield


@contextmanager
def _own_steps(trainer: Trainer) -> Generator[list[Tensor], None, None]:
    """In manual optimization: `manual_backward` as it is, and no steps.

    Yields:
        The losses that `manual_backward` was given. On leaving, each parameter has the gradient
        that its optimizer would have stepped with: without the loss scale, if there is one.
    """
    scaler: LossScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    if not isinstance(scaler, LossScaler):
        scaler = None
    losses: list[Tensor] = []
    stepped: dict[nn.Parameter, Tensor] = {}

    with heard_backward(trainer, losses.append), ExitStack() as stack:
        if not trainer.lightning_module.automatic_optimization:
            # Both: `self.optimizers()` gives a step the wrappers, `use_pl_optimizer=False` what is
            # inside of them.
            wrapped = trainer.strategy._lightning_optimizers
            for optimizer, wrapper in zip(trainer.optimizers, wrapped, strict=True):
                take = _take_gradients(optimizer, stepped, scaler)
                drop = _drop_gradients(optimizer)
                stack.enter_context(replaced(optimizer, step=take, zero_grad=drop))
                counted = _counted(take, wrapper)
                stack.enter_context(replaced(wrapper, step=counted, zero_grad=drop))
        yield losses
        if scaler is not None:
            scaler.unscale_all(trainer.lightning_module.parameters())
        for parameter, gradient in stepped.items():
            parameter.grad = gradient


def _take_gradients(
    optimizer: Optimizer, taken: dict[nn.Parameter, Tensor], scaler: LossScaler | None
) -> Callable[..., object]:
    """Instead of a step: take its gradients, adding up over the steps of one training step."""

    def step(closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        output = None if closure is None else closure()
        if scaler is not None:
            scaler.unscale(optimizer)
        for parameter in _parameters(optimizer):
            if parameter.grad is not None:
                before = taken.get(parameter)
                taken[parameter] = parameter.grad if before is None else before + parameter.grad
                parameter.grad = None
        return output

    return step


def _counted(step: Callable[..., object], wrapper: Any) -> Callable[..., object]:
    """A step that `global_step` counts, as Lightning's wrapper has it."""

    def counted(*args: Any, **kwargs: Any) -> object:
        wrapper._on_before_step()
        output = step(*args, **kwargs)
        wrapper._on_after_step()
        return output

    return counted


def _drop_gradients(optimizer: Optimizer) -> Callable[..., None]:
    """Instead of `zero_grad`, which may write zeros into what was taken."""

    def zero_grad(*_: Any, **__: Any) -> None:
        for parameter in _parameters(optimizer):
            parameter.grad = None

    return zero_grad


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
