"""What the demo does in its runs besides training: three callbacks, as a user could write them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
from rich.progress import Progress, TaskID

from lightning_fp.plugins import FP8Precision


class Recorder(L.Callback):
    """Keeps the loss and the duration of every step, and moves a progress bar.

    Args:
        progress: where the bars are.
        title: this run's, e.g. "BF16".
        steps: length of the run.
    """

    def __init__(self, progress: Progress, title: str, steps: int) -> None:
        self.losses: dict[int, float] = {}
        """Training loss by step, counted from 1."""
        self.validation_loss = float("nan")
        """Loss on held-out text at the end."""
        self._progress = progress
        self._task: TaskID = progress.add_task(title, total=steps, loss="")
        self._start = 0.0
        self._seconds: list[float] = []

    @property
    def seconds_per_step(self) -> float:
        """Median duration of a step."""
        return median(self._seconds) if self._seconds else float("nan")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress.update(self._task, completed=trainer.global_step)
        self._progress.start_task(self._task)

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        loss = float(outputs["loss"])  # waits for the device, so that the duration is the step's
        self._seconds.append(time.perf_counter() - self._start)
        self.losses[trainer.global_step] = loss
        self._progress.update(self._task, completed=trainer.global_step, loss=f"loss {loss:.3f}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation_loss = float(trainer.callback_metrics["val_loss"])


class FlipLayer(L.Callback):
    """Writes one layer's format to the precision map at given steps.

    Args:
        plugin: the plugin that owns the map.
        layer: the layer's name.
        formats: format by step: written after that step, in force from the next.
    """

    def __init__(self, plugin: FP8Precision, layer: str, formats: Mapping[int, str]) -> None:
        self.plugin = plugin
        self.layer = layer
        self.formats = formats

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step in self.formats:
            self.plugin.precision_map.set(
                self.layer, self.formats[step], reason=f"the demo asks for it after step {step}"
            )


class SaveCheckpoint(L.Callback):
    """Saves one checkpoint in mid-run.

    Args:
        step: after which step.
        path: where to.
    """

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
