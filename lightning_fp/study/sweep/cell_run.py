"""One cell trained: a Trainer with our plugin, records in its directory, a judge at every step."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from typing_extensions import override

from lightning_fp.callbacks import (
    ClampMonitor,
    LossRecorder,
    PrecisionFallback,
    StabilityMonitor,
    StagedRollout,
)
from lightning_fp.callbacks.run.run import run_of
from lightning_fp.layers import linear_format
from lightning_fp.layers.scaling import read_scaling
from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.plugins.names import precision_plugin
from lightning_fp.recipes import RolloutRecipe
from lightning_fp.recipes.builtin import read
from lightning_fp.recipes.stage import CONFIGURED
from lightning_fp.records import read_steps
from lightning_fp.study.sweep.factory import CellFactory, weights
from lightning_fp.study.sweep.grid import Cell
from lightning_fp.study.sweep.verdict import LossJudge
from lightning_fp.study.training_job import quiet

OnStep = Callable[[int], object]
"""Is told of each step, with its number."""


class RecordsLostError(OSError):
    """Telemetry never ends a run; so a disk that is full is noticed by what is missing."""


@dataclass(frozen=True, kw_only=True)
class CellRun:
    """How cells are trained."""

    factory: CellFactory
    steps: int
    directory: Path
    """Of the sweep; each cell has one of its own below `cells`."""

    def place(self, cell: Cell) -> Path:
        """The directory of a cell's records."""
        return self.directory / "cells" / cell.id

    def __call__(
        self, cell: Cell, on_step: OnStep, on_built: Callable[[str], object]
    ) -> dict[str, Any]:
        """Train a cell, from the beginning: what a killed run has left is removed.

        Args:
            cell: which.
            on_step: is told of each step.
            on_built: is told the hash of the weights before the first step.

        Returns:
            What it came to, as plain data.

        Raises:
            ValueError: if the factory gives something else, or no step was made.
            RecordsLostError: if its records are not all there.
        """
        place = self.place(cell)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        job = self.factory.job(cell, self.steps, place)
        began = weights(job.module)
        on_built(began)
        ours = _callbacks(cell, place, job.callbacks)
        judge = LossJudge(self.steps)
        # Whoever may heal a run is given the time for it.
        watching = _Watching(place, judge, on_step, stops=not ours and not job.callbacks)
        if cell.axes.get("signals", False) and not _has(StabilityMonitor, job.callbacks):
            ours.append(StabilityMonitor(dirpath=place))
        options: dict[str, Any] = dict(job.options)
        options.pop("callbacks", None)
        clip: Any = cell.axes.get("clip", options.pop("gradient_clip_val", None))
        options = {**quiet(), "default_root_dir": place, **options}
        trainer = L.Trainer(
            **options,
            gradient_clip_val=clip or None,
            plugins=_plugin(cell),
            max_steps=self.steps,
            max_epochs=-1,
            callbacks=[*job.callbacks, *ours, watching],
        )
        clock, processor = time.perf_counter(), time.process_time()
        trainer.fit(job.module, **job.data)
        seconds = time.perf_counter() - clock
        processor = time.process_time() - processor
        if not judge.losses:
            raise ValueError(
                f"{self.factory.reference}: the run left no loss: its loader must have batches, and"
                " its training_step must return a loss"
            )
        plugin = trainer.precision_plugin
        if isinstance(plugin, LayerPrecision) and (missed := plugin.precision_map.attention_missed):
            raise ValueError(f"{self.factory.reference}: {missed}")
        if len(read_steps(place)) < len(judge.losses):
            raise RecordsLostError(f"the records of {cell.id} could not be written to {place}")
        return {
            **judge.result(),
            "seconds": round(seconds, 4),
            "cpu_seconds": round(processor, 4),
            "weights": began,
            **watching.accounts(trainer),
        }


def _callbacks(cell: Cell, place: Path, given: Sequence[L.Callback]) -> list[L.Callback]:
    """What the axes ask for, and what measures what the gates of a recipe ask for."""
    found: list[L.Callback] = []
    named = cell.axes.get("recipe", False)
    recipe = read(str(named)) if named else None
    if recipe is not None and not _lowers(recipe, cell):
        recipe = None  # bf16 beside formats that are rolled out: it has no stages to go through
    gates = [gate.statistic for stage in (recipe.stages if recipe else ()) for gate in stage.gates]
    falls = cell.axes.get("fallback", any("fallbacks" in gate for gate in gates))
    if falls and not _has(PrecisionFallback, given):
        found.append(PrecisionFallback(dirpath=place))
    if gates and not _has(ClampMonitor, given):
        found.append(ClampMonitor(dirpath=place))
    if recipe is not None:
        found.append(StagedRollout(recipe, dirpath=place))
    return found


def _lowers(recipe: RolloutRecipe, cell: Cell) -> bool:
    """Whether the recipe can take any layer of the cell to low precision."""
    named = {to for stage in recipe.stages for to in stage.layers.values()} - {CONFIGURED}
    formats = [read_scaling(cell.format).format, *map(linear_format, sorted(named))]
    return not all(format.is_high_precision for format in formats)


def _has(kind: type[L.Callback], callbacks: Sequence[L.Callback]) -> bool:
    return any(isinstance(each, kind) for each in callbacks)


def _plugin(cell: Cell) -> LayerPrecision:
    options: dict[str, Any] = {}
    for name in ("base", "attention"):
        if cell.axes.get(name):
            options[name] = cell.axes[name]
    if cell.axes.get("layers", "default") == "all":
        options["layers"] = {"*": cell.format}
    return precision_plugin(cell.format, **options)


class _Watching(LossRecorder):
    """Records every step and has it judged, and ends a run that is dead."""

    # A callback of ours hears nothing of replays, which are no steps of the run.

    needs_grad_norm: ClassVar[bool] = False
    """The judge goes by losses; a norm at every step would cost a small run 1 to 2%."""

    def __init__(self, place: Path, judge: LossJudge, on_step: OnStep, *, stops: bool) -> None:
        super().__init__(place)
        self._judge, self._on_step, self._stops = judge, on_step, stops
        self._first: dict[str, str] = {}
        self._kept = self._seen = 0
        self._at = -1

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        record = run_of(trainer).last
        if record is None or record.loss is None or record.step == self._at:
            return
        self._at = record.step
        norm = record.grad_norm
        loss = float(record.loss)
        self._judge.step(loss, None if norm is None else float(norm), record.lr)
        self._look(trainer)
        self._on_step(len(self._judge.losses))
        if self._stops and self._judge.is_dead:
            trainer.should_stop = True

    def _look(self, trainer: L.Trainer) -> None:
        """Count the layers that are in the format they began in."""
        plugin = trainer.precision_plugin
        if self._stops or not isinstance(plugin, LayerPrecision):
            return
        formats = plugin.precision_map.formats()
        self._first = self._first or formats
        self._kept += sum(formats[name] == format for name, format in self._first.items())
        self._seen += len(self._first)

    def accounts(self, trainer: L.Trainer) -> dict[str, Any]:
        """What became of the steps, where somebody stepped in."""
        fallback = next((c for c in trainer.callbacks if isinstance(c, PrecisionFallback)), None)  # pyright: ignore[reportAttributeAccessIssue]
        accounts: dict[str, Any] = {"skipped": 0, "rolled_back": 0, "replayed": 0}
        if fallback is not None:
            accounts = {name: getattr(fallback.steps, name) for name in accounts}
        return {**accounts, "kept": round(self._kept / self._seen, 4) if self._seen else 1.0}
