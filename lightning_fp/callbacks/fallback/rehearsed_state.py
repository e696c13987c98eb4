"""All that a training step can change in a Trainer's run, for a rehearsal to compare."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fp.callbacks.compare.loop_position import loop_position
from lightning_fp.callbacks.compare.loop_replay import hearing_callbacks
from lightning_fp.callbacks.run.replaced import replaced
from lightning_fp.plugins import LayerPrecision
from lightning_fp.stability.replay.fingerprint import Fingerprint, Item, changed
from lightning_fp.stepping.run_fingerprint import look_at_run

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
    look_at_run(taken, module, trainer.optimizers, plugin.precision_map, plugin.scaler)
    taken.whole("the loops' counters", loop_position(trainer))
    data = _datamodule(trainer)
    owners = [module, *data, *hearing_callbacks(trainer)]
    for owner in owners:
        taken.attributes(owner, skip=_of_lightning())
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for scheduler in (*trainer.optimizers, *schedulers):
        taken.attributes(scheduler, list_unseen=False)
    taken.code_of([*module.modules(), *owners[1:], *trainer.optimizers, *schedulers])
    return taken


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
