"""StagedRollout: takes a run from high precision to FP8 in stages, behind gates.

What it does between two steps, `telemetry.rollout.staging` does in any loop; these are the hooks,
and what the recipe's gates ask of the Trainer's callbacks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_fp.argument_types import checked
from lightning_fp.callbacks.clamp.clamp_monitor import ClampMonitor
from lightning_fp.callbacks.fallback.precision_fallback import PrecisionFallback
from lightning_fp.callbacks.rollout.gate_names import (
    check_measurable,
    is_published,
    measurements,
    statistic,
)
from lightning_fp.callbacks.rollout.logged_metrics import LoggedMetrics
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.events import Note
from lightning_fp.recipes import (
    FormatEvidence,
    RolloutRecipe,
    RolloutState,
    check_evidence,
    never_low,
    read,
    remarks_on,
    used_formats,
)
from lightning_fp.recipes.format_evidence import against_evidence
from lightning_fp.recipes.text import as_plain
from lightning_fp.telemetry import LOSS
from lightning_fp.telemetry.rollout.gate_evidence import LOSS_GAP, GateEvidence
from lightning_fp.telemetry.rollout.staging import STAGE, Staging, held_by_fallback
from lightning_fp.telemetry.rollout.token_counter import TokenCounter

log = logging.getLogger(__name__)


class StagedRollout(RunCallback):
    """Takes a run through the stages of a recipe.

    Each stage gives layers their formats when it begins, between two optimizer steps and alike on
    all ranks, and lasts as long as its recipe says and its gates ask for. While PrecisionFallback
    investigates, or has layers demoted, no stage begins or ends; a layer that somebody else has
    given another format is left to them. docs/rollout.md explains recipes and every rule.

    >>> from lightning_fp import FP8Precision
    >>> from lightning_fp.callbacks import StagedRollout
    >>> trainer = L.Trainer(
    ...     accelerator="cpu", plugins=FP8Precision(), callbacks=[StagedRollout("bf16-cooldown")]
    ... )

    Args:
        recipe: a `RolloutRecipe`, the name of a built-in one (`lightning_fp.recipes.names()`; by
            default the one to begin with), the path of a YAML file, or YAML text.
        baseline: directory of a recorded run, with whose loss gates on "loss_gap" compare.
        tokens_per_step: tokens of one optimizer step over all ranks, for stages that end by
            tokens; by default those of a batch are the elements of its first tensor of integers.
        dirpath: where events go; None takes the run's directory.
        force: whether to use also the formats that the recipe's own evidence is against; each is
            told, with that evidence, in a line and in the events.

    Raises:
        ValueError: for a recipe that cannot be; at setup without a plugin of this package, for a
            pattern that matches nothing, a format that has not passed, a gate whose callback is
            missing or that can never be measured, or a stage that ends by a share of a run whose
            length is not known.
    """

    judges_layers: ClassVar[bool] = True

    @checked
    def __init__(
        self,
        recipe: RolloutRecipe | str | Path = "balanced",
        *,
        baseline: str | Path | None = None,
        tokens_per_step: int | None = None,
        dirpath: str | Path | None = None,
        force: bool = False,
    ) -> None:
        self.recipe = read(recipe)
        """The stages."""
        if tokens_per_step is not None and tokens_per_step < 1:
            raise ValueError(f"tokens_per_step must be at least 1, got {tokens_per_step}")
        for stage in self.recipe.stages:
            for gate in stage.gates:
                if statistic(gate) == LOSS_GAP and baseline is None:
                    raise ValueError(
                        f"{stage}: {gate} needs a recorded run to compare with; give"
                        " StagedRollout(..., baseline='its directory')"
                    )
        self.baseline, self.tokens_per_step, self.dirpath = baseline, tokens_per_step, dirpath
        self.force = force
        self._staging = Staging(self.recipe)
        self._fallback: PrecisionFallback | None = None
        self._forced: Sequence[FormatEvidence] = ()

    @property
    def stage(self) -> str | None:
        """The name of the stage that the run is in; None before the first."""
        return self._staging.stage

    @property
    def state(self) -> RolloutState:
        """Where the rollout stands, and why it is held or over."""
        return self._staging.state

    @override
    def settings(self) -> dict[str, Any]:
        """The recipe as plain data, and the options."""
        return {
            "recipe": as_plain(self.recipe),
            # absolute, since a report is made elsewhere than the run
            "baseline": None if self.baseline is None else str(Path(self.baseline).absolute()),
            "tokens_per_step": self.tokens_per_step,
            "force": self.force,
        }

    # -- set-up ---------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer without a table of formats, or without what the gates ask for."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.plugin(trainer)
        interval = _interval(trainer)
        names = measurements(self.recipe, trainer, interval)
        until = {key for stage in self.recipe.stages for key in stage.until}
        if LOSS in until:
            names[LOSS] = LOSS
        logged = [name for name in dict.fromkeys(names.values()) if not is_published(name)]
        metrics = LoggedMetrics(trainer, logged, interval) if logged else None
        baseline = self.baseline if LOSS_GAP in names.values() else None
        tokens = TokenCounter(self.tokens_per_step, interval)
        # Of this fit; a checkpoint's state comes after this hook and before the table is filled.
        self._staging = Staging(
            self.recipe,
            GateEvidence(names, baseline, metrics),
            tokens if "tokens" in until else None,
        )
        callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        watching = [c for c in callbacks if isinstance(c, PrecisionFallback) and not c.dry_run]
        self._fallback = watching[0] if watching else None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the recipe over this model, and refuse what cannot be."""
        plugin = self.plugin(trainer)
        stages = self._staging.follow(plugin).stages
        evidence, formats = self.recipe.evidence, used_formats(stages)
        if not self.force:
            check_evidence(self.recipe.name, evidence, formats)
        self._forced = against_evidence(evidence, formats)
        check_measurable(stages, trainer, plugin.precision_map)
        order_known = plugin.report is not None and bool(plugin.report.order)
        for remark in remarks_on(self.recipe, stages, order_known=order_known):
            rank_zero_info(remark)
        never = never_low(self.recipe, stages, plugin.precision_map.configured())
        if never and trainer.is_global_zero:
            log.warning("%s", never)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin, or go on from a checkpoint."""
        run = run_of(trainer)
        events = run.log(self)
        self._staging.begin(run, events, self._length(trainer))
        for each in self._forced:
            text = f"{each.format} is forced against the recipe's evidence: {each.sentence()}"
            events.write(Note(step=trainer.global_step, reason=text))

    def _length(self, trainer: L.Trainer) -> float:
        """Steps of the whole run, if a stage asks for its share of them; else inf.

        Not before the loops are restored: asking for it makes the loaders, and one that is made
        before does not get its state from the checkpoint.
        """
        asking = [stage for stage in self.recipe.stages if "share" in stage.until]
        steps = float(trainer.estimated_stepping_batches) if asking else math.inf
        if asking and not 0 < steps < math.inf:
            raise ValueError(
                f"{asking[0]}: until.share needs a run of known length; give the Trainer max_steps,"
                " or a loader that knows its length, or take until.steps"
            )
        return steps

    # -- steps ----------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps: gather, decide, and write to the table."""
        held, over = held_by_fallback("" if self._fallback is None else self._fallback.phase)
        self._staging.before_batch(batch, trainer.global_step, held=held, over=over)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """At the end of a step: count its tokens, and show the stage."""
        device = trainer.strategy.root_device
        index = self._staging.after_batch(trainer.global_step, _interval(trainer), device)
        if index is not None:
            callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
            pl_module.log(
                STAGE,
                index,
                # The progress bar has room for one number of ours: the share, where it is shown.
                prog_bar=not any(isinstance(c, ClampMonitor) for c in callbacks),
                logger=False,
                on_step=True,
                on_epoch=False,
                batch_size=1,
            )

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Metrics of a validation are new."""
        if not trainer.sanity_checking:
            self._staging.evidence.validated()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The rollout stands still."""
        if stage == "fit":
            self._staging.run = None

    # -- state ----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Stage, evidence, counts; the recipe too, to notice on resume that it was changed."""
        return self._staging.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this before the model is set up: it takes effect at the start."""
        self._staging.load_state_dict(state_dict)


def _interval(trainer: L.Trainer) -> int:
    interval: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
    return max(1, interval)
