"""StabilityMonitor: signals of every step that may tell of a divergence before the loss does.

What it measures and tells, `telemetry.stability.stability_log` does in any loop; these are hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from typing_extensions import override

from lightning_fp.argument_types import checked
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.callbacks.run.run_info import table_of
from lightning_fp.layers.regions import is_compiled
from lightning_fp.telemetry.stability.signals import PUBLISHED
from lightning_fp.telemetry.stability.stability_log import StabilityLog, StabilityOptions


class StabilityMonitor(RunCallback):
    """Logs, for every step, what is known to move before a loss does.

    Sharpness and size of the output's logits, the largest logit of attention, kurtosis of what
    linear layers are given, how far the weights move, how much the gradient turns. The numbers
    stay on the device until the log interval ends; then each step's go to board and loggers under
    the same names, and to Parquet parts in `<dirpath>/stability/`, which
    `lightning_fp.records.read_stability` and `lightning-fp study predictors` read. It needs no
    precision plugin of this package. Failures in here are logged, and training continues.

    >>> from lightning_fp import StabilityMonitor
    >>> trainer = L.Trainer(accelerator="cpu", callbacks=[StabilityMonitor()])

    Args:
        head: name of the layer whose output is the logits; by default the last linear layer.
        attention: whether to look at the logits of `F.scaled_dot_product_attention`.
        dirpath: where the rows go; by default the run's directory.
        log_every_n_steps: length of a log interval; by default the trainer's.

    Raises:
        ValueError: for an option out of range; at the start of a fit for a head that is not there.
    """

    judges_layers: ClassVar[bool] = True
    publishes: ClassVar[Mapping[str, str]] = dict.fromkeys(PUBLISHED, "")
    writes_loss: ClassVar[bool] = True
    needs_grad_norm: ClassVar[bool] = True

    @checked
    def __init__(
        self,
        head: str | None = None,
        *,
        attention: bool = True,
        dirpath: str | Path | None = None,
        log_every_n_steps: int | None = None,
    ) -> None:
        options = StabilityOptions(
            head=head, attention=attention, log_every_n_steps=log_every_n_steps
        )
        self.dirpath, self.log_every_n_steps = dirpath, log_every_n_steps
        self._log = StabilityLog(options, type(self).__name__)

    @override
    def settings(self) -> dict[str, Any]:
        """The options that decide what it does."""
        return self._log.options.settings()

    @override
    def published_every(self, interval: int) -> tuple[int, str]:
        """Each step's, once per log interval."""
        return self.log_every_n_steps or interval, "logs"

    # -- hooks ----------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a head that is not there."""
        self._log.check(pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch from here on."""
        run, table = run_of(trainer), table_of(trainer)
        compiled = any(is_compiled(module) for module in pl_module.modules())
        self._log.open(
            pl_module,
            trainer.optimizers,
            run,
            run.directory(self),
            replays=lambda: table is not None and table.frozen,
            compiled=lambda: compiled,
            step=trainer.global_step,
            # of a Trainer that never logs it is 0
            interval=trainer.log_every_n_steps,  # pyright: ignore[reportAttributeAccessIssue]
            device=trainer.strategy.root_device,
        )

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Look at the attention of the coming forward."""
        self._log.before_batch(trainer.global_step)

    @override
    def on_before_backward(self, *_: Any) -> None:
        """The forward is over."""
        self._log.leave()

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Take the step's numbers; log at the end of an interval."""
        if self._log.after_batch(trainer.global_step):
            self._log.tell(trainer.global_step)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what is left, and write everything out."""
        self._log.finish(trainer.global_step)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Write everything out; what other ranks have is lost, for they may not come."""
        self._log.finish(trainer.global_step, alone=trainer.world_size == 1)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave model and optimizers as they were."""
        self._log.close()
