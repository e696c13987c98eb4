"""EvaluationGap: what the training formats do to the validation loss, against high precision.

Weights that were trained in FP8 have learned to live with its rounding; served in BF16 they meet
arithmetic they were not trained in. A validation runs in one of the two and cannot show it. So some
of its batches are evaluated twice more, once in each: on the same batches the noise of the data
cancels in the difference, and few of them suffice. The gap is the model's, not one layer's; for
that see `parity_probe`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from typing_extensions import override

from lightning_fp.argument_types import checked
from lightning_fp.callbacks.compare.loop_replay import muted
from lightning_fp.callbacks.run.replaced import replaced
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.choices import check_at_least
from lightning_fp.layers import LinearFormat
from lightning_fp.numerics.combining import wide_dtype
from lightning_fp.records.evaluation import EvaluationRow, EvaluationWriter
from lightning_fp.stability.keep.host_batch import copy_batch
from lightning_fp.stability.replay.untouched import untouched
from lightning_fp.state_version import check_version, reads

log = logging.getLogger(__name__)

STATE_VERSION = 1

METRIC = "precision/eval_gap"
"""Its name for the loggers, and in `trainer.callback_metrics`."""


@dataclass
class _Sums:
    """A validation under way, on this rank."""

    loss: float = 0.0
    loss_high: float = 0.0
    batches: int = 0
    failed: bool = False


class EvaluationGap(RunCallback):
    """Evaluates the same validation batches in the training formats and in high precision.

    A model that trains in FP8 is often served in BF16, or the other way round; the gap between the
    two losses says what that costs. Whichever of the two the run's own validation takes
    (`fp8_eval`), it is not touched: both evaluations are extra ones, and nothing remains of them
    in weights, buffers, metrics, logs, amax histories and random numbers. The relative gap goes to
    the loggers and to `trainer.callback_metrics` as `precision/eval_gap`, and with both losses as
    a row to `<dirpath>/eval_gap.csv`, which `lightning_fp.records.read_evaluation` reads. Also
    `trainer.validate` measures it, but writes no row.

    >>> from lightning_fp import FP8Precision
    >>> from lightning_fp.callbacks import EvaluationGap
    >>> trainer = Trainer(
    ...     accelerator="cpu", plugins=FP8Precision(), callbacks=[EvaluationGap(batches=8)]
    ... )

    Args:
        every_n_validations: measure at one in so many validations of a fit.
        batches: the first so many batches of a validation, on each rank; None takes all. Each is
            evaluated twice more.
        metric: what the validation step logs as its loss, if it returns none (neither a tensor
            nor a mapping with "loss").
        dirpath: where `eval_gap.csv` goes; by default the run's directory.

    Raises:
        ValueError: for an option out of range; at setup without a plugin of this package, or for
            a validation step that takes its batches out of the loader itself.
    """

    publishes: ClassVar[Mapping[str, str]] = {METRIC: ""}

    @checked
    def __init__(
        self,
        every_n_validations: int = 1,
        batches: int | None = None,
        *,
        metric: str = "val_loss",
        dirpath: str | Path | None = None,
    ) -> None:
        check_at_least(1, every_n_validations=every_n_validations, batches=batches)
        self.every_n_validations, self.batches = every_n_validations, batches
        self.metric, self.dirpath = metric, dirpath
        self.latest: EvaluationRow | None = None
        """The last measurement, the same on every rank."""
        self._validations = 0
        self._sums: _Sums | None = None
        self._writer: EvaluationWriter | None = None
        self._said = False

    @override
    def settings(self) -> dict[str, Any]:
        return {
            "every_n_validations": self.every_n_validations,
            "batches": self.batches,
            "metric": self.metric,
        }

    @override
    def cannot_measure(self, name: str, trainer: Trainer, formats: Collection[LinearFormat]) -> str:
        validates = trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()
        none = not validates or trainer.limit_val_batches == 0  # pyright: ignore[reportAttributeAccessIssue]
        return "the run has no validation" if none else ""

    # -- set-up ---------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage not in ("fit", "validate"):
            return
        self.plugin(trainer)
        step = pl_module.validation_step
        if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
            raise ValueError(
                "validation_step(self, dataloader_iter) cannot be evaluated twice: it takes its"
                " batches out of the loader itself; define validation_step(self, batch, batch_idx)"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        directory = run_of(trainer).directory(self)
        self._writer = None if directory is None else EvaluationWriter(directory)

    # -- a validation ---------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums = None
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._validations += 1
            if self._validations % self.every_n_validations:
                return
        self._sums = _Sums()

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        sums = self._sums
        if sums is None or sums.failed or sums.batches == self.batches:
            return
        try:
            plugin = self.plugin(trainer)
            high = dict.fromkeys(plugin.precision_map.layers, plugin.high_precision)
            arguments = _arguments(pl_module, batch, batch_idx, dataloader_idx)
            sums.loss += self._evaluate(trainer, arguments, {})
            sums.loss_high += self._evaluate(trainer, arguments, high)
            sums.batches += 1
        except Exception as error:
            sums.failed = True
            self._say("the evaluation gap cannot be measured, the run goes on: %s", error)

    def _evaluate(
        self, trainer: Trainer, arguments: list[Any], formats: Mapping[str, LinearFormat]
    ) -> float:
        """The loss of one batch, with some layers in these formats and the others in their own."""
        table, module = self.plugin(trainer).precision_map, trainer.lightning_module
        logged: dict[str, Any] = {}

        def note(name: str, value: Any, *_: Any, **__: Any) -> None:
            logged[name] = value

        def note_all(values: Mapping[str, Any], *_: Any, **__: Any) -> None:
            logged.update(values)

        with (
            untouched(trainer.strategy.model or module),
            torch.no_grad(),
            table.overridden(formats),
            # In both, so that formats are all that differs: high precision comes as a format too.
            replaced(table.phase, fp8_eval=True),
            # Mute first, and then hear what the module logs: its loss may be only there.
            muted(trainer),
            replaced(module, log=note, log_dict=note_all),
        ):
            # In here, since the loop's batches are inference tensors, which autograd refuses.
            output: Any = trainer.strategy.validation_step(*copy_batch(arguments))
            loss = output.get("loss") if isinstance(output, Mapping) else output
            loss = logged.get(self.metric) if loss is None else loss
            if isinstance(loss, Tensor) and loss.numel() == 1:
                return float(loss)
            if isinstance(loss, (int, float)):
                return float(loss)
        raise ValueError(
            f"validation_step must return its loss or log it as {self.metric!r}, got"
            f" {type(loss).__name__}; it logs {', '.join(logged) or 'nothing'}: take one of these"
            " with EvaluationGap(metric=...), or return the loss"
        )

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sums, self._sums = self._sums, None
        if sums is None:
            return
        row = self._over_ranks(trainer, sums)
        if row is None:
            return
        self.latest = row
        # Alike on all ranks as it is; without `sync_dist` Lightning warns.
        pl_module.log(METRIC, row.gap, sync_dist=trainer.world_size > 1, batch_size=1)
        if trainer.state.fn != "fit":
            return
        run_of(trainer).board.publish(METRIC, row.step, row.gap)
        if self._writer is not None:
            try:
                self._writer.append(row)
            except OSError as error:
                self._say("the evaluation gap cannot be written, the run goes on: %s", error)

    def _over_ranks(self, trainer: Trainer, sums: _Sums) -> EvaluationRow | None:
        """Means over all batches of all ranks; None if there was none, or a rank has failed.

        A rank that has failed, or had no batch, takes part: the others are in the collective.
        """
        mine = torch.tensor(
            [sums.loss, sums.loss_high, float(sums.batches), float(sums.failed)],
            dtype=wide_dtype(trainer.strategy.root_device),
            device=trainer.strategy.root_device,
        )
        every: Any = trainer.strategy.reduce(mine, reduce_op="sum")
        loss, loss_high, batches, failed = every.tolist()
        if failed or not batches:
            return None
        return EvaluationRow(
            step=trainer.global_step, loss=loss / batches, loss_high=loss_high / batches
        )

    def _say(self, message: str, error: Exception) -> None:
        """In an except clause: once."""
        if not self._said:
            log.warning(message, error, exc_info=not isinstance(error, ValueError))
        self._said = True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._sums = self._writer = None

    # -- state ----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """How many validations there were: a resumed run measures where the whole run would."""
        return {"version": STATE_VERSION, "validations": self._validations}

    @override
    @reads("EvaluationGap state")
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = check_version(state_dict, STATE_VERSION, "EvaluationGap state")
        self._validations = int(state["validations"])


def _arguments(
    module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
) -> list[Any]:
    """What the loop gives to this module's validation step."""
    step = module.validation_step
    arguments = [batch]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        arguments.append(batch_idx)
    if is_param_in_hook_signature(step, "dataloader_idx", explicit=True):
        arguments.append(dataloader_idx)
    return arguments
