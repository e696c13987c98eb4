"""All that a training step can change in a Trainer's run, for a rehearsal to compare."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fp.callbacks.compare.loop_position import loop_position
from lightning_fp.callbacks.compare.loop_replay import hearing_callbacks
from lightning_fp.callbacks.run.replaced import replaced
from lightning_fp.plugins import LayerPrecision
from lightning_fp.stability import RandomState
from lightning_fp.stability.replay.fingerprint import Fingerprint, Item, changed

_HOOKS = (
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_train_batch_start",
    "training_step",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "on_train_batch_end",
)
"""Where a user's code runs in a training step, in the order of Lightning."""


def fingerprint_of(
    trainer: Trainer, plugin: LayerPrecision, wanted: Callable[[Item], bool] = lambda _: True
) -> Fingerprint:
    """Hashes of the state as it is now.

    Args:
        trainer: the Trainer, in `fit`.
        plugin: its precision plugin.
        wanted: see `Fingerprint`.
    """
    taken, module = Fingerprint(wanted), trainer.lightning_module
    for name, parameter in module.named_parameters():
        taken.add("", f"the Parameter {name}", parameter)
        taken.add("", f"the gradient of {name}", parameter.grad)
        for attribute, value in vars(parameter).items():
            taken.add("", f"the attribute {attribute} of the Parameter {name}", value)
    for name, buffer in module.named_buffers():
        taken.add("", f"the buffer {name}", buffer)
    _optimizers(trainer, taken)
    table = plugin.precision_map
    taken.whole("the table of formats", table.state_dict())
    taken.whole("the records of amax", [table.scale_history.recorded, table.scale_history.headroom])
    if plugin.scaler is not None:
        taken.whole("the loss scale", vars(plugin.scaler.state))
    for name, state in vars(RandomState.capture()).items():
        taken.whole(f"the random state of {name}", state)
    taken.whole("the loops' counters", loop_position(trainer))
    taken.whole("the settings of torch", _settings())
    data = _datamodule(trainer)
    owners = [module, *data, *hearing_callbacks(trainer)]
    for owner in owners:
        taken.attributes(owner, skip=_of_lightning())
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for scheduler in (*trainer.optimizers, *schedulers):
        taken.attributes(scheduler, list_unseen=False)
    taken.code_of([*module.modules(), *owners[1:], *trainer.optimizers, *schedulers])
    return taken


def _optimizers(trainer: Trainer, taken: Fingerprint) -> None:
    names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    for optimizer in trainer.optimizers:
        owner = type(optimizer).__name__
        for key, state in optimizer.state.items():
            of = names.get(id(key), "another tensor")
            entries: dict[str, Any] = state if isinstance(state, dict) else {"": state}
            for name, value in entries.items():
                taken.add(owner, f"the state {name} of {of}", value)
        for index, group in enumerate(optimizer.param_groups):
            for name, value in group.items():
                value = [id(each) for each in value] if name == "params" else value
                taken.add(owner, f"{name} of parameter group {index}", value)


def _settings() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "matmul precision": torch.get_float32_matmul_precision(),
    }


@cache
def _of_lightning() -> frozenset[str]:
    """Attributes of Lightning's own, such as the Trainer."""
    return frozenset((*vars(LightningModule()), *vars(LightningDataModule())))


def _datamodule(trainer: Trainer) -> list[Any]:
    data: Any = getattr(trainer, "datamodule", None)
    return [] if data is None else [data]


@contextmanager
def watched_hooks(
    trainer: Trainer, plugin: LayerPrecision, wanted: Callable[[Item], bool]
) -> Generator[dict[Item, tuple[str, str]], None, None]:
    """See which of the user's hooks changes what.

    Args:
        trainer: the Trainer, in `fit`.
        plugin: its precision plugin.
        wanted: whether to watch an item.

    Yields:
        To be read at the end: by item, the first hook that changed it, and its object's class.
    """
    found: dict[Item, tuple[str, str]] = {}

    def look() -> Mapping[Item, Hashable]:
        try:
            taken = fingerprint_of(trainer, plugin, lambda i: i not in found and wanted(i))
            return taken.hashes()
        except Exception:  # in the middle of a step anything may be half done
            return {}

    def watched(hook: str, owner: Any) -> Callable[..., Any]:
        run = getattr(owner, hook)

        @wraps(run)
        def watching(*args: Any, **kwargs: Any) -> Any:
            before = look()
            try:
                return run(*args, **kwargs)
            finally:
                after = look()
                for item in changed(before, after) if before and after else ():
                    found.setdefault(item, (hook, type(owner).__name__))

        return watching

    owners = [trainer.lightning_module, *_datamodule(trainer), *hearing_callbacks(trainer)]
    with ExitStack() as stack:
        for owner in owners:
            hooks = [h for h in _HOOKS if hasattr(owner, h) and is_overridden(h, owner)]
            wrappers = {hook: watched(hook, owner) for hook in hooks}
            stack.enter_context(replaced(owner, **wrappers))
        yield found
