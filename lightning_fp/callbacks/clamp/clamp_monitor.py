"""ClampMonitor: what FP8 does to every layer's numbers, as rows, curves and warnings.

A step whose casts are looked at takes 1.4 times as long, eager (benchmarks/README.md). So one step
in a window is sampled; what delayed scaling knows anyway, amax and headroom, is taken from every
step. Sums stay on the device until the log interval ends, and are reduced over ranks there, all
layers in one piece. The monitor changes no format: the fallback's limits, gates of a rollout and
the user act on what it measures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from typing_extensions import override

from lightning_fp.callbacks.run.run import Run, RunCallback, run_of
from lightning_fp.choices import check_at_least
from lightning_fp.layers import FPLinear, LinearFormat
from lightning_fp.records import StatisticsRows, StatisticsWriter, statistics_rows
from lightning_fp.telemetry.casts.remedies import Limits, Warnings
from lightning_fp.telemetry.casts.sampling import Listener, SampledSteps, StepSampler
from lightning_fp.telemetry.casts.summary import (
    COLUMNS,
    SUMMARIES,
    flops_share,
    of_column,
    per_layer,
    summary,
    why_nothing,
)

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

    publishes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(SUMMARIES, ""),
        **{name: "what_if=True" if name.startswith("what_if_") else "" for name in COLUMNS},
    }
    writes_loss: ClassVar[bool] = True

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
        check_at_least(1, every_n_steps=every_n_steps, sample=sample)
        check_at_least(1, log_every_n_steps=log_every_n_steps)
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
        self._warnings = Warnings(
            Limits(
                clamped_mass=warn_clamped_mass, underflow=warn_underflow, nonfinite=warn_nonfinite
            )
        )
        self._sampler: StepSampler | None = None
        self._writer: StatisticsWriter | None = None
        self._logged_at = 0
        self._interval = 1
        self._run: Run | None = None
        self._failed = False

    @override
    def settings(self) -> dict[str, Any]:
        """The options that decide what it does."""
        return {
            "every_n_steps": self._steps.every_n_steps,
            "sample": self.sample,
            "what_if": self.what_if,
            "log_layers": list(self.log_layers),
            "log_every_n_steps": self.log_every_n_steps,
            "limits": asdict(self._warnings.limits),
            "seed": self._steps.seed,
        }

    @override
    def published_every(self, interval: int) -> tuple[int, str]:
        """Once per log interval."""
        return self.log_every_n_steps or interval, "logs"

    @override
    def cannot_measure(
        self, name: str, trainer: L.Trainer, formats: Collection[LinearFormat]
    ) -> str:
        return why_nothing(name, formats)

    # -- set-up ---------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer without a table of formats."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.plugin(trainer)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse globs that match nothing."""
        self._named(trainer)

    def _named(self, trainer: L.Trainer) -> list[str]:
        table = self.plugin(trainer).precision_map
        return list(
            dict.fromkeys(name for glob in self.log_layers for name in table.matching(glob))
        )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Observe the layers from here on."""
        # Of a Trainer that never logs it is 0.
        step = trainer.global_step
        trainers: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        self._interval = self.log_every_n_steps or trainers or self._steps.every_n_steps
        self._logged_at, self._run, self._failed = step, run_of(trainer), False
        self._safely(self._open, trainer, self._run.directory(self), step)

    def _open(self, trainer: L.Trainer, directory: Path | None, step: int) -> None:
        table = self.plugin(trainer).precision_map
        linears = {n: layer for n, layer in table.layers.items() if isinstance(layer, FPLinear)}
        self._sampler = StepSampler(
            linears, self.sample, self._steps, what_if=self.what_if, listeners=self.listeners
        )
        if self.what_if:
            table.follow(True)
        table.scale_history.take_amax_record()  # what was before this fit
        if directory is not None:
            self._writer = StatisticsWriter(directory, step=step)

    # -- sampled steps --------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Begin to collect, if this is the first micro-batch of a sampled step."""
        if self._sampler is not None:
            self._safely(self._rewind_to, trainer.global_step)
            self._safely(self._sampler.before_batch, trainer.global_step)

    def sample_next(self) -> None:
        """Sample the next step to begin as well, out of turn. Call alike on all ranks."""
        self._steps.asked = True

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
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """End a sampled step; log at the end of an interval."""
        step = trainer.global_step
        if self._sampler is not None:
            self._safely(self._sampler.after_batch, step)
        # Not `step % interval`: the count may go up by two, and step over a multiple.
        if step // self._interval > self._logged_at // self._interval:
            self._log(trainer, pl_module)

    # -- log intervals --------------------------------------------------------------------------

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule | None) -> None:
        """All ranks take part, or none: a rank that has failed says so before the collectives."""
        run, began = self._run, self._logged_at // self._interval * self._interval
        if run is None:
            return
        self._logged_at = trainer.global_step
        # A rank whose monitor has failed would be missing in `over_ranks`, and the others wait.
        if trainer.strategy.reduce_boolean_decision(self._failed, all=False):
            self._close()
        else:
            self._safely(self._log_interval, run, trainer, pl_module, began)

    def _log_interval(
        self, run: Run, trainer: L.Trainer, pl_module: L.LightningModule | None, began: int
    ) -> None:
        sampled = [] if self._sampler is None else self._sampler.over_ranks()
        watched = self.plugin(trainer).precision_map.scale_history.take_amax_record()
        self.latest = rows = statistics_rows(sampled, watched)
        step, named = trainer.global_step, self._named(trainer)
        values = {**summary(rows), "fp8/share": flops_share(self.plugin(trainer))}
        for name in run.board.followed & set(COLUMNS):
            run.board.publish(name, step, of_column(rows, name), since=began)
        if pl_module is not None:
            # For the progress bar and `callback_metrics`. Loggers get theirs below, at the count of
            # optimizer steps; `batch_size`, since Lightning demands it of a step that takes a
            # `dataloader_iter`. The bar has room for one number of ours.
            for name in ("fp8/share", "fp8/clamped_mass/max"):
                pl_module.log(
                    name,
                    values[name],
                    prog_bar=name == "fp8/share",
                    logger=False,
                    on_step=True,
                    on_epoch=False,
                    batch_size=1,
                )
        run.show({**values, **per_layer(rows, named)}, step, since=began)
        if self._writer is not None:
            self._writer.append(rows.columns(step))
        if trainer.is_global_zero:
            backend = self.plugin(trainer).precision_map.known.backend
            for warning in self._warnings.of(rows, backend):
                log.warning("%s", warning)

    # -- the end --------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what is left, and write everything out."""
        if trainer.global_step > self._logged_at:
            self._log(trainer, None)  # Lightning allows no `self.log` in this hook
        self._close()

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Write everything out; what other ranks have is lost, for they may not come."""
        if trainer.world_size == 1:
            self._log(trainer, None)
        self._close()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the layers as they were."""
        if stage == "fit" and self.what_if:
            self._safely(self.plugin(trainer).precision_map.follow, False)
        self._close()

    def _close(self) -> None:
        self._run = None
        writer, self._writer = self._writer, None
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
