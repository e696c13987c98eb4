"""MismatchMonitor: how far training is from the rollout engine, and whether that grows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_fp.callbacks.mismatch.mismatch_remedy import raised_formats, write_formats
from lightning_fp.callbacks.mismatch.mismatch_tally import MismatchTally, RankFailedError
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.callbacks.run.run_log import RunLog
from lightning_fp.layers import FormatLike, PrecisionMap, linear_format
from lightning_fp.metrics.mismatch_names import ALIASES, Aliases
from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.records.events import Suspicion
from lightning_fp.records.mismatch_rows import MismatchWriter
from lightning_fp.stability import RandomState
from lightning_fp.stability.detect.mismatch_detector import MismatchDecision, MismatchDetector
from lightning_fp.state_version import check_version

log = logging.getLogger(__name__)

STATE_VERSION = 1

Logprobs = tuple[Tensor, Tensor, Tensor | None]
"""rollout_logprobs, train_logprobs and mask, [batch, tokens] each."""

Hook = Callable[[L.Trainer, L.LightningModule, Any], Logprobs]
"""From the Trainer, its module and a batch to log-probabilities of sampled tokens."""

Act = Literal["log", "raise-precision"]

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
        dirpath: where to write; None takes what another callback names, else the trainer's log
            directory.

    Raises:
        ValueError: for an option out of range; at setup if precision is to be raised and the
            plugin has no table of formats; in the first measured step for what are no
            log-probabilities. Later ones are logged, and the training goes on without the monitor.
    """

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
        for name, value in (("every_n_steps", every_n_steps), ("hold_steps", hold_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
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
        self.detector = MismatchDetector() if detector is None else detector
        self.act: Act | None = act
        self.latest: dict[str, float] | None = None
        """The metrics of the last measured step, the same on every rank."""
        self._hook = logprobs
        self._every_n_steps, self._hold_steps = every_n_steps, hold_steps
        self._raise_to = None if raise_to is None else linear_format(raise_to)
        self._aliases = set(ALIASES.get(aliases, {}))
        name = getattr(logprobs, "__qualname__", type(logprobs).__name__)
        self._source = "MismatchMonitor.update" if logprobs is None else f"logprobs={name}"
        self._tally = MismatchTally(self._source, aliases, threshold)
        self._settings: dict[str, Any] = {
            "logprobs": None if logprobs is None else name,
            "every_n_steps": every_n_steps,
            "detector": asdict(self.detector),
            "act": act,
            "raise_to": None if self._raise_to is None else self._raise_to.name,
            "hold_steps": hold_steps,
            "aliases": aliases,
            "threshold": threshold,
        }
        self._detected = self.detector.init()
        self._measured_at = -1
        self._quiet_until = 0
        self._told = False
        self._open: int | None = None
        self._due = self._running = self._failed = self._worked = self._warned_empty = False
        self._trainer: L.Trainer | None = None
        self._log = RunLog(None)
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
        wants_table = stage == "fit" and self.act == "raise-precision"
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
        self._open, self._running = None, True
        self._failed = self._worked = self._warned_empty = False
        self._log = run_of(trainer).log(self)
        directory = run_of(trainer).directory(self)
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
            self._due = self._running and due
            if self._due and self._hook is not None and isinstance(plugin, LayerPrecision):
                plugin.boundary()  # the hook asks in the formats of the step to come
        if self._due and self._hook is not None:
            self._guarded(self._ask, self._hook, trainer, pl_module, batch)

    def _ask(self, hook: Hook, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        table = _table(trainer)
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
                f"MismatchMonitor.update must not be called beside {self._source}; give one of them"
            )
        if self._trainer is None:
            raise ValueError(
                "MismatchMonitor.update must be called in a training step; put the monitor into"
                " Trainer(callbacks=[...])"
            )
        table = _table(self._trainer)
        replayed = table is not None and table.frozen
        if self._due and self._open is not None and self._trainer.training and not replayed:
            self._guarded(self._tally.add, (rollout_logprobs, train_logprobs, mask))

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """At the end of a measured step: write down what was measured, and judge it."""
        if self._open is None or trainer.global_step == self._open:
            return
        begun, self._open = self._open, None
        if self._due and self._running:
            self._due = False
            self._guarded(self._end_step, trainer, pl_module, begun)
            self._tally.clear()

    def _end_step(self, trainer: L.Trainer, module: L.LightningModule, begun: int) -> None:
        try:
            values = self._tally.values(trainer, failed=self._failed)
        except RankFailedError:
            self._running = False
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
        self._record(begun + 1, values)
        if self.act is not None:
            self._judge(trainer, begun + 1, values)

    def _record(self, step: int, values: dict[str, float]) -> None:
        """Only rank 0 has loggers and a writer."""
        named = {n if n in self._aliases else f"mismatch/{n}": v for n, v in values.items()}
        self._log.scalars(named, step)
        if self._writer is not None:
            try:
                self._writer.append(step, values)
            except OSError:
                self._writer = None
                log.exception("mismatch.csv cannot be written; the training goes on without it")

    # -- early warning --------------------------------------------------------------------------

    def _judge(self, trainer: L.Trainer, step: int, values: dict[str, float]) -> None:
        """Alike on all ranks: the values are."""
        self._detected, decision = self.detector.step(
            self._detected, abs_diff=values["logprob_abs_diff_mean"], k3=values["k3_kl"]
        )
        if not decision.raised:
            self._told = False
        elif step >= self._quiet_until:  # else what was done shall have time to work
            action = self._raise(trainer, step, decision) if self.act == "raise-precision" else ""
            if action or not self._told:
                self._warn(step, decision, values, action)
            self._told = True

    def _raise(self, trainer: L.Trainer, step: int, decision: MismatchDecision) -> str:
        """What was done, in words; nothing if there is nothing left to do."""
        plugin = trainer.precision_plugin
        if not isinstance(plugin, LayerPrecision):
            return ""
        formats = raised_formats(plugin, self._raise_to)
        if not formats:
            if self._told:
                return ""
            fp16_next = self._raise_to is None and plugin.scaler is None
            return "no layer is left in FP8; for fp16 take FP16Precision" if fp16_next else ""
        changes = write_formats(plugin.precision_map, formats, decision.reason)
        self._quiet_until = step + self._hold_steps
        self._detected = self.detector.precision_changed(self._detected)
        ways = sorted({f"{before} -> {after}" for before, after in changes.values()})
        layers = f"{len(changes)} layer{'s' if len(changes) != 1 else ''}"
        return f"{layers} {', '.join(ways)}; the rollout engine has to follow"

    def _warn(
        self, step: int, decision: MismatchDecision, values: dict[str, float], action: str
    ) -> None:
        optional = {"usual": decision.usual, "onset": decision.onset, "factor": decision.factor}
        numbers = {
            "mismatch/k3_kl": values["k3_kl"],
            "mismatch/logprob_abs_diff_mean": values["logprob_abs_diff_mean"],
            "mismatch/extreme_disagreement": values["extreme_disagreement"],
            **{name: float(value) for name, value in optional.items() if value is not None},
        }
        event = Suspicion(step=step, reason=decision.reason, numbers=numbers, action=action)
        self._log.write(event)
        self._log.count("mismatch_warnings", step)

    # -- failures and the end -------------------------------------------------------------------

    def _guarded(self, function: Callable[..., None], *args: Any) -> None:
        """What is wrong from the start is raised; what goes wrong later may not end the run."""
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
        if self._running and not self._worked and trainer.is_global_zero:
            log.warning(
                "MismatchMonitor has measured nothing: give it a hook with logprobs=, or call its"
                " update(rollout_logprobs, train_logprobs, mask) in the training step"
            )

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The next fit begins anew."""
        if stage == "fit":
            self._trainer, self._writer, self._running = None, None, False

    # -- state ----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """The detector's state, and when precision was raised."""
        return {
            "version": STATE_VERSION,
            "detector": self.detector.state_dict(self._detected),
            "measured_at": self._measured_at,
            "quiet_until": self._quiet_until,
            "told": self._told,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        check_version(state_dict, STATE_VERSION, "MismatchMonitor state must have version")
        self._detected = self.detector.load_state_dict(state_dict["detector"])
        self._measured_at = int(state_dict["measured_at"])
        self._quiet_until = int(state_dict["quiet_until"])
        self._told = bool(state_dict["told"])


def _table(trainer: L.Trainer) -> PrecisionMap | None:
    plugin = trainer.precision_plugin
    return plugin.precision_map if isinstance(plugin, LayerPrecision) else None
