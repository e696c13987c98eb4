"""Where the Trainer's loops stand, as plain numbers, and back there again.

A step may depend on `global_step`, `current_epoch` or the index of its batch, and the loop decides
by the same counters whether it accumulates and whether an epoch ends. So a batch that is run again
must find those of its time. They are attributes of Lightning's loops, some of them private: this is
the place to look at when another Lightning counts differently.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from lightning.pytorch import Trainer

Position: TypeAlias = dict[str, Any]
"""By loop, its counters in all and of the epoch; plain numbers, to be saved with a batch."""


def loop_position(trainer: Trainer) -> Position:
    """What `global_step`, `current_epoch`, the batch's index and accumulation follow from."""
    epoch_loop = trainer.fit_loop.epoch_loop
    position: Position = {
        name: [dict(vars(progress.total)), dict(vars(progress.current))]
        for name, progress in _progress(trainer).items()
    }
    position["is_last_batch"] = epoch_loop.batch_progress.is_last_batch
    position["batches_that_stepped"] = epoch_loop._batches_that_stepped
    position["accumulate_grad_batches"] = trainer.accumulate_grad_batches
    return position


def steps_done(trainer: Trainer) -> int:
    """Batches that stepped; with one optimizer that is `global_step`."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def before_batch(position: Position, batch_idx: int) -> Position:
    """The position at which a batch has not been counted yet, wherever it was taken.

    Args:
        position: from before the batch, or from within its hooks.
        batch_idx: the batch's index in its epoch.
    """
    # Lightning counts a batch as ready after `convert_input` and before `on_train_batch_start`.
    total, current = position["batch"]
    ahead = current["ready"] - batch_idx
    counted = [{**each, "ready": each["ready"] - ahead} for each in (total, current)]
    return {**position, "batch": counted}


def go_to(trainer: Trainer, position: Position) -> None:
    """Put the loops where they stood."""
    for name, progress in _progress(trainer).items():
        total, current = position[name]
        vars(progress.total).update(total)
        vars(progress.current).update(current)
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.batch_progress.is_last_batch = position["is_last_batch"]
    epoch_loop._batches_that_stepped = position["batches_that_stepped"]
    trainer.accumulate_grad_batches = position["accumulate_grad_batches"]


def _progress(trainer: Trainer) -> dict[str, Any]:
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    optimizer = epoch_loop.automatic_optimization.optim_progress.optimizer
    return {
        "epoch": fit_loop.epoch_progress,
        "batch": epoch_loop.batch_progress,
        "scheduler": epoch_loop.scheduler_progress,
        "step": optimizer.step,
        "zero_grad": optimizer.zero_grad,
        "manual": epoch_loop.manual_optimization.optim_step_progress,
    }
