"""ParityProbe: what the current formats do to a training step, against high precision.

Statistics of casts say what a format does to numbers, not whether the step minds. Here it is asked
directly: one batch on the same weights, from the same random state, in both precisions. All that
differs is due to formats, up to the noise of the kernels, which a second run in the formats of now
measures. Single steps are blind to errors that are small and lasting: the fallback's trajectories
(`stability/replay`) are for those.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_fp.callbacks.compare.step_replay import StepReplay, check_replayable
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.choices import check_at_least
from lightning_fp.layers import PrecisionMap
from lightning_fp.plugins import FP16Precision, LayerPrecision
from lightning_fp.records.parity import append_parity
from lightning_fp.stability import Parity, measure_parity

log = logging.getLogger(__name__)

_MOST_KEPT = 100

_NUMBERS = [field.name for field in fields(Parity) if field.type in ("float", float)]


class ParityProbe(RunCallback):
    """Every so often, runs the batch at hand in the current formats and in high precision.

    Both run on the weights before the step, from the same random state. Nothing of it remains:
    weights, gradients, statistics, logs and random numbers are those of a run without the probe,
    bit for bit. A probe costs 3 + `worst` steps run eagerly, and memory for two more sets of
    gradients; docs/parity-probe.md says how to read the numbers.

    >>> ParityProbe(every_n_steps=1000, worst=2).results
    {}

    Args:
        every_n_steps: one probe per so many optimizer steps.
        worst: how many layers to put into high precision one at a time, to see how much of the
            gap each of them removes.
        dirpath: where to write `parity.jsonl`; None takes the run's directory.
        log_layers: globs over layer names; these layers go to the loggers as well.
        seed: chooses the step within each `every_n_steps`, so that nothing periodic in the run
            hides from the probe; None takes the first.

    Raises:
        ValueError: for a bad argument; at setup without a precision plugin of this package, for
            a glob that matches nothing, or for a training step that cannot be replayed.
    """

    publishes: ClassVar[Mapping[str, str]] = {f"precision/parity/{name}": "" for name in _NUMBERS}

    def __init__(
        self,
        every_n_steps: int = 500,
        worst: int = 4,
        *,
        dirpath: str | Path | None = None,
        log_layers: Sequence[str] = (),
        seed: int | None = 0,
    ) -> None:
        check_at_least(1, every_n_steps=every_n_steps)
        if worst < 0:
            raise ValueError(f"worst must not be negative, got {worst}")
        if isinstance(log_layers, str):
            raise ValueError(f"log_layers must be a list of globs, got {log_layers!r}")
        self.results: dict[int, Parity] = {}
        """The last 100 probes by `global_step`, the same on every rank."""
        self._every_n_steps, self._worst, self._seed = every_n_steps, worst, seed
        self.dirpath = dirpath
        self._globs = tuple(log_layers)
        self._log_layers: set[str] = set()
        self._directory: Path | None = None
        self._trainer: Trainer | None = None
        self._last = -1
        self._failed = False

    @override
    def settings(self) -> dict[str, Any]:
        return {
            "every_n_steps": self._every_n_steps,
            "worst": self._worst,
            "log_layers": list(self._globs),
            "seed": self._seed,
        }

    @override
    def published_every(self, interval: int) -> tuple[int, str]:
        return self._every_n_steps, "probes"

    # -- setup ----------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if isinstance(self.plugin(trainer), FP16Precision):
                raise ValueError(
                    "ParityProbe compares FP8 with what the run falls back to, which for"
                    " FP16Precision is bf16, the coarser of the two; take FP16Monitor to see what"
                    " FP16 does to gradients"
                )
            check_replayable(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        table = self.plugin(trainer).precision_map
        self._log_layers = {name for glob in self._globs for name in table.matching(glob)}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._directory = run_of(trainer).directory(self)
        self._trainer, plugin = trainer, self.plugin(trainer)
        if self._arrived not in plugin.on_input:
            plugin.on_input.append(self._arrived)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._trainer, plugin = None, trainer.precision_plugin
        if isinstance(plugin, LayerPrecision) and self._arrived in plugin.on_input:
            plugin.on_input.remove(self._arrived)

    # -- when -----------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether the period that `step` is in still has its probe to come, and it is time."""
        period = step // self._every_n_steps
        if period == self._last:
            return False
        start = period * self._every_n_steps
        if self._seed is None:
            return step >= start
        # Of its own and a function of the period alone: it touches no other generator, and goes
        # on the same after a resume.
        chosen = random.Random(f"{self._seed}/{period}").randrange(self._every_n_steps)
        return step >= start + chosen

    def _arrived(self, batch: Any) -> None:
        """A batch comes from the loader: probe before any hook has seen it."""
        trainer = self._trainer
        if trainer is None:
            return
        # The loop has not counted this batch yet.
        step, batch_idx = trainer.global_step, trainer.fit_loop.epoch_loop.batch_idx + 1
        between_steps = batch_idx % trainer.accumulate_grad_batches == 0
        if not between_steps or not self.due(step):
            return
        try:
            table = self.plugin(trainer).precision_map
            run = StepReplay(trainer, table, batch, batch_idx)
            if not run.possible:
                return
            # First, so that a probe that fails is not tried again at every step of its period.
            self._last = step // self._every_n_steps
            # What was written to the table holds from the coming step on, which is what is probed.
            self.plugin(trainer).boundary()
            self._probe(trainer, run, table, step)
        except Exception as error:
            if not self._failed:
                message = "the parity probe failed at step %d, training goes on: %s"
                log.warning(message, step, error, exc_info=True)
            self._failed = True

    # -- what -----------------------------------------------------------------------------------

    def _probe(self, trainer: Trainer, run: StepReplay, table: PrecisionMap, step: int) -> None:
        began = time.perf_counter()
        high = self.plugin(trainer).high_precision
        parity = measure_parity(run, run.model, table, high, worst=self._worst)
        self.results[step] = parity
        while len(self.results) > _MOST_KEPT:
            del self.results[next(iter(self.results))]
        fit = run_of(trainer)
        for name in _NUMBERS:
            value = float(getattr(parity, name))
            fit.board.publish(f"precision/parity/{name}", step, value)
        if not trainer.is_global_zero:
            return
        if self._directory is not None:
            seconds = time.perf_counter() - began
            append_parity(self._directory, {"step": step, "seconds": seconds, **asdict(parity)})
        metrics = _metrics(parity, self._log_layers)
        # Lightning counts so for its own curves; on the board steps are optimizer steps.
        fit.log_metrics(metrics, trainer.fit_loop.epoch_loop._batches_that_stepped)

    # -- state ----------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        # Lightning keeps states by this key: two probes in one Trainer must not share one.
        return self._generate_state_key(every_n_steps=self._every_n_steps, seed=self._seed)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "last": self._last}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last = int(state_dict["last"])


def _metrics(parity: Parity, layers: set[str]) -> dict[str, float]:
    """What goes to the loggers; the first three have the same names in every run."""
    metrics = {
        "loss_gap": parity.loss_gap,
        "grad_cosine": parity.grad_cosine,
        "grad_norm_ratio": parity.grad_norm_ratio,
    }
    for layer in parity.layers:
        if layer.layer in layers:
            metrics[f"{layer.layer}/grad_cosine"] = layer.cosine
            metrics[f"{layer.layer}/grad_norm_ratio"] = layer.norm_ratio
            metrics[f"{layer.layer}/cast_error"] = layer.cast_error
    return {f"precision/parity/{name}": value for name, value in metrics.items()}
