"""Where a run writes, and the one log of events that all its callbacks share."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch
from typing_extensions import override

from lightning_fp.callbacks.run.run_settings import log_settings, settings_by_class
from lightning_fp.layers import Change, ConversionReport, PrecisionMap
from lightning_fp.records.events import (
    Event,
    EventWriter,
    FormatChange,
    GateResult,
    Replayed,
    SkippedStep,
    StageChange,
    Started,
    StateChange,
)
from lightning_fp.records.run import LayerInfo, RunInfo, write_run

log = logging.getLogger("lightning_fp.fallback")

_QUIET = (StateChange, StageChange, SkippedStep, Replayed, Started)
"""Events that are no warning; nor is a gate that passes."""

_PACKAGES = ("lightning-fp", "torch", "lightning", "torchao", "transformer-engine")


class RunCallback(L.Callback):
    """A callback that writes to the run's directory."""

    dirpath: str | Path | None = None
    """Where it writes; None takes what another callback of the run names, else the trainer's log
    directory."""

    def settings(self) -> dict[str, Any]:
        """The options, as plain data for the records and the loggers."""
        return {}

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first callback of a fit tells the loggers the settings of all."""
        run = _RUNS.get(trainer)
        if run is None or run.began:  # an earlier fit that was interrupted
            _RUNS[trainer] = _Run()
            log_settings(trainer, run_settings(trainer))


class RunLog:
    """Writes events; a failure to do so is said once and does no harm.

    Args:
        directory: where `events.jsonl` goes; None on other ranks, and where nothing is written.
        loggers: the Trainer's.
        step: the step the run begins or resumes at.
        position: where the log stood when the checkpoint was written that the run resumes from.
        console: whether to write lines.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        loggers: Sequence[Any] = (),
        step: int = 0,
        position: int | None = None,
        console: bool = False,
    ) -> None:
        self._writer = None
        self._loggers, self._console = loggers, console
        self._counts: dict[str, int] = {}
        self._changes_seen = 0
        self._failed = False
        if directory is not None:
            self._writer = EventWriter(directory, step=step, position=position)

    @property
    def position(self) -> int | None:
        """How far the file has come; what a checkpoint keeps of it."""
        return None if self._writer is None else self._writer.position

    def write(self, event: Event, *, quiet: bool = False) -> None:
        """One event, everywhere; not on the console if `quiet`."""
        if self._console and not quiet:
            passes = isinstance(event, GateResult) and event.passed
            usual = passes or isinstance(event, _QUIET)
            log.log(logging.INFO if usual else logging.WARNING, "%s", event.sentence())
        if self._writer is not None and not self._failed:
            try:
                self._writer.append(event)
            except OSError:
                self._failed = True
                log.exception("events cannot be written; the training goes on without them")

    def count(self, name: str, step: int) -> None:
        """One more of something, which the loggers show as `precision/<name>`."""
        self._counts[name] = self._counts.get(name, 0) + 1
        self.scalars({f"precision/{name}": float(self._counts[name])}, step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers for the loggers."""
        for logger in self._loggers:
            logger.log_metrics(values, step)

    # -- the table ------------------------------------------------------------------------------

    def new_changes(self, table: PrecisionMap) -> list[Change]:
        """What was written to the table since anybody has asked or told."""
        new, self._changes_seen = table.changes[self._changes_seen :], len(table.changes)
        return new

    def changed(self, step: int, changes: Sequence[Change]) -> None:
        """Changes of formats, one event for each reason."""
        by_reason: dict[str, dict[str, tuple[str, str]]] = {}
        for change in changes:
            formats = by_reason.setdefault(change.reason, {})
            formats[change.layer] = (change.before, change.after)
        for reason, formats in by_reason.items():
            self.write(FormatChange(step=step, reason=reason, formats=formats))


# -- one for each run -----------------------------------------------------------------------------


@dataclass
class _Run:
    """A fit of a Trainer."""

    directories: set[Path] = field(default_factory=set[Path])
    """Those that say what the run is."""

    logs: dict[Path | None, RunLog] = field(default_factory=dict[Path | None, RunLog])

    began: bool = False
    """Whether training has."""


_RUNS: WeakKeyDictionary[L.Trainer, _Run] = WeakKeyDictionary()


def run_directory(trainer: L.Trainer, callback: RunCallback) -> Path:
    """Where a callback writes; to be called on all ranks.

    Args:
        trainer: the Trainer, in `fit`.
        callback: one of its callbacks.

    Returns:
        The callback's own directory; else the first that another callback names, so that the
        records of a run lie together; else the trainer's.
    """
    callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    named = [c.dirpath for c in (callback, *callbacks) if isinstance(c, RunCallback)]
    given = [directory for directory in named if directory is not None]
    return Path(given[0] if given else trainer.log_dir or trainer.default_root_dir)


def begin_run(trainer: L.Trainer, callback: RunCallback) -> Path | None:
    """To be called by each callback at the start of training, on all ranks.

    The first one of a fit writes down what the run is.

    Returns:
        Where to write; None where this process does not: on other ranks, in a `fast_dev_run`.
    """
    directory, run = run_directory(trainer, callback), _RUNS.setdefault(trainer, _Run())
    run.began = True
    if not trainer.is_global_zero or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    if directory not in run.directories:
        run.directories.add(directory)
        try:
            write_run(directory, run_info(trainer))
        except Exception:
            log.exception("what this run is cannot be written down; the training goes on")
    return directory


def run_log(trainer: L.Trainer, callback: RunCallback, position: int | None = None) -> RunLog:
    """The log that this run's callbacks share in one directory; call at the start of training.

    Args:
        trainer: the Trainer, in `fit`.
        callback: who asks.
        position: `RunLog.position` from the checkpoint that the run resumes from.
    """
    directory = begin_run(trainer, callback)
    logs = _RUNS[trainer].logs
    if directory not in logs:
        zero = trainer.is_global_zero
        logs[directory] = RunLog(
            directory,
            loggers=trainer.loggers if zero else [],
            step=trainer.global_step,
            position=position,
            console=zero,
        )
        table = getattr(trainer.precision_plugin, "precision_map", None)
        if isinstance(table, PrecisionMap):
            logs[directory].new_changes(table)  # what was before this fit
    return logs[directory]


def end_run(trainer: L.Trainer) -> None:
    """To be called by each callback in `teardown` of a fit: the next one begins anew."""
    _RUNS.pop(trainer, None)


def run_settings(trainer: L.Trainer) -> dict[str, dict[str, Any]]:
    """The options of the precision plugin and of each callback of ours, by class."""
    callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    ours = [callback for callback in callbacks if isinstance(callback, RunCallback)]
    return settings_by_class(trainer.precision_plugin, ours)


def run_info(trainer: L.Trainer) -> RunInfo:
    """What the run is, as it stands now."""
    plugin: Any = trainer.precision_plugin
    report: ConversionReport | None = getattr(plugin, "report", None)
    table = getattr(plugin, "precision_map", None)
    formats: dict[str, str] = table.formats() if isinstance(table, PrecisionMap) else {}
    device = trainer.strategy.root_device
    return RunInfo(
        step=trainer.global_step,
        settings=run_settings(trainer),
        layers=tuple(
            LayerInfo(
                name=row.name,
                format=formats.get(row.name, row.format),
                kernel=row.kernel,
                flops_share=row.flops_share,
                reason=row.reason,
            )
            for row in ([] if report is None else report.layers)
        ),
        parameters=sum(p.numel() for p in trainer.lightning_module.parameters()),
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        world_size=trainer.world_size,
        strategy=type(trainer.strategy).__name__,
        versions={"python": platform.python_version(), **_versions()},
    )


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
