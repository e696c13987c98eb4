"""ClampMonitor: what FP8 does to every layer's numbers, as rows, curves and warnings.

What it measures and tells, `telemetry.casts.cast_log` does in any loop; these are the hooks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from typing_extensions import override

from lightning_fp.argument_types import checked
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.layers import LinearFormat
from lightning_fp.records import StatisticsRows
from lightning_fp.telemetry.casts.cast_log import CastLog, CastOptions
from lightning_fp.telemetry.casts.sampling import Listener
from lightning_fp.telemetry.casts.summary import COLUMNS, SUMMARIES, why_nothing


class ClampMonitor(RunCallback):
    """Logs what each layer's format does to its operands.

    Sampled steps, one in every window of `every_n_steps`, gather statistics inside the layers;
    under delayed scaling amax, headroom and non-finite values are exact at every step besides.
    Nothing waits for the device but the log interval. Then all layers' rows go to Parquet parts in
    `<dirpath>/statistics/`, the loss of every step to `<dirpath>/loss.csv`, a few fixed names to
    every logger, and what is over a limit to the log, with a remedy. Failures in here are logged,
    and training continues without it.

    >>> from lightning_fp import FP8Precision
    >>> from lightning_fp.callbacks import ClampMonitor
    >>> trainer = L.Trainer(
    ...     accelerator="cpu", plugins=FP8Precision(), callbacks=[ClampMonitor()]
    ... )

    Args:
        every_n_steps: length of a window; the sampled step's place in it is random, but follows
            from `seed`, so that nothing periodic hides from it.
        sample: SQNR and the error of the output are computed on every `sample`-th row, with a
            rotating offset; all else on all rows.
        what_if: whether sampled steps also compute what other scalings would have done to the same
            tensors. Delayed scaling then gets a history of dynamic layers too, for which every
            step records their amax.
        dirpath: where the rows go; by default the run's directory.
        log_layers: globs of the layers whose statistics go to the loggers one by one.
        log_every_n_steps: length of a log interval; by default the trainer's.
        warn_clamped_mass: clamped mass from which on to warn; None never does.
        warn_underflow: share of non-zero elements flushed to zero from which on to warn.
        warn_nonfinite: number of inf and NaN elements in an interval from which on to warn.
        seed: of the sampled steps; the same on all ranks.

    Raises:
        ValueError: for an option out of range; at setup without a plugin of this package, or for
            a glob that matches no layer.
    """

    judges_layers: ClassVar[bool] = True
    publishes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(SUMMARIES, ""),
        **{name: "what_if=True" if name.startswith("what_if_") else "" for name in COLUMNS},
    }
    writes_loss: ClassVar[bool] = True

    @checked
    def __init__(
        self,
        every_n_steps: int = 16,
        sample: int = 8,
        *,
        what_if: bool = False,
        dirpath: str | Path | None = None,
        log_layers: Sequence[str] = (),
        log_every_n_steps: int | None = None,
        warn_clamped_mass: float | None = 1e-2,
        warn_underflow: float | None = 0.25,
        warn_nonfinite: int | None = 1,
        seed: int = 0,
    ) -> None:
        options = CastOptions(
            every_n_steps=every_n_steps,
            sample=sample,
            what_if=what_if,
            log_layers=log_layers,
            log_every_n_steps=log_every_n_steps,
            warn_clamped_mass=warn_clamped_mass,
            warn_underflow=warn_underflow,
            warn_nonfinite=warn_nonfinite,
            seed=seed,
        )
        self.sample, self.what_if, self.dirpath = sample, what_if, dirpath
        self.log_layers, self.log_every_n_steps = tuple(log_layers), log_every_n_steps
        self._log = CastLog(options)

    @property
    def latest(self) -> StatisticsRows | None:
        """The rows of the last interval."""
        return self._log.latest

    @property
    def listeners(self) -> list[Listener]:
        """Called with every sampled step as it ends; see `telemetry.casts.sampling.Listener`."""
        return self._log.listeners

    def sample_next(self) -> None:
        """Sample the next step to begin as well, out of turn. Call alike on all ranks."""
        self._log.sample_next()

    @override
    def settings(self) -> dict[str, Any]:
        """The options that decide what it does."""
        return self._log.options.settings()

    @override
    def published_every(self, interval: int) -> tuple[int, str]:
        """Once per log interval."""
        return self.log_every_n_steps or interval, "logs"

    @override
    def cannot_measure(
        self, name: str, trainer: L.Trainer, formats: Collection[LinearFormat]
    ) -> str:
        return why_nothing(name, formats)

    # -- hooks ----------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer without a table of formats."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.plugin(trainer)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse globs that match nothing."""
        self._log.options.named(self.plugin(trainer))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Observe the layers from here on."""
        run = run_of(trainer)
        self._log.open(
            self.plugin(trainer),
            run,
            run.directory(self),
            step=trainer.global_step,
            # of a Trainer that never logs it is 0
            interval=trainer.log_every_n_steps,  # pyright: ignore[reportAttributeAccessIssue]
            device=trainer.strategy.root_device,
        )

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Begin to collect, if this is the first micro-batch of a sampled step."""
        self._log.before_batch(trainer.global_step)

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take in what backward recorded."""
        self._log.after_backward()

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """End a sampled step; log at the end of an interval."""
        if self._log.after_batch(trainer.global_step):
            self._log.tell(trainer.global_step, partial(_in_bar, pl_module))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what is left, and write everything out."""
        self._log.finish(trainer.global_step)  # Lightning allows no `self.log` in this hook

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Write everything out; what other ranks have is lost, for they may not come."""
        if trainer.world_size == 1:
            self._log.tell(trainer.global_step)
        self._log.close()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the layers as they were."""
        if stage == "fit":
            self._log.let_go()
        self._log.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        """The step sampled last: a resumed run samples the steps that the whole run would have."""
        return self._log.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._log.load_state_dict(state_dict)


def _in_bar(module: L.LightningModule, values: Mapping[str, float]) -> None:
    """For the progress bar and `callback_metrics`; the loggers get theirs from `RunTelemetry`.

    `batch_size`, since Lightning demands it of a step that takes a `dataloader_iter`. The bar has
    room for one number of ours.
    """
    for name in ("fp8/share", "fp8/clamped_mass/max"):
        module.log(
            name,
            values[name],
            prog_bar=name == "fp8/share",
            logger=False,
            on_step=True,
            on_epoch=False,
            batch_size=1,
        )
