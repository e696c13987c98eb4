"""One fit, as all callbacks of ours share it: where it writes, and its log of events.

The first callback of ours puts a `Run` in front of the Trainer's callbacks, so that it hears of
everything before they do, and once for all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override

from lightning_fp.callbacks.run.run_info import run_info, table_of
from lightning_fp.callbacks.run.run_log import RunLog
from lightning_fp.callbacks.run.run_settings import log_settings, settings_by_class
from lightning_fp.layers import Change
from lightning_fp.records.run import write_run

log = logging.getLogger("lightning_fp.fallback")

STATE_KEY = "lightning_fp.run"
"""Where a checkpoint keeps how far the logs had come, by callback."""


class RunCallback(L.Callback):
    """A callback that writes to the run's directory."""

    dirpath: str | Path | None = None
    """Where it writes; None takes what another callback of the run names, else the trainer's log
    directory."""

    def settings(self) -> dict[str, Any]:
        """The options, as plain data for the records and the loggers."""
        return {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Of a fit: see that it has its `Run`."""
        if stage == "fit":
            Run.begin(trainer)


class Run(L.Callback):
    """What belongs to a fit and not to one callback."""

    def __init__(self) -> None:
        self.over = False
        """Whether the fit has ended, well or not."""
        self._directories: dict[int, Path | None] = {}
        self._logs: dict[Path | None, RunLog] = {}
        self._positions: dict[str, int | None] = {}
        self._unsubscribe: Callable[[], object] = lambda: None

    @staticmethod
    def begin(trainer: L.Trainer) -> Run:
        """The run of this fit; made if it is not there yet."""
        callbacks = _callbacks(trainer)
        runs = [callback for callback in callbacks if isinstance(callback, Run)]
        if runs and not runs[0].over:
            return runs[0]
        run = Run()
        rest = [callback for callback in callbacks if callback not in runs]
        trainer.callbacks = [run, *rest]  # pyright: ignore[reportAttributeAccessIssue]
        return run

    # -- where -----------------------------------------------------------------------------------

    def directory(self, callback: RunCallback) -> Path | None:
        """Where a callback writes, from the start of training on.

        None where this process does not write: on other ranks, and in a `fast_dev_run`.
        """
        return self._directories[id(callback)]

    def log(self, callback: RunCallback) -> RunLog:
        """The log of events that the callbacks of one directory share."""
        return self._logs[self.directory(callback)]

    # -- a fit -----------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the loggers the settings of all."""
        log_settings(trainer, settings_by_class(trainer.precision_plugin, _ours(trainer)))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write down what the run is, open its logs, and have the table tell them its writes."""
        zero, ours = trainer.is_global_zero, _ours(trainer)
        writes = zero and not trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue]
        for callback in ours:
            directory = run_directory(trainer, callback)  # on all ranks
            self._directories[id(callback)] = directory if writes else None
        for directory in dict.fromkeys(self._directories.values()):
            if directory is not None:
                _write_down(directory, trainer, ours)
            keys = [c.state_key for c in ours if self.directory(c) == directory]
            known = [self._positions[key] for key in keys if key in self._positions]
            self._logs[directory] = RunLog(
                directory,
                loggers=trainer.loggers if zero else [],
                step=trainer.global_step,
                position=known[0] if known else None,
                console=zero,
            )
        table = table_of(trainer)
        if table is not None:
            self._unsubscribe = table.subscribe(lambda changes: self._tell(trainer, changes))

    def _tell(self, trainer: L.Trainer, changes: Sequence[Change]) -> None:
        """Whoever wrote, every log of the run has an event of it; the console hears of it once."""
        for index, each in enumerate(self._logs.values()):
            each.changed(trainer.global_step, changes, quiet=index > 0)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """A fit that fails tears nothing down."""
        self._finish()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The next fit has a run of its own; checkpoints can still be saved of this one."""
        if stage == "fit":
            self._finish()

    def _finish(self) -> None:
        self.over = True
        self._unsubscribe()

    # -- checkpoints -----------------------------------------------------------------------------

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """How far the logs have come: a run that resumes makes void what follows."""
        ours = [c for c in _ours(trainer) if id(c) in self._directories]
        checkpoint[STATE_KEY] = {c.state_key: self.log(c).position for c in ours}

    @override
    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See `on_save_checkpoint`."""
        self._positions = dict(checkpoint.get(STATE_KEY) or {})


def run_of(trainer: L.Trainer) -> Run:
    """The run that the Trainer's callbacks share, from the setup of a fit on."""
    for callback in _callbacks(trainer):
        if isinstance(callback, Run):
            return callback
    raise RuntimeError("there is no run before the setup of a fit")


def run_directory(trainer: L.Trainer, callback: RunCallback) -> Path:
    """Where a callback writes; to be called on all ranks.

    Args:
        trainer: the Trainer, in `fit`.
        callback: one of its callbacks.

    Returns:
        The callback's own directory; else the first that another callback names, so that the
        records of a run lie together; else the trainer's.
    """
    named = [callback.dirpath, *(c.dirpath for c in _ours(trainer))]
    given = [directory for directory in named if directory is not None]
    return Path(given[0] if given else trainer.log_dir or trainer.default_root_dir)


def _write_down(directory: Path, trainer: L.Trainer, callbacks: Sequence[RunCallback]) -> None:
    try:
        write_run(directory, run_info(trainer, callbacks))
    except Exception:
        log.exception("what this run is cannot be written down; the training goes on")


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]


def _ours(trainer: L.Trainer) -> list[RunCallback]:
    return [callback for callback in _callbacks(trainer) if isinstance(callback, RunCallback)]
