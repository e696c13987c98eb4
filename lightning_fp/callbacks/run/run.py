"""One fit, as all callbacks of ours share it: where it writes, its log, its steps, its board.

The first callback of ours puts a `Run` in front of the Trainer's callbacks, so that it hears of
everything before they do, and once for all of them: what a step's loss was is decided here and
nowhere else, and whoever needs it finds the record when his own hook is called.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.argument_types import built
from lightning_fp.callbacks.run.run_directory import run_directories
from lightning_fp.callbacks.run.run_info import run_info, table_of
from lightning_fp.callbacks.run.run_settings import log_settings, settings_by_class
from lightning_fp.events import Note
from lightning_fp.layers import Change, LinearFormat
from lightning_fp.plugins import LayerPrecision
from lightning_fp.plugins.guard import StepGuard
from lightning_fp.records.event_log import EventLog
from lightning_fp.records.run import RunInfo, write_run
from lightning_fp.stability.keep.hyperparameters import hyperparameters
from lightning_fp.state_version import reads
from lightning_fp.stepping.gradients import gradient_norm
from lightning_fp.telemetry import OptimizerStep, RunTelemetry, StepRecorder
from lightning_fp.telemetry.loss_files import LossFiles

log = logging.getLogger("lightning_fp.fallback")

STATE_KEY = "lightning_fp.run"
"""Where a checkpoint keeps how far the logs had come, by callback."""

DIRECTORIES_KEY = "lightning_fp.directories"
"""Where it keeps which directory each callback wrote to: there a resumed run goes on."""


class RunCallback(L.Callback):
    """A callback that writes to the run's directory."""

    dirpath: str | Path | None = None
    """Where it writes; None takes what another callback of the run names, else the trainer's log
    directory, or `runs/<module>/version_n` without a logger. A run that begins where another has
    left records writes to a version below."""

    run_dir: Path | None = None
    """Where it has written to since the start of training; None on ranks that do not write."""

    publishes: ClassVar[Mapping[str, str]] = {}
    """The names that it publishes on the run's board, or globs over them; each with the option it
    takes, or "" if it takes none."""

    writes_loss: ClassVar[bool] = False
    """Whether `loss.csv` belongs into its directory."""

    needs_grad_norm: ClassVar[bool] = False
    """Whether the norm of the gradient is worth computing where nothing else does."""

    judges_layers: ClassVar[bool] = False
    """Whether it measures or changes all layers together, so that all ranks must have the same."""

    def published_every(self, interval: int) -> tuple[int, str]:
        """How often it publishes, for those who wait for a value.

        Args:
            interval: the Trainer's log interval, in steps.

        Returns:
            Steps from one value to the next at most, and what it does then, as a verb.
        """
        return 1, "publishes"

    def cannot_measure(
        self, name: str, trainer: L.Trainer, formats: Collection[LinearFormat]
    ) -> str:
        """Why a measurement can never be made, for those who would wait for it in vain.

        Args:
            name: one of `publishes`.
            trainer: the Trainer, at the start of a fit.
            formats: those that the layers are in.

        Returns:
            The reason; "" where it can be made.
        """
        return ""

    def has_to_tell(self, trainer: L.Trainer) -> bool:
        """Whether it takes part from the start, and not only when something happens.

        While no callback has anything to tell there is no `Run`: see `Run.wake`.

        Args:
            trainer: the Trainer, at the start of a fit.
        """
        return True

    def settings(self) -> dict[str, Any]:
        """The options, as plain data for the records and the loggers."""
        return {}

    def plugin(self, trainer: L.Trainer) -> LayerPrecision:
        """The precision plugin, where the callback cannot do without a table of formats.

        Raises:
            ValueError: if it is none of ours.
        """
        plugin, name = trainer.precision_plugin, type(self).__name__
        if not isinstance(plugin, LayerPrecision):
            raise ValueError(
                f"{name} needs a precision plugin of lightning_fp, got {type(plugin).__name__};"
                f" take Trainer(plugins=FP8Precision(...), callbacks=[{name}(...)])"
            )
        return plugin

    def takes_part(self, trainer: L.Trainer) -> bool:
        """Whether the Trainer trains the run of this callback, for what hears of it otherwise.

        A tuner in mid-run, such as Lightning's LearningRateFinder, takes all callbacks away, trains
        by itself for a while, and puts everything back.

        Args:
            trainer: the Trainer.
        """
        return any(callback is self for callback in _callbacks(trainer))

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Of a fit: see that it has its `Run`."""
        if stage == "fit":
            Run.begin(trainer)


class Run(RunTelemetry, L.Callback):
    """What belongs to a fit and not to one callback."""

    def __init__(self) -> None:
        super().__init__()
        self.over = False
        """Whether the fit has ended, well or not."""
        self._directories: dict[int, Path | None] = {}
        self._logs: dict[Path | None, EventLog] = {}
        self._positions: dict[str, int | None] = {}
        self._written_to: dict[str, str] = {}
        self._unsubscribe: Callable[[], object] | None = None
        self._files: LossFiles | None = None
        self._computes_norm = False

    @staticmethod
    def begin(trainer: L.Trainer) -> Run:
        """The run of this fit; made if it is not there yet."""
        # Lightning calls this round of `setup` on the list that it began with, and takes a new list
        # for the next hook. Changing the list itself would call one callback twice.
        callbacks = _callbacks(trainer)
        runs = [callback for callback in callbacks if isinstance(callback, Run)]
        # That of an earlier fit is in the list until here, for checkpoints that are saved after it.
        if runs and not runs[0].over:
            return runs[0]
        run = Run()
        rest = [callback for callback in callbacks if callback not in runs]
        trainer.callbacks = [run, *rest]  # pyright: ignore[reportAttributeAccessIssue]
        return run

    @staticmethod
    def wake(trainer: L.Trainer) -> None:
        """Begin the run of a fit that had nothing to tell at its start; between two steps."""
        if not has_run(trainer):
            run = Run.begin(trainer)
            run.start(trainer, begins=True)  # nothing was written of it
            run.on_train_batch_start(trainer)

    # -- where -----------------------------------------------------------------------------------

    def directory(self, callback: RunCallback) -> Path | None:
        """Where a callback writes, from the start of training on.

        None where this process does not write: on other ranks, and in a `fast_dev_run`.
        """
        return self._directories[id(callback)]

    def log(self, callback: RunCallback) -> EventLog:
        """The log of events that the callbacks of one directory share."""
        return self._logs[self.directory(callback)]

    # -- a fit -----------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the loggers the settings of all; leave a Trainer of which there is nothing to tell.

        Where states are restored only after this, it is not known yet.

        Raises:
            ValueError: where ranks have layers of their own, and a callback judges all of them.
        """
        table = table_of(trainer)
        if table is not None:
            judges = [type(each).__name__ for each in _ours(trainer) if each.judges_layers]
            remedy = f"take {' and '.join(judges)} out of callbacks="
            table.scale_history.ranks.check_judges(judges, table.layers, remedy)
        if _has_to_tell(trainer):
            log_settings(trainer, settings_by_class(trainer.precision_plugin, _ours(trainer)))
        elif not (trainer.ckpt_path and trainer.strategy.restore_checkpoint_after_setup):
            self._leave(trainer)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin, or leave the Trainer."""
        # Not in `on_fit_start`: the loops get their counters from a checkpoint after that.
        if _has_to_tell(trainer):
            self.start(trainer, begins=not trainer.global_step and not trainer.ckpt_path)
        else:
            self._leave(trainer)

    def _leave(self, trainer: L.Trainer) -> None:
        rest = [callback for callback in _callbacks(trainer) if callback is not self]
        trainer.callbacks = rest  # pyright: ignore[reportAttributeAccessIssue]

    def start(self, trainer: L.Trainer, *, begins: bool) -> None:
        """Write down what the run is, open its logs, and have the table tell them its writes.

        Args:
            trainer: the Trainer, between two steps.
            begins: whether it goes on from no earlier run.
        """
        zero, ours, self.step = trainer.is_global_zero, _ours(trainer), trainer.global_step
        self.loggers = [logger.log_metrics for logger in trainer.loggers] if zero else []
        writes = zero and not trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue]
        named = [(callback.state_key, callback.dirpath) for callback in ours]
        found = run_directories(trainer, named, self._written_to, begins=begins)  # on all ranks
        for callback, directory in zip(ours, found, strict=True):
            callback.run_dir = directory if writes else None
            self._directories[id(callback)] = callback.run_dir
        for directory in dict.fromkeys(self._directories.values()):
            inside = [c for c in ours if self.directory(c) == directory]
            known = [self._positions[c.state_key] for c in inside if c.state_key in self._positions]
            if directory is not None:
                _write_down(_info(trainer, ours), directory)
            self._logs[directory] = EventLog(
                directory,
                show=self.show,
                step=trainer.global_step,
                position=known[0] if known else None,
                console=zero,
            )
        table = table_of(trainer)
        if table is not None:
            self._unsubscribe = table.subscribe(
                lambda changes: self._tell(trainer, changes), lambda text: self._note(trainer, text)
            )
        self._begin_steps(trainer, ours)

    def _begin_steps(self, trainer: L.Trainer, ours: Sequence[RunCallback]) -> None:
        if any(callback.writes_loss for callback in ours):
            directories = {self.directory(c) for c in ours if c.writes_loss}
            self._files = LossFiles(
                [d for d in directories if d is not None],
                trainer.strategy.root_device,
                interval=trainer.log_every_n_steps,  # pyright: ignore[reportAttributeAccessIssue]
                step=trainer.global_step,
            )
        guard = _guard(trainer)
        if guard is not None:
            guard.keeps_record = True
            guard.steps.clear()
        wanted = any(callback.needs_grad_norm for callback in ours)
        # Under FSDP1 each rank has only a part of the gradients.
        self._computes_norm = wanted and not isinstance(trainer.strategy, FSDPStrategy)
        self.recorder = StepRecorder()

    def _tell(self, trainer: L.Trainer, changes: Sequence[Change]) -> None:
        """Whoever wrote, every log of the run has an event of it; the console hears of it once."""
        for index, each in enumerate(self._logs.values()):
            each.changed(trainer.global_step, changes, quiet=index > 0)

    def _note(self, trainer: L.Trainer, text: str) -> None:
        for index, each in enumerate(self._logs.values()):
            each.write(Note(step=trainer.global_step, reason=text), quiet=index > 0)

    # -- steps -----------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Before anybody acts between two steps: what the steps before have shown is here."""
        guard = _guard(trainer)
        if guard is not None:
            guard.steps.clear()  # a tuner's, who has trained by himself
        self.recorder.begin(trainer.global_step)
        self.signals.arrive()

    @override
    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """In manual optimization this is where a step's losses are: it need not return any."""
        if not pl_module.automatic_optimization:
            scale = _scale(trainer)
            self.recorder.backward(loss if scale is None else loss / scale)

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients are not yet clipped. Where there is a guard, it looks at them itself."""
        if _guard(trainer) is not None:
            return
        norm: Tensor | None = None
        if self._computes_norm:
            norm = gradient_norm(optimizer)
            scale = _scale(trainer)
            if scale is not None and _optimizer_handles_unscaling(optimizer):
                norm = norm / scale  # a fused step takes the scale out by itself
        groups = hyperparameters(optimizer)
        self.recorder.stepped(OptimizerStep(grad_norm=norm, skipped=None, hyperparameters=groups))

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """At the end of a step: make its record, and send it on its way to those who read."""
        # Lightning has divided a micro-batch's loss by their number, in manual optimization nobody.
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        automatic = pl_module.automatic_optimization
        self.recorder.micro_batch(loss, trainer.accumulate_grad_batches if automatic else 1)
        guard = _guard(trainer)
        steps: list[OptimizerStep] = []
        if guard is not None:
            steps, guard.steps = guard.steps, []
        record = self.end_step(
            trainer.global_step,
            steps,
            table=table_of(trainer),
            device=trainer.strategy.root_device,
        )
        if record is not None and self._files is not None:
            self._files.add(record, trainer.global_step)

    # -- the end ---------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the losses that are left."""
        if self._files is not None:
            self._files.write(trainer.global_step)

    @override
    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        """Write what there is; what other ranks have is lost, for they may not come.

        A fit that fails tears nothing down.
        """
        if self._files is not None and trainer.world_size == 1:
            self._files.write(trainer.global_step)
        self._finish(trainer)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The next fit has a run of its own; checkpoints can still be saved of this one."""
        if stage == "fit":
            self._finish(trainer)

    def _finish(self, trainer: L.Trainer) -> None:
        self.over, self._files = True, None
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None  # a Trainer whose run is over can be pickled
        guard = _guard(trainer)
        if guard is not None:
            guard.keeps_record, guard.steps = False, []

    # -- checkpoints -----------------------------------------------------------------------------

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """How far the logs have come: a run that resumes makes void what follows."""
        ours = [c for c in _ours(trainer) if id(c) in self._directories]
        checkpoint[STATE_KEY] = {c.state_key: self.log(c).position for c in ours}
        directories = {c.state_key: c.run_dir for c in ours if c.run_dir is not None}
        checkpoint[DIRECTORIES_KEY] = {k: str(d.absolute()) for k, d in directories.items()}

    @override
    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See `on_save_checkpoint`."""
        before = _before(checkpoint)
        self._positions, self._written_to = dict(before.positions), dict(before.directories)


@dataclass(frozen=True, kw_only=True)
class _Before:
    """What a checkpoint says of the logs of the run that is resumed, by callback."""

    positions: Mapping[str, int | None]
    directories: Mapping[str, str]


@reads("the records' state")
def _before(checkpoint: Mapping[str, Any]) -> _Before:
    positions, directories = (checkpoint.get(k) or {} for k in (STATE_KEY, DIRECTORIES_KEY))
    return built(_Before, {"positions": positions, "directories": directories})


def has_run(trainer: L.Trainer) -> bool:
    """Whether there is a run: from the start of training on, whether there is anything to tell."""
    return any(isinstance(callback, Run) for callback in _callbacks(trainer))


def run_of(trainer: L.Trainer) -> Run:
    """The run that the Trainer's callbacks share, from the setup of a fit on."""
    for callback in _callbacks(trainer):
        if isinstance(callback, Run):
            return callback
    raise RuntimeError("there is no run before the setup of a fit")


def _info(trainer: L.Trainer, callbacks: Sequence[RunCallback]) -> RunInfo | None:
    try:
        return run_info(trainer, callbacks)
    except Exception:
        log.exception("what this run is cannot be told; training continues")
        return None


def _write_down(info: RunInfo | None, directory: Path) -> None:
    rank_zero_info(f"records: {directory} (lightning-fp report {shlex.quote(str(directory))})")
    try:
        if info is not None:
            write_run(directory, info)
    except Exception:
        log.exception("what this run is cannot be written down; training continues")


def _guard(trainer: L.Trainer) -> StepGuard | None:
    """What looks at gradients before each step, and leaves it out where it must."""
    guard = getattr(trainer.precision_plugin, "guard", None)
    return guard if isinstance(guard, StepGuard) else None


def _scale(trainer: L.Trainer) -> float | None:
    """By how much Lightning's own plugin has scaled the loss that hooks see; ours has not."""
    plugin = trainer.precision_plugin
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    return None if scaler is None else scaler.get_scale()


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]


def _has_to_tell(trainer: L.Trainer) -> bool:
    return any(callback.has_to_tell(trainer) for callback in _ours(trainer))


def _ours(trainer: L.Trainer) -> list[RunCallback]:
    return [callback for callback in _callbacks(trainer) if isinstance(callback, RunCallback)]
