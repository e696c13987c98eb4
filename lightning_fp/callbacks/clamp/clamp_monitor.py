"""ClampMonitor: what FP8 does to every layer's numbers, as rows, curves and warnings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_fp.callbacks.clamp.remedies import Limits, Warnings
from lightning_fp.callbacks.clamp.sampling import Listener, SampledSteps, StepSampler
from lightning_fp.callbacks.clamp.summary import flops_share, per_layer, summary
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.callbacks.run.step_losses import StepLosses
from lightning_fp.layers import FPLinear, PrecisionMap
from lightning_fp.records import LossWriter, StatisticsRows, StatisticsWriter, statistics_rows

log = logging.getLogger(__name__)


class ClampMonitor(RunCallback):
    """Logs what each layer's format does to its operands.

    Sampled steps, one in every window of `every_n_steps`, gather statistics inside the layers;
    under delayed scaling amax, headroom and non-finite values are exact at every step besides.
    Nothing waits for the device but the log interval. Then all layers' rows go to Parquet parts in
    `<dirpath>/statistics/`, the loss of every step to `<dirpath>/loss.csv`, a few fixed names to
    every logger, and what is over a limit to the log, with a remedy. Failures in here are logged,
    and the training goes on without it.

    >>> from lightning_fp import FP8Precision
    >>> from lightning_fp.callbacks import ClampMonitor
    >>> trainer = L.Trainer(
    ...     accelerator="cpu", plugins=FP8Precision("delayed"), callbacks=[ClampMonitor()]
    ... )

    Args:
        every_n_steps: length of a window; the sampled step's place in it is random, but follows
            from `seed`, so that nothing periodic hides from it.
        sample: SQNR and the error of the output are computed on every `sample`-th row, with a
            rotating offset; all else on all rows.
        what_if: whether sampled steps also compute what other scalings would have done to the same
            tensors. Delayed scaling then gets a history of dynamic layers too, for which every
            step records their amax.
        dirpath: where the rows go; by default the trainer's log directory.
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
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("sample", sample),
            ("log_every_n_steps", 1 if log_every_n_steps is None else log_every_n_steps),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if isinstance(log_layers, str):
            raise ValueError(f"log_layers must be a list of globs, got {log_layers!r}")
        self.sample = sample
        self.what_if = what_if
        self.dirpath = dirpath
        self.log_layers = tuple(log_layers)
        self.log_every_n_steps = log_every_n_steps
        self.latest: StatisticsRows | None = None
        """The rows of the last interval."""
        self.listeners: list[Listener] = []
        """Called with every sampled step as it ends; see `sampling.Listener`."""
        self._steps = SampledSteps(every_n_steps, seed)
        limits = Limits(
            clamped_mass=warn_clamped_mass, underflow=warn_underflow, nonfinite=warn_nonfinite
        )
        self._warnings = Warnings(limits)
        self._sampler: StepSampler | None = None
        self._writer: StatisticsWriter | None = None
        self._losses = StepLosses()
        self._loss_writer: LossWriter | None = None
        self._begun = 0
        self._named: list[str] = []
        self._logged_at = 0
        self._interval = 1
        self._running = self._failed = False
        self._settings: dict[str, Any] = {
            "every_n_steps": every_n_steps,
            "sample": sample,
            "what_if": what_if,
            "log_layers": list(log_layers),
            "log_every_n_steps": log_every_n_steps,
            "limits": asdict(limits),
            "seed": seed,
        }

    @override
    def settings(self) -> dict[str, Any]:
        """The options that decide what it does."""
        return self._settings

    # -- set-up ---------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer without a table of formats."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _plugin(trainer)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse globs that match nothing."""
        precision_map = _precision_map(trainer)
        matched = [name for glob in self.log_layers for name in precision_map.matching(glob)]
        self._named = list(dict.fromkeys(matched))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Observe the layers from here on."""
        step = trainer.global_step
        trainers: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        self._interval = self.log_every_n_steps or trainers or self._steps.every_n_steps
        self._logged_at, self._running, self._failed = step, True, False
        self._safely(self._open, trainer, run_of(trainer).directory(self), step)

    def _open(self, trainer: L.Trainer, directory: Path | None, step: int) -> None:
        table = _precision_map(trainer)
        linears = {n: layer for n, layer in table.layers.items() if isinstance(layer, FPLinear)}
        self._losses = StepLosses()
        self._sampler = StepSampler(
            linears, self.sample, self._steps, what_if=self.what_if, listeners=self.listeners
        )
        if self.what_if:
            table.follow(True)
        table.scale_history.take_amax_record()  # what was before this fit
        if directory is not None:
            self._writer = StatisticsWriter(directory, step=step)
            self._loss_writer = LossWriter(directory)

    # -- sampled steps --------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to collect, if this is the first micro-batch of a sampled step."""
        self._begun = trainer.global_step
        if self._sampler is not None:
            self._safely(self._rewind_to, trainer.global_step)
            self._safely(self._sampler.before_batch, trainer.global_step)

    def sample_next(self) -> None:
        """Sample the next step to begin as well, out of turn. Call alike on all ranks."""
        self._steps.asked = True

    def note_grad_norm(self, norm: Tensor) -> None:
        """Have `loss.csv` tell the norm of this step's gradient; it is not computed for that.

        Args:
            norm: floating-point scalar, on any device; call before the batch ends.
        """
        self._losses.note_grad_norm(norm)

    def _rewind_to(self, step: int) -> None:
        """Where the run was rolled back, so are its records."""
        if step < self._logged_at:
            self._logged_at = step
            if self._writer is not None:
                self._writer.rewind(step)

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take in what backward recorded."""
        if self._sampler is not None:
            self._safely(self._sampler.after_backward)

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """End a sampled step; log at the end of an interval."""
        step = trainer.global_step
        if self._sampler is not None:
            self._safely(self._sampler.after_batch, step)
            # In manual optimization nobody has divided the loss.
            divided_by = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            device = trainer.strategy.root_device
            self._safely(self._losses.add, self._begun + 1, outputs, divided_by, device)
        if step // self._interval > self._logged_at // self._interval:
            self._log(trainer, pl_module)

    # -- log intervals --------------------------------------------------------------------------

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule | None) -> None:
        """All ranks take part, or none: a rank that has failed says so before the collectives."""
        if not self._running:
            return
        self._logged_at = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self._failed, all=False):
            self._close()
        else:
            self._safely(self._log_interval, trainer, pl_module)

    def _log_interval(self, trainer: L.Trainer, pl_module: L.LightningModule | None) -> None:
        sampled = [] if self._sampler is None else self._sampler.over_ranks()
        watched = _precision_map(trainer).scale_history.take_amax_record()
        losses = self._losses.take(lambda x: trainer.strategy.reduce(x, reduce_op="mean"))
        if self._loss_writer is not None:
            self._loss_writer.append(losses)
        self._report(trainer, pl_module, statistics_rows(sampled, watched))

    def _report(
        self, trainer: L.Trainer, pl_module: L.LightningModule | None, rows: StatisticsRows
    ) -> None:
        self.latest = rows
        step = trainer.global_step
        share = flops_share(_plugin(trainer))
        scalars = {**summary(rows), "fp8/share": share}
        if pl_module is not None:
            shown = {name: scalars[name] for name in ("fp8/share", "fp8/clamped_mass/max")}
            pl_module.log_dict(
                shown, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1
            )
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics({**scalars, **per_layer(rows, self._named)}, step)
        if self._writer is not None:
            self._writer.append(rows.columns(step))
        for warning in self._warnings.of(rows):
            log.warning("%s", warning)

    # -- the end --------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what is left, and write everything out."""
        if trainer.global_step > self._logged_at:
            self._log(trainer, None)
        self._close()

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Write everything out; what other ranks have is lost, for they may not come."""
        if self._running and trainer.world_size == 1:
            self._safely(self._log_interval, trainer, None)
        self._close()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the layers as they were."""
        if stage == "fit" and self.what_if:
            self._safely(_precision_map(trainer).follow, False)
        self._close()

    def _close(self) -> None:
        self._running = False
        writer, self._writer = self._writer, None
        self._loss_writer = None
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.close()
        if writer is not None:
            try:
                writer.flush()  # also after a failure: what was measured before it is good
            except Exception:
                self._fail()

    def _safely(self, function: Callable[..., None], *args: Any) -> None:
        """Telemetry may not end a run."""
        if self._failed:
            return
        try:
            function(*args)
        except Exception:
            self._fail()

    def _fail(self) -> None:
        """In an except clause: say so, once."""
        if not self._failed:
            log.exception("ClampMonitor failed; the training goes on, its statistics end here")
        self._failed = True
        if self._sampler is not None:
            self._sampler.close()

    # -- state ----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """The step sampled last: a resumed run samples the steps that the whole run would have."""
        return {"version": 1, "sampled_at": self._steps.last, "sample_next": self._steps.asked}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._steps.last = int(state_dict["sampled_at"])
        self._steps.asked = bool(state_dict.get("sample_next", False))


def _plugin(trainer: L.Trainer) -> Any:
    plugin = trainer.precision_plugin
    if not isinstance(getattr(plugin, "precision_map", None), PrecisionMap):
        raise ValueError(
            f"ClampMonitor needs a precision plugin of lightning_fp, got {type(plugin).__name__};"
            " use Trainer(plugins=FP8Precision(...), callbacks=[ClampMonitor()])"
        )
    return plugin


def _precision_map(trainer: L.Trainer) -> PrecisionMap:
    return _plugin(trainer).precision_map
