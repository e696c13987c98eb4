"""MismatchMonitor: how far training is from the rollout engine, and whether that grows.

Policy gradients take the engine's samples for the trainer's own, but the two round in different
places. Log-probabilities of the sampled tokens by both sides tell how far apart they are, if both
are of the same weights: so the trainer's are those from before the step. The monitor only brings
them to where they are measured (`mismatch_tally`) and judged (`early_warning`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, get_args

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_fp.callbacks.run.run import Run, RunCallback, run_of
from lightning_fp.callbacks.run.run_info import table_of
from lightning_fp.choices import check_at_least
from lightning_fp.layers import FormatLike, linear_format
from lightning_fp.metrics.mismatch_names import Aliases
from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.records.mismatch_rows import MismatchWriter
from lightning_fp.stability import RandomState
from lightning_fp.stability.detect.mismatch_detector import MismatchDetector
from lightning_fp.state_version import check_version
from lightning_fp.telemetry.mismatch.early_warning import Act, EarlyWarning
from lightning_fp.telemetry.mismatch.mismatch_tally import MismatchTally, RankFailedError

log = logging.getLogger(__name__)

STATE_VERSION = 1

Logprobs = tuple[Tensor, Tensor, Tensor | None]
"""rollout_logprobs, train_logprobs and mask, [batch, tokens] each."""

Hook = Callable[[L.Trainer, L.LightningModule, Any], Logprobs]
"""From the Trainer, its module and a batch to log-probabilities of sampled tokens."""

SHOWN = ("k3_kl", "logprob_abs_diff_mean")
"""What goes to `trainer.callback_metrics`, as `mismatch/<name>`."""


class MismatchMonitor(RunCallback):
    """Measures the training-inference mismatch of every step, and warns when it grows.

    The log-probabilities of sampled tokens come from a hook, or the training step pushes them with
    `update`. `TrainingInferenceMismatch` over the step's micro-batches and all ranks goes to the
    loggers as `mismatch/<name>`, to `<dirpath>/mismatch.csv`, and in part to
    `trainer.callback_metrics`. A `MismatchDetector` watches it: a growing mismatch comes before a
    collapse. What the hook does leaves no trace in the run but time.
    docs/training-inference-mismatch.md explains the rest.

    >>> monitor = MismatchMonitor(act="raise-precision")
    >>> trainer = L.Trainer(accelerator="cpu", callbacks=[monitor])
    >>> # in the training step: monitor.update(rollout_logprobs, train_logprobs, mask)

    Args:
        logprobs: `logprobs(trainer, module, batch)` gives rollout_logprobs, train_logprobs and
            mask, [batch, tokens] each, as `TrainingInferenceMismatch.update` takes them. It is
            called before each micro-batch of a measured step, without gradients, in the formats of
            the training step, and outside of its statistics. None: the training step pushes.
        every_n_steps: one step in so many is measured.
        detector: what growth is worth a warning.
        act: "log" warns; "raise-precision" also gives layers more mantissa bits, from FP8 to the
            base's format, and from bf16 to fp16 where the plugin scales its loss; None only
            measures.
        raise_to: the format to raise all layers to instead, e.g. "fp16".
        hold_steps: optimizer steps after such a change without another one, or a warning.
        aliases: log the metrics also under the names that "trl", "nemo-rl" or "slime" gives them.
        threshold: of importance weights, see `TrainingInferenceMismatch`.
        dirpath: where to write; None takes the run's directory.

    Raises:
        ValueError: for an option out of range; at setup if precision is to be raised and the
            plugin has no table of formats; in the first measured step for what are no
            log-probabilities. Later ones are logged, and the training goes on without the monitor.
    """

    publishes: ClassVar[Mapping[str, str]] = {"mismatch/*": ""}

    def __init__(
        self,
        logprobs: Hook | None = None,
        *,
        every_n_steps: int = 1,
        detector: MismatchDetector | None = None,
        act: Act | None = "log",
        raise_to: FormatLike | None = None,
        hold_steps: int = 256,
        aliases: Aliases = "verl",
        threshold: float = 2.0,
        dirpath: str | Path | None = None,
    ) -> None:
        check_at_least(1, every_n_steps=every_n_steps, hold_steps=hold_steps)
        if act is not None and act not in get_args(Act):
            raise ValueError(f"act must be 'log', 'raise-precision' or None, got {act!r}")
        if logprobs is not None and not callable(logprobs):
            raise ValueError(
                f"logprobs must be a function of (trainer, module, batch), got {logprobs!r}"
            )
        if raise_to is not None and act != "raise-precision":
            raise ValueError(
                f"raise_to must be None unless act is 'raise-precision', got {raise_to!r}"
            )
        self.dirpath = dirpath
        to = None if raise_to is None else linear_format(raise_to)
        self._warning = EarlyWarning(detector or MismatchDetector(), act, to, hold_steps)
        self.latest: dict[str, float] | None = None
        """The metrics of the last measured step, the same on every rank."""
        self._hook = logprobs
        self._every_n_steps = every_n_steps
        name = getattr(logprobs, "__qualname__", type(logprobs).__name__)
        source = "MismatchMonitor.update" if logprobs is None else f"logprobs={name}"
        self._tally = MismatchTally(source, aliases, threshold)
        self._settings: dict[str, Any] = {
            "logprobs": None if logprobs is None else name,
            "every_n_steps": every_n_steps,
            "detector": asdict(self._warning.detector),
            "act": act,
            "raise_to": None if to is None else to.name,
            "hold_steps": hold_steps,
            "aliases": aliases,
            "threshold": threshold,
        }
        self._measured_at = -1
        self._open: int | None = None
        self._failed = self._worked = self._warned_empty = False
        self._trainer: L.Trainer | None = None
        self._run: Run | None = None
        self._writer: MismatchWriter | None = None

    @override
    def settings(self) -> dict[str, Any]:
        """The options that decide what it does."""
        return self._settings

    # -- set-up ---------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse to raise the precision where nothing can be raised."""
        super().setup(trainer, pl_module, stage)
        plugin = trainer.precision_plugin
        wants_table = stage == "fit" and self._warning.act == "raise-precision"
        if wants_table and not isinstance(plugin, LayerPrecision):
            raise ValueError(
                "act='raise-precision' needs a precision plugin of lightning_fp, got"
                f" {type(plugin).__name__}; use Trainer(plugins=FP8Precision(...)), or act='log'"
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure from here on."""
        self._trainer = trainer
        self._tally.start(trainer.strategy.root_device)
        self._open, self._run = None, run_of(trainer)
        self._failed = self._worked = self._warned_empty = False
        directory = self._run.directory(self)
        self._writer = None if directory is None else MismatchWriter(directory)

    # -- steps ----------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In a measured step: ask the hook, on the weights before the step."""
        step, plugin = trainer.global_step, trainer.precision_plugin
        if self._open is None:
            self._open = step
            due = step // self._every_n_steps > self._measured_at // self._every_n_steps
            self._tally.measuring = self._run is not None and due
            if (
                self._tally.measuring
                and self._hook is not None
                and isinstance(plugin, LayerPrecision)
            ):
                plugin.boundary()  # the hook asks in the formats of the step to come
        if self._tally.measuring and self._hook is not None:
            self._guarded(self._ask, self._hook, trainer, pl_module, batch)

    def _ask(self, hook: Hook, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        # Frozen, the table records no amax and no statistics: these tokens are trained on anyway,
        # and would count twice.
        table = table_of(trainer)
        unseen = nullcontext() if table is None else table.overridden({})
        before = RandomState.capture()
        try:
            with torch.no_grad(), unseen, trainer.precision_plugin.train_step_context():
                given = hook(trainer, module, batch)
        finally:
            before.restore()
        self._tally.add(given)

    def update(
        self, rollout_logprobs: Tensor, train_logprobs: Tensor, mask: Tensor | None = None
    ) -> None:
        """To be called in the training step, where no hook is given.

        Steps that are not measured, and replays of `PrecisionFallback`, take nothing in.

        Args:
            rollout_logprobs: [batch, tokens], of the sampled tokens, by the engine.
            train_logprobs: [batch, tokens], the same tokens by the policy before the step's
                update; gradients are not followed.
            mask: [batch, tokens], 0 for prompt and padding; None counts all.

        Raises:
            ValueError: outside of `fit`, beside a hook; in the first measured step for what are
                no log-probabilities.
        """
        if self._hook is not None:
            raise ValueError(
                f"MismatchMonitor.update must not be called beside {self._tally.source}; give one"
                " of them"
            )
        if self._trainer is None:
            raise ValueError(
                "MismatchMonitor.update must be called in a training step; put the monitor into"
                " Trainer(callbacks=[...])"
            )
        table = table_of(self._trainer)
        replayed = table is not None and table.frozen
        if (
            self._tally.measuring
            and self._open is not None
            and self._trainer.training
            and not replayed
        ):
            self._guarded(self._tally.add, (rollout_logprobs, train_logprobs, mask))

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """At the end of a measured step: write down what was measured, and judge it."""
        if self._open is None or trainer.global_step == self._open:
            return
        begun, self._open = self._open, None
        run = self._run  # None after a failure: on all ranks, or on none
        if self._tally.measuring and run is not None:
            self._tally.measuring = False
            self._guarded(self._end_step, run, trainer, pl_module, begun)
            self._tally.clear()

    def _end_step(
        self, run: Run, trainer: L.Trainer, module: L.LightningModule, begun: int
    ) -> None:
        try:
            values = self._tally.values(failed=self._failed)
        except RankFailedError:
            self._run = None
            return
        except ValueError:
            if not self._worked:
                raise
            if not self._warned_empty:
                log.warning("step %d is not measured", begun + 1, exc_info=True)
            self._warned_empty = True
            return
        if values is None:  # nobody has pushed anything: the next step may do
            return
        self._worked, self._measured_at, self.latest = True, begun, values
        shown = {f"mismatch/{name}": values[name] for name in SHOWN}
        module.log_dict(shown, logger=False, on_step=True, on_epoch=False, batch_size=1)
        aliases = self._tally.aliases
        run.show({n if n in aliases else f"mismatch/{n}": v for n, v in values.items()}, begun + 1)
        self._write(begun + 1, values)
        plugin = trainer.precision_plugin
        owner = plugin if isinstance(plugin, LayerPrecision) else None
        self._warning.judge(owner, run.log(self), begun + 1, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        """Only rank 0 has a writer."""
        if self._writer is not None:
            try:
                self._writer.append(step, values)
            except OSError:
                self._writer = None
                log.exception("mismatch.csv cannot be written; the training goes on without it")

    # -- failures and the end -------------------------------------------------------------------

    def _guarded(self, function: Callable[..., None], *args: Any) -> None:
        """What is wrong from the start is raised; what goes wrong later may not end the run."""
        # The end of a step is a collective, in which this rank tells the others that it has failed.
        if self._failed and function != self._end_step:
            return
        try:
            function(*args)
        except Exception:
            if not self._worked:
                raise
            if not self._failed:
                log.exception("MismatchMonitor failed; the training goes on without it")
            self._failed = True

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if nothing was ever measured."""
        if self._run is not None and not self._worked and trainer.is_global_zero:
            log.warning(
                "MismatchMonitor has measured nothing: give it a hook with logprobs=, or call its"
                " update(rollout_logprobs, train_logprobs, mask) in the training step"
            )

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The next fit begins anew."""
        if stage == "fit":
            self._trainer = self._writer = self._run = None

    # -- state ----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """The detector's state, and when precision was raised."""
        return {
            "version": STATE_VERSION,
            "measured_at": self._measured_at,
            **self._warning.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        check_version(state_dict, STATE_VERSION, "MismatchMonitor state must have version")
        self._measured_at = int(state_dict["measured_at"])
        self._warning.load_state_dict(state_dict)
