"""MismatchMonitor: how far training is from the rollout engine, and whether that grows.

`telemetry.mismatch.mismatch_log` measures and judges, in any loop; these are the hooks. Both sides'
log-probabilities are to be of the same weights: so the trainer's are those from before the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_fp.argument_types import checked
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.callbacks.run.run_info import table_of
from lightning_fp.layers import FormatLike
from lightning_fp.metrics.mismatch_names import Aliases
from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.rl.causes import Causes
from lightning_fp.rl.corrections import Correction
from lightning_fp.rl.origin import SampleOrigin
from lightning_fp.stability import RandomState
from lightning_fp.stability.detect.mismatch_detector import MismatchDetector
from lightning_fp.telemetry.mismatch.early_warning import Act
from lightning_fp.telemetry.mismatch.mismatch_log import MismatchLog, MismatchOptions

log = logging.getLogger(__name__)

Logprobs = (
    tuple[Tensor, Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor | None, SampleOrigin | None]
)
"""rollout_logprobs, train_logprobs and mask, [batch, tokens] each, and where samples come from."""

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
            mask, [batch, tokens] each, as `TrainingInferenceMismatch.update` takes them; fourth,
            where it is known, a `lightning_fp.rl.SampleOrigin`. It is called before each
            micro-batch of a measured step, without gradients, in the formats of the training step,
            and outside of its statistics. None: the training step pushes.
        every_n_steps: one step in so many is measured.
        detector: what growth is worth a warning.
        act: "log" warns; "raise-precision" also gives layers more mantissa bits, from FP8 to the
            base's format, and from bf16 to fp16 where the plugin scales its loss, unless the
            samples' origins show another cause; "by-cause" does so too, and tightens `correction`
            where stale weights or routing are the cause; None only measures.
        raise_to: the format to raise all layers to instead, e.g. "fp16".
        hold_steps: optimizer steps after such a change without another one, or a warning.
        aliases: log the metrics also under the names that "trl", "nemo-rl" or "slime" gives them.
        threshold: of importance weights, see `TrainingInferenceMismatch`.
        correction: the bounds on importance weights that training begins with, by name or as a
            `lightning_fp.rl.Correction`; those in force are in `.correction`.
        dirpath: where to write; None takes the run's directory.

    Raises:
        ValueError: for an option out of range; at setup if precision is to be raised and the
            plugin has no table of formats; in the first measured step for what are no
            log-probabilities. Later ones are logged, and training continues without the monitor.
    """

    publishes: ClassVar[Mapping[str, str]] = {"mismatch/*": ""}

    @checked
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
        correction: Correction | str | None = None,
        dirpath: str | Path | None = None,
    ) -> None:
        options = MismatchOptions(
            every_n_steps=every_n_steps,
            detector=detector or MismatchDetector(),
            act=act,
            raise_to=raise_to,
            hold_steps=hold_steps,
            aliases=aliases,
            threshold=threshold,
            correction=correction,
        )
        if logprobs is not None and not callable(logprobs):
            raise ValueError(
                f"logprobs must be a function of (trainer, module, batch), got {logprobs!r}"
            )
        self.dirpath, self._hook = dirpath, logprobs
        self._name = getattr(logprobs, "__qualname__", type(logprobs).__name__)
        source = "MismatchMonitor.update" if logprobs is None else f"logprobs={self._name}"
        self._log = MismatchLog(options, source)
        self._trainer: L.Trainer | None = None

    @property
    def latest(self) -> dict[str, float] | None:
        """The metrics of the last measured step, the same on every rank."""
        return self._log.latest

    @property
    def causes(self) -> Causes | None:
        """What its mismatch came from; None where no origin was given."""
        return self._log.causes

    @property
    def correction(self) -> Correction | None:
        """The bounds on importance weights in force: `monitor.correction.weights(...)`."""
        return self._log.warning.correction

    @override
    def settings(self) -> dict[str, Any]:
        """The options that decide what it does."""
        hook = None if self._hook is None else self._name
        return {"logprobs": hook, **self._log.options.settings()}

    # -- set-up ---------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse to raise the precision where nothing can be raised."""
        super().setup(trainer, pl_module, stage)
        plugin = trainer.precision_plugin
        wants_table = stage == "fit" and self._log.options.act == "raise-precision"
        if wants_table and not isinstance(plugin, LayerPrecision):
            raise ValueError(
                "act='raise-precision' needs a precision plugin of lightning_fp, got"
                f" {type(plugin).__name__}; use Trainer(plugins=FP8Precision(...)), or act='log'"
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure from here on."""
        self._trainer, run, plugin = trainer, run_of(trainer), trainer.precision_plugin
        owner = plugin if isinstance(plugin, LayerPrecision) else None
        device = trainer.strategy.root_device
        self._log.begin(owner, run, run.log(self), run.directory(self), device)

    # -- steps ----------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In a measured step: ask the hook, on the weights before the step."""
        plugin, hook = trainer.precision_plugin, self._hook
        begins = self._log.before_batch(trainer.global_step)
        if hook is None or not self._log.measuring:
            return
        if begins and isinstance(plugin, LayerPrecision):
            plugin.boundary()  # the hook asks in the formats of the step to come
        self._log.guarded(self._ask, hook, trainer, pl_module, batch)

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
        self._log.tally.add(given)

    def update(
        self,
        rollout_logprobs: Tensor,
        train_logprobs: Tensor,
        mask: Tensor | None = None,
        *,
        origin: SampleOrigin | None = None,
    ) -> None:
        """To be called in the training step, where no hook is given.

        Steps that are not measured, and replays of `PrecisionFallback`, take nothing in.

        Args:
            rollout_logprobs: [batch, tokens], of the sampled tokens, by the engine.
            train_logprobs: [batch, tokens], the same tokens by the policy before the step's
                update; gradients are not followed.
            mask: [batch, tokens], 0 for prompt and padding; None counts all.
            origin: what is known of the samples, by which causes are told apart.

        Raises:
            ValueError: outside of `fit`, beside a hook; in the first measured step for what are
                no log-probabilities.
        """
        if self._hook is not None:
            raise ValueError(
                f"MismatchMonitor.update must not be called beside {self._log.tally.source}; give"
                " one of them"
            )
        if self._trainer is None:
            raise ValueError(
                "MismatchMonitor.update must be called in a training step; put the monitor into"
                " Trainer(callbacks=[...])"
            )
        table = table_of(self._trainer)
        replayed = table is not None and table.frozen
        if self._trainer.training and not replayed:
            self._log.add((rollout_logprobs, train_logprobs, mask, origin))

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """At the end of a measured step: write down what was measured, and judge it."""
        self._log.after_batch(trainer.global_step, partial(_in_metrics, pl_module))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if nothing was ever measured."""
        if self._log.running and not self._log.worked and trainer.is_global_zero:
            log.warning(
                "MismatchMonitor has measured nothing: give it a hook with logprobs=, or call its"
                " update(rollout_logprobs, train_logprobs, mask) in the training step"
            )

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The next fit begins anew."""
        if stage == "fit":
            self._trainer = None
            self._log.end()

    # -- state ----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """The detector's state, and when precision was raised."""
        return self._log.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._log.load_state_dict(state_dict)


def _in_metrics(module: L.LightningModule, values: Mapping[str, float]) -> None:
    shown = {f"mismatch/{name}": values[name] for name in SHOWN}
    module.log_dict(shown, logger=False, on_step=True, on_epoch=False, batch_size=1)
