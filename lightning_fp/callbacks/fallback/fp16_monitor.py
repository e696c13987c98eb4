"""FP16Monitor: where a run's gradients lie in the range of FP16, layer by layer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.argument_types import checked
from lightning_fp.callbacks.fallback.precision_fallback import PrecisionFallback
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.plugins import LayerPrecision
from lightning_fp.records.event_log import EventLog
from lightning_fp.records.events import SkippedStep
from lightning_fp.records.gradients import GradientRow, GradientShares, append_gradients
from lightning_fp.stepping.loss_scaler import LossScaler
from lightning_fp.stepping.overflows import counts, layer_of

log = logging.getLogger(__name__)


class FP16Monitor(RunCallback):
    """Looks at the gradients of some steps, and names the layer that overflowed where one is lost.

    `<dirpath>/gradients.jsonl` gets, for each step looked at and each layer, the share of gradients
    that are zero, subnormal (bits are lost) and inf or NaN in FP16 under the loss scale of the
    step; loggers get `fp16/gradients/{zero,subnormal}/{max,mean}`. A step that is left out becomes
    an event in `<dirpath>/events.jsonl`, with the layer closest to the loss that overflowed. Where
    gradients accumulate over micro-batches, their sum is looked at.

    >>> from lightning_fp import FP16Precision
    >>> trainer = Trainer(accelerator="cpu", plugins=FP16Precision(), callbacks=[FP16Monitor()])

    Args:
        every_n_steps: one in so many steps is looked at.
        dirpath: where to write; by default the run's directory.

    Raises:
        ValueError: for an option out of range; at setup without a plugin that scales the loss.
    """

    @checked
    def __init__(self, every_n_steps: int = 64, *, dirpath: str | Path | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self._every_n_steps = every_n_steps
        self.dirpath = dirpath
        self._log = EventLog(None)
        self._directory: Path | None = None
        self._names: dict[int, str] = {}
        self._told = -1
        self._alone = True
        self._failed = False

    @override
    def settings(self) -> dict[str, Any]:
        return {"every_n_steps": self._every_n_steps}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _scaler(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = run_of(trainer)
        self._log, self._directory = run.log(self), run.directory(self)
        self._names = {id(p): name for name, p in pl_module.named_parameters()}
        self._told, self._failed = trainer.global_step - 1, False
        callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        self._alone = not any(isinstance(c, PrecisionFallback) for c in callbacks)

    # -- steps ----------------------------------------------------------------------------------

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """The plugin has taken the scale out, and nothing is clipped yet."""
        scaler = _scaler(trainer)
        step = trainer.global_step
        if step % self._every_n_steps or not scaler.active or self._failed:
            return
        try:
            self._look(trainer, optimizer, scaler, step)
        except Exception:
            self._failed = True
            log.exception("FP16Monitor failed at step %d; training continues without it", step)

    def _look(self, trainer: Trainer, optimizer: Optimizer, scaler: LossScaler, step: int) -> None:
        parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        seen = [p for p in parameters if p.grad is not None and id(p) in self._names]
        if not seen:
            return
        scale = scaler.state.scale
        table = counts([p.grad for p in seen if p.grad is not None], scale)
        layers: dict[str, list[int]] = {}
        for index, parameter in enumerate(seen):
            layers.setdefault(layer_of(self._names[id(parameter)]), []).append(index)
        sums = torch.stack([table[rows].sum(0) for rows in layers.values()])
        values: list[list[float]] = torch.cat([sums, scale.expand(1, 4)]).tolist()
        shares = {
            layer: GradientShares(zero=zero / all, subnormal=small / all, overflow=bad / all)
            for layer, (all, zero, small, bad) in zip(layers, values, strict=False)
        }
        if self._directory is not None:
            row = GradientRow(step=step, scale=values[-1][0], layers=shares)
            append_gradients(self._directory, row)
        scalars: dict[str, float] = {}
        for name in ("zero", "subnormal"):
            column = [float(getattr(each, name)) for each in shares.values()]
            scalars[f"fp16/gradients/{name}/max"] = max(column)
            scalars[f"fp16/gradients/{name}/mean"] = sum(column) / len(column)
        run = run_of(trainer)  # numbers of this rank, which no gate may read
        run.log_metrics(scalars, trainer.fit_loop.epoch_loop._batches_that_stepped)

    @override
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._tell(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        """Steps that were left out; a PrecisionFallback tells of them itself."""
        plugin: Any = trainer.precision_plugin
        overflowed: dict[int, str] = {} if plugin.guard is None else plugin.guard.overflowed
        for step, layer in overflowed.items():
            if step > self._told and self._alone:
                scale = float(_scaler(trainer).state.scale)
                reason = f"the gradient of {layer} overflowed first: the optimizer step was skipped"
                numbers = {"loss_scale": scale}
                self._log.write(
                    SkippedStep(step=step, reason=reason, layers=(layer,), numbers=numbers)
                )
        self._told = max([self._told, *overflowed])


def _scaler(trainer: Trainer) -> LossScaler:
    plugin = trainer.precision_plugin
    if not isinstance(plugin, LayerPrecision) or plugin.scaler is None:
        raise ValueError(
            f"FP16Monitor needs a plugin that scales the loss, got {type(plugin).__name__}; take"
            " Trainer(plugins=FP16Precision(...))"
        )
    return plugin.scaler
