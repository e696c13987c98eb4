"""A training step of the Trainer as something that can be run again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_fp.layers import LinearFormat, PrecisionMap
from lightning_fp.plugins import LayerPrecision
from lightning_fp.plugins.loss_scaler import LossScaler
from lightning_fp.stability import RandomState, Replay, replay_step
from lightning_fp.stability.replay.one_step import Outcome

_OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class StepReplay:
    """Runs a batch again, in any formats, and leaves nothing behind in the model or the Trainer.

    Besides what `untouched` keeps: `self.log` and the loggers are mute, callbacks hear nothing,
    DDP neither reduces gradients nor broadcasts buffers, and in manual optimization optimizers
    and schedulers do not step. Use it between optimizer steps.

    Args:
        trainer: the Trainer, in `fit`.
        table: the formats.
        batch: the batch as the training step gets it; each replay gets a copy.
        batch_idx: its index.
        rng: the random state before that step; None takes the present one.
    """

    def __init__(
        self,
        trainer: Trainer,
        table: PrecisionMap,
        batch: Any,
        batch_idx: int,
        rng: RandomState | None = None,
    ) -> None:
        self._trainer = trainer
        self._table = table
        self._batch, self._batch_idx = batch, batch_idx
        self._rng = RandomState.capture() if rng is None else rng

    @property
    def model(self) -> nn.Module:
        """What the Trainer calls: the module with its wrappers."""
        model = self._trainer.strategy.model
        if model is None:
            raise RuntimeError("a training step can be replayed only during fit")
        return model

    @property
    def possible(self) -> bool:
        """False before the first backward of a static-graph DDP, which is special."""
        return getattr(self.model, "_static_graph_delay_allreduce_enqueued", True) or not getattr(
            self.model, "static_graph", False
        )

    def __call__(self, formats: Mapping[str, LinearFormat], *, observe: bool = False) -> Replay:
        """Replay in these formats; call it alike on all ranks, and the outcome is alike.

        Raises:
            Exception: what the training step raised, save for lack of memory.
        """
        error: Exception | None = None
        try:
            result = replay_step(
                self._forward_backward,
                self.model,
                self._table,
                formats=formats,
                rng=self._rng,
                observe=observe,
            )
        except Exception as failure:
            error, result = failure, Replay(outcome="failed on another rank")
        outcome = self._worst_of_ranks(result.outcome)
        if error is not None:
            raise error
        return result if outcome == result.outcome else Replay(outcome=outcome)

    def _worst_of_ranks(self, outcome: Outcome) -> Outcome:
        if self._trainer.world_size == 1:
            return outcome
        code = torch.tensor(_OUTCOMES.index(outcome), device=self._trainer.strategy.root_device)
        return _OUTCOMES[int(self._trainer.strategy.reduce(code, reduce_op="max"))]

    def _forward_backward(self) -> Tensor | None:
        trainer = self._trainer
        module, plugin = trainer.lightning_module, trainer.precision_plugin
        replaying = plugin.replaying() if isinstance(plugin, LayerPrecision) else nullcontext()
        arguments = [tree_map(copied, self._batch)]
        if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
            arguments.append(self._batch_idx)
        with replaying, muted(trainer), _without_sync(trainer), _own_steps(trainer) as losses:
            output = trainer.strategy.training_step(*arguments)
            if not module.automatic_optimization:
                return torch.stack(losses).sum() if losses else None
            loss: Tensor | None = output["loss"] if isinstance(output, Mapping) else output  # pyright: ignore
            if loss is not None:
                plugin.backward(loss, module, None)
            return loss


def check_replayable(module: LightningModule) -> None:
    """Refuse a training step that draws its batches itself.

    Raises:
        ValueError: if `training_step` takes a `dataloader_iter`.
    """
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            "training_step(self, dataloader_iter) cannot be replayed: it takes its batches out of"
            " the loader itself; define training_step(self, batch, batch_idx)"
        )


def copied(value: Any) -> Any:
    """A leaf of a batch that the training step may write into."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return copy.deepcopy(value)
    clone: Callable[[], Any] | None = getattr(value, "clone", None)  # PyG's, for example
    return clone() if callable(clone) else value


def muted(trainer: Trainer) -> AbstractContextManager[object]:
    """No logging: not by `self.log`, not through the loggers, not to the console."""
    stack = ExitStack()
    loggers = [DummyLogger() for _ in trainer.loggers]
    stack.enter_context(replaced(trainer, _loggers=loggers))
    for module in trainer.lightning_module.modules():
        if isinstance(module, LightningModule):
            silent = {"log": _nothing, "log_dict": _nothing, "print": _nothing}
            stack.enter_context(replaced(module, **silent))
    return stack


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
    """In manual optimization: `manual_backward` as it is but without hooks, and no steps.

    Yields:
        The losses that `manual_backward` was given. On leaving, each parameter has the gradient
        that its optimizer would have stepped with: without the loss scale, if there is one.
    """
    scaler: LossScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    if not isinstance(scaler, LossScaler):
        scaler = None
    losses: list[Tensor] = []
    stepped: dict[nn.Parameter, Tensor] = {}

    def backward(loss: Tensor, optimizer: object, *args: Any, **kwargs: Any) -> Tensor:
        losses.append(loss.detach())
        trainer.precision_plugin.backward(loss, trainer.lightning_module, None, *args, **kwargs)
        return losses[-1]

    with ExitStack() as stack:
        if not trainer.lightning_module.automatic_optimization:
            stack.enter_context(replaced(trainer.strategy, backward=backward))
            wrapped = trainer.strategy._lightning_optimizers
            for optimizer, wrapper in zip(trainer.optimizers, wrapped, strict=True):
                for handle in (optimizer, wrapper):
                    step, zero_grad = (
                        _take_gradients(optimizer, stepped, scaler),
                        _drop_gradients(optimizer),
                    )
                    stack.enter_context(replaced(handle, step=step, zero_grad=zero_grad))
            for config in trainer.lr_scheduler_configs:
                stack.enter_context(replaced(config.scheduler, step=_nothing))
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


def _drop_gradients(optimizer: Optimizer) -> Callable[..., None]:
    """Instead of `zero_grad`, which may write zeros into what was taken."""

    def zero_grad(*_: Any, **__: Any) -> None:
        for parameter in _parameters(optimizer):
            parameter.grad = None

    return zero_grad


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _nothing(*_: Any, **__: Any) -> None:
    """Stands in for a method that must not act."""


@contextmanager
def replaced(target: object, **attributes: Any) -> Generator[None, None, None]:
    """Attributes of an instance for a while; those it did not have are gone afterwards."""
    own = vars(target)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)
