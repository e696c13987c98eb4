"""LossRecorder: each step's loss, gradient norm and time, in any precision."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.callbacks.clamp.clamp_monitor import ClampMonitor
from lightning_fp.callbacks.run.run import RunCallback, run_directory, run_of
from lightning_fp.callbacks.run.step_losses import StepLosses
from lightning_fp.plugins.guard import gradient_norm
from lightning_fp.records import LossWriter

log = logging.getLogger(__name__)

_INTERVAL = 50
"""Lightning's own default for log intervals, where the Trainer is told never to log."""


class LossRecorder(RunCallback):
    """Writes down a run that others are to be compared with, usually one in BF16.

    `<dirpath>/loss.csv` gets the loss of every step (its mean over micro-batches and ranks), the
    norm of its gradient before clipping, and the seconds it took; `<dirpath>/run.jsonl` what the
    run is. It works with any precision plugin, also without one of this package. Where a
    ClampMonitor writes the same file, it is left to it, and told the norms. Under FSDP1 norms are
    left out: each rank has only a part.

    >>> trainer = Trainer(
    ...     accelerator="cpu", precision="bf16-mixed", callbacks=[LossRecorder("runs/bf16")]
    ... )

    Args:
        dirpath: where to write; by default the trainer's log directory.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        self.dirpath = dirpath
        self._losses = StepLosses()
        self._norm: Tensor | None = None
        self._writer: LossWriter | None = None
        self._monitor: ClampMonitor | None = None
        self._begun = self._logged_at = 0
        self._running = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        directory = run_of(trainer).directory(self)
        self._monitor = self._beside(trainer)
        self._losses, self._norm = StepLosses(), None
        self._running = self._monitor is None
        self._writer = LossWriter(directory) if self._running and directory is not None else None
        self._logged_at = trainer.global_step

    def _beside(self, trainer: Trainer) -> ClampMonitor | None:
        """A ClampMonitor that writes to the same directory."""
        callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        own = run_directory(trainer, self)
        monitors = [c for c in callbacks if isinstance(c, ClampMonitor)]
        return next((c for c in monitors if run_directory(trainer, c) == own), None)

    # -- steps ----------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begun = trainer.global_step

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """The norm over all optimizers that step in this batch; gradients are not yet clipped."""
        guard = getattr(trainer.precision_plugin, "guard", None)
        told = self._monitor is not None and getattr(guard, "on_norm", None) is not None
        if told or isinstance(trainer.strategy, FSDPStrategy):
            return
        norm = gradient_norm(optimizer) * _unscale(trainer, optimizer)
        self._norm = norm if self._norm is None else torch.hypot(self._norm, norm)
        (self._monitor or self._losses).note_grad_norm(self._norm)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._norm = None
        if not self._running:
            return
        # In manual optimization nobody has divided the loss.
        divided_by = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        device = trainer.strategy.root_device
        self._losses.add(self._begun + 1, outputs, divided_by, device)
        interval: int = trainer.log_every_n_steps or _INTERVAL  # pyright: ignore[reportAttributeAccessIssue]
        if trainer.global_step // interval != self._logged_at // interval:
            self._write(trainer)

    # -- writing --------------------------------------------------------------------------------

    def _write(self, trainer: Trainer) -> None:
        """A collective."""
        self._logged_at = trainer.global_step
        rows = self._losses.take(lambda x: trainer.strategy.reduce(x, reduce_op="mean"))
        if self._writer is None:
            return
        try:
            self._writer.append(rows)
        except OSError:
            self._writer = None
            log.exception("losses cannot be written; the training goes on without them")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._running:
            self._write(trainer)
        self._running = False

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write what there is; what other ranks have is lost, for they may not come."""
        if self._running and trainer.world_size == 1:
            self._write(trainer)
        self._running = False

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._running, self._writer = False, None


def _unscale(trainer: Trainer, optimizer: Optimizer) -> float:
    """What the gradients are to be multiplied with, where a fused step unscales them itself."""
    plugin = trainer.precision_plugin
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    if scaler is None or not _optimizer_handles_unscaling(optimizer):
        return 1.0
    return 1.0 / scaler.get_scale()
