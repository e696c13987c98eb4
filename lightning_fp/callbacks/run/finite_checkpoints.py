"""A checkpoint whose weights are not finite is not written, and what was good is not removed.

Lightning's callbacks keep a few files and remove the others. A run whose weights have become NaN
replaces, save by save, all that it could be resumed from. So both are watched: the callbacks, which
would otherwise take a file that was refused for their best, and the strategy, through which anybody
saves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_fp.callbacks.run.replaced import replaced

_SAVES = ("_save_topk_checkpoint", "_save_last_checkpoint")
"""Where ModelCheckpoint saves a file and then removes another; it does not come there in vain, so
that `best_model_path` and `last_model_path` stay those of good files."""


@contextmanager
def finite_checkpoints(
    trainer: Trainer, tell: Callable[[str], object]
) -> Generator[None, None, None]:
    """Within it the Trainer saves only what can be gone on from.

    Args:
        trainer: the Trainer, in `fit`.
        tell: hears of the first checkpoint that is refused, and of the first after a good one.
    """
    gate = _Gate(trainer, tell)
    strategy = trainer.strategy
    writers = {"save_checkpoint": gate.saves, "remove_checkpoint": gate.removes}
    with ExitStack() as stack:
        wrapped = {name: wrap(getattr(strategy, name)) for name, wrap in writers.items()}
        stack.enter_context(replaced(strategy, **wrapped))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                saves = {name: gate.comes(getattr(callback, name)) for name in _SAVES}
                stack.enter_context(replaced(callback, **saves))
        yield


class _Gate:
    def __init__(self, trainer: Trainer, tell: Callable[[str], object]) -> None:
        self._trainer, self._tell = trainer, tell
        self._shut = False

    def comes(self, save: Callable[..., object]) -> Callable[..., None]:
        """A callback is about to save."""

        def come(*args: Any, **kwargs: Any) -> None:
            if self._is_good({}, "the checkpoint"):
                save(*args, **kwargs)

        return come

    def saves(self, save: Callable[..., object]) -> Callable[..., None]:
        """A file is about to be written, by whomever."""

        def write(checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any) -> None:
            if self._is_good(checkpoint, str(filepath)):
                save(checkpoint, filepath, *args, **kwargs)

        return write

    def removes(self, remove: Callable[..., object]) -> Callable[..., None]:
        """A file is about to be removed: not in favour of one that was refused."""

        def clear(filepath: Any) -> None:
            if not self._shut:
                remove(filepath)

        return clear

    def _is_good(self, checkpoint: Mapping[str, Any], what: str) -> bool:
        good = self._all_finite(checkpoint.get("state_dict"))
        if not good and not self._shut:
            self._tell(f"{what} is not written: weights are inf or NaN; those before it stay")
        self._shut = not good
        return good

    def _all_finite(self, state: Any) -> bool:
        """Of trained Parameters, as they are and as they are saved (averages), on all ranks."""
        saved: Mapping[str, Any] = state if isinstance(state, Mapping) else {}
        named = self._trainer.lightning_module.named_parameters()
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        # Decided together: a checkpoint that some ranks write and others do not is of no use.
        finite = all(_finite(saved.get(name)) and _finite(weight) for name, weight in trained)
        return bool(self._trainer.strategy.reduce_boolean_decision(finite, all=True))


@torch.no_grad()
def _finite(value: Any) -> bool:
    """What is no tensor is not looked at."""
    if not isinstance(value, Tensor):
        return True
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value  # pyright: ignore
    values = local.coalesce().values() if local.is_sparse else local
    return bool(torch.isfinite(values).all())
