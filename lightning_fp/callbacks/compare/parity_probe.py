"""ParityProbe: what the current formats do to a training step, against high precision.

Statistics of casts say what a format does to numbers, not whether the step minds. Here it is asked
directly: one batch on the same weights, from the same random state, in both precisions. All that
differs is due to formats, up to the noise of the kernels, which a second run in the formats of now
measures. Single steps are blind to errors that are small and lasting: the fallback's trajectories
(`stability/replay`) are for those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_fp.argument_types import checked
from lightning_fp.callbacks.compare.step_replay import StepReplay, check_replayable
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.plugins import FP16Precision, LayerPrecision
from lightning_fp.stability import Parity
from lightning_fp.telemetry.parity_log import PUBLISHED, ParityLog, ParityOptions


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

    judges_layers: ClassVar[bool] = True
    publishes: ClassVar[Mapping[str, str]] = dict.fromkeys(PUBLISHED, "")

    @checked
    def __init__(
        self,
        every_n_steps: int = 500,
        worst: int = 4,
        *,
        dirpath: str | Path | None = None,
        log_layers: Sequence[str] = (),
        seed: int | None = 0,
    ) -> None:
        options = ParityOptions(
            every_n_steps=every_n_steps, worst=worst, log_layers=log_layers, seed=seed
        )
        self._log = ParityLog(options)
        self.dirpath = dirpath
        self._directory: Path | None = None
        self._trainer: Trainer | None = None

    @property
    def results(self) -> dict[int, Parity]:
        """The last 100 probes by `global_step`, the same on every rank."""
        return self._log.results

    @override
    def settings(self) -> dict[str, Any]:
        return self._log.options.settings()

    @override
    def published_every(self, interval: int) -> tuple[int, str]:
        return self._log.options.every_n_steps, "probes"

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
        self._log.options.named(self.plugin(trainer))

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

    # -- steps ----------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether the period that `step` is in still has its probe to come, and it is time."""
        return self._log.due(step)

    def _arrived(self, batch: Any) -> None:
        """A batch comes from the loader: probe before any hook has seen it."""
        trainer = self._trainer
        if trainer is None or not self.takes_part(trainer):
            return
        # The loop has not counted this batch yet.
        step, batch_idx = trainer.global_step, trainer.fit_loop.epoch_loop.batch_idx + 1
        between_steps = batch_idx % trainer.accumulate_grad_batches == 0
        if not between_steps or not self.due(step):
            return
        plugin = self.plugin(trainer)
        run = StepReplay(trainer, plugin.precision_map, batch, batch_idx)
        if run.possible:
            self._log.probe(
                plugin,
                run,
                run.model,
                telemetry=run_of(trainer),
                directory=self._directory,
                step=step,
                # Lightning counts so for its own curves; on the board steps are optimizer steps.
                shown_at=trainer.fit_loop.epoch_loop._batches_that_stepped,
            )

    # -- state ----------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        # Lightning keeps states by this key: two probes in one Trainer must not share one.
        options = self._log.options
        return self._generate_state_key(every_n_steps=options.every_n_steps, seed=options.seed)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._log.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._log.load_state_dict(state_dict)
