"""StagedRollout: takes a run from high precision to FP8 in stages, behind gates.

When a stage begins and ends is decided by a pure machine without Lightning (`recipes.Rollout`).
This callback brings it what it decides from, once between two optimizer steps, and carries out what
it says: a stage is a write to the table. All that goes in is alike on all ranks, so that all decide
alike and no rank need ask another.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_fp.callbacks.clamp.clamp_monitor import ClampMonitor
from lightning_fp.callbacks.fallback.precision_fallback import PrecisionFallback
from lightning_fp.callbacks.rollout.gate_names import (
    check_measurable,
    is_published,
    measurements,
    statistic,
)
from lightning_fp.callbacks.rollout.logged_metrics import LoggedMetrics
from lightning_fp.callbacks.run.run import Run, RunCallback, run_of
from lightning_fp.recipes import (
    Rollout,
    RolloutDecision,
    RolloutRecipe,
    RolloutSignals,
    RolloutState,
    never_low,
    read,
    remarks_on,
)
from lightning_fp.recipes.evidence import GateVerdict
from lightning_fp.recipes.text import as_plain
from lightning_fp.records.event_log import EventLog
from lightning_fp.records.events import GateResult, Note, StageChange
from lightning_fp.state_version import check_version
from lightning_fp.telemetry import LOSS
from lightning_fp.telemetry.casts.summary import flops_share
from lightning_fp.telemetry.rollout.gate_evidence import LOSS_GAP, GateEvidence
from lightning_fp.telemetry.rollout.stage_moves import StageMoves, follow
from lightning_fp.telemetry.rollout.token_counter import TokenCounter

log = logging.getLogger(__name__)

STATE_VERSION = 1

STAGE = "fp8/stage"
"""Under this name loggers and the progress bar show the index of the stage, from 0."""


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

    Raises:
        ValueError: for a recipe that cannot be; at setup without a plugin of this package, for a
            pattern that matches nothing, a gate whose callback is missing or that can never be
            measured, or a stage that ends by a share of a run whose length is not known.
    """

    def __init__(
        self,
        recipe: RolloutRecipe | str | Path = "balanced",
        *,
        baseline: str | Path | None = None,
        tokens_per_step: int | None = None,
        dirpath: str | Path | None = None,
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
        self._rollout = Rollout(self.recipe)
        self._state = self._rollout.init()
        self._moves: StageMoves | None = None
        self._evidence = GateEvidence({}, None, None)
        self._tokens: TokenCounter | None = None
        self._run: Run | None = None
        self._fallback: PrecisionFallback | None = None
        self._steps = math.inf
        self._open: int | None = None
        self._shown = -1
        self._loaded: dict[str, Any] | None = None

    @property
    def stage(self) -> str | None:
        """The name of the stage that the run is in; None before the first."""
        stage = self._rollout.stage(self._state)
        return None if stage is None else stage.name

    @property
    def state(self) -> RolloutState:
        """Where the rollout stands, and why it is held or over."""
        return self._state

    @override
    def settings(self) -> dict[str, Any]:
        """The recipe as plain data, and the options."""
        return {
            "recipe": as_plain(self.recipe),
            # absolute, since a report is made elsewhere than the run
            "baseline": None if self.baseline is None else str(Path(self.baseline).absolute()),
            "tokens_per_step": self.tokens_per_step,
        }

    # -- set-up ---------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer without a table of formats, or without what the gates ask for."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.plugin(trainer)
        # Of this fit; a checkpoint's state comes after this hook and before the table is filled.
        self._state, self._loaded = self._rollout.init(), None
        interval = _interval(trainer)
        names = measurements(self.recipe, trainer, interval)
        until = {key for stage in self.recipe.stages for key in stage.until}
        if LOSS in until:
            names[LOSS] = LOSS
        logged = [name for name in dict.fromkeys(names.values()) if not is_published(name)]
        metrics = LoggedMetrics(trainer, logged, interval) if logged else None
        baseline = self.baseline if LOSS_GAP in names.values() else None
        self._evidence = GateEvidence(names, baseline, metrics)
        tokens = TokenCounter(self.tokens_per_step, interval)
        self._tokens = tokens if "tokens" in until else None
        callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        watching = [c for c in callbacks if isinstance(c, PrecisionFallback) and not c.dry_run]
        self._fallback = watching[0] if watching else None
        self._open, self._run = None, None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the recipe over this model, and refuse what cannot be."""
        plugin = self.plugin(trainer)
        self._moves = StageMoves(self.recipe, plugin)
        check_measurable(self._moves.stages, trainer, plugin.precision_map)
        stages = self._moves.stages
        order_known = plugin.report is not None and bool(plugin.report.order)
        for remark in remarks_on(self.recipe, stages, order_known=order_known):
            rank_zero_info(remark)
        never = never_low(self.recipe, stages, plugin.precision_map.configured())
        if never and trainer.is_global_zero:
            log.warning("%s", never)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin, or go on from a checkpoint."""
        self._steps = self._length(trainer)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._restore(loaded, trainer)
        self._shown, self._run = -1, run_of(trainer)
        self._evidence.follow(self._run)

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
        if self._run is None:
            return
        # Not under `_safely`: tokens that cannot be counted are an error of the first batch, and no
        # stage that never ends.
        if self._tokens is not None:
            self._tokens.add(batch)
        if self._open is None:
            self._safely(self._boundary, self._run, self._moves, trainer)
            self._open = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """At the end of a step: count its tokens, and show the stage."""
        run, step, interval = self._run, trainer.global_step, _interval(trainer)
        if run is None or step == self._open:
            return
        self._open = None
        if self._tokens is not None:
            self._tokens.end_step(step, trainer.strategy.root_device)
        if self._shown < 0 or step // interval > self._shown // interval:
            self._shown = step
            index = float(self._state.stage)
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
            run.show({STAGE: index}, step)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Metrics of a validation are new."""
        if not trainer.sanity_checking:
            self._evidence.validated()

    # -- between two steps ----------------------------------------------------------------------

    def _boundary(self, run: Run, moves: StageMoves, trainer: L.Trainer) -> None:
        step, log = trainer.global_step, run.log(self)
        moves.begin(self._state.stage)
        self._evidence.gather(step, self._state.entered)
        held, over = self._held()
        signals = RolloutSignals(
            step=step,
            share=step / self._steps,
            tokens=None if self._tokens is None else self._tokens.total,
            values=self._evidence.take(),
            held=held,
            over=over,
            skipped=moves.skipped,
        )
        before = self._state
        self._state, decision = self._rollout.step(before, signals)
        self._tell_gates(log, step, before, decision.verdicts)
        if self._state.held != before.held:
            self._tell_hold(log, step, before.held)
        if decision.action == "stop":
            self._tell_end(log, step, decision.reason)
        elif decision.action != "none":
            self._enter(log, moves, before, decision, signals)

    def _held(self) -> tuple[str, str]:
        """Why no stage may begin or end now, and why none may ever again."""
        # A stage that moved layers now would change what the fallback compares, and its formats
        # would be judged by a loss that has other reasons to be unusual.
        phase = "" if self._fallback is None else self._fallback.phase
        if phase == "permanent":
            return "", "PrecisionFallback has put all layers into high precision for good"
        if phase in ("suspect", "attribute", "demote"):
            return "PrecisionFallback looks into an incident", ""
        held = "PrecisionFallback has layers demoted, on probation"
        return (held if phase == "probation" else ""), ""

    def _enter(
        self,
        log: EventLog,
        moves: StageMoves,
        before: RolloutState,
        decision: RolloutDecision,
        signals: RolloutSignals,
    ) -> None:
        """Carry a decision out: give the stage's layers their formats."""
        # The stage is told before its writes, whose events follow it in the log.
        name = self.recipe.stages[self._state.stage].name
        changes, left = moves.plan(self._state.stage, before.stage)
        action = f"{len(changes)} layers change"
        action += f", {len(left)} are left as others have set them" if left else ""
        log.write(
            StageChange(
                step=signals.step,
                reason=decision.reason,
                stage=name,
                previous="" if before.stage < 0 else self.recipe.stages[before.stage].name,
                numbers={
                    "stage": float(self._state.stage),
                    "layers_changed": float(len(changes)),
                    "layers_left": float(len(left)),
                    "fp8_share": flops_share(moves.owner, changes),
                    "share": signals.share or 0.0,
                    **({} if signals.tokens is None else {"tokens": float(signals.tokens)}),
                },
                layers=tuple(changes),
                action=action,
            )
        )
        moves.write(changes, f"rollout stage {name}: {decision.reason}")
        log.count("stage_changes", signals.step)
        self._shown = -1  # shown at the end of this step, wherever the interval stands
        if self._state.ended:
            self._tell_end(log, signals.step, self._state.ended)

    # -- what is said ---------------------------------------------------------------------------

    def _tell_gates(
        self, log: EventLog, step: int, state: RolloutState, verdicts: Sequence[GateVerdict]
    ) -> None:
        stage = self._rollout.stage(state)
        if stage is None:
            return
        for verdict in verdicts:
            gate, passed = verdict.gate, verdict.answer == "passed"
            bounds = {"below": gate.below, "above": gate.above}
            log.write(
                GateResult(
                    step=step,
                    reason=verdict.sentence(),
                    stage=stage.name,
                    statistic=gate.statistic,
                    passed=passed,
                    numbers={
                        "value": verdict.value,
                        "window": float(gate.window),
                        **{name: value for name, value in bounds.items() if value is not None},
                    },
                    action="" if passed else _CONSEQUENCE[stage.on_fail, verdict.answer],
                )
            )
            if verdict.answer == "failed":
                log.count("gate_failures", step)

    def _tell_hold(self, log: EventLog, step: int, before: str) -> None:
        if self._state.held:
            text = f"the rollout holds in stage {self.stage}: {self._state.held}"
        else:
            text = f"the rollout goes on in stage {self.stage}, no longer held: {before}"
        log.write(Note(step=step, reason=text))

    def _tell_end(self, log: EventLog, step: int, reason: str) -> None:
        text = f"the rollout ends in stage {self.stage}: {reason}"
        log.write(Note(step=step, reason=text))

    def _safely(self, function: Callable[..., object], run: Run, *args: Any) -> None:
        """A rollout that fails ends where it stands, and the training goes on."""
        try:
            function(run, *args)
        except Exception as error:
            self._run = None
            log.exception("StagedRollout failed; the training goes on in the formats of now")
            text = f"the rollout has failed in stage {self.stage}, the run goes on: {error}"
            run.log(self).write(Note(step=self._state.last, reason=text))

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The rollout stands still."""
        if stage == "fit":
            self._run = None

    # -- state ----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Stage, evidence, counts; the recipe too, to notice on resume that it was changed."""
        if self._run is not None:
            step = self._run.step if self._open is None else None
            self._evidence.wait(step, self._state.entered)
        return {
            "version": STATE_VERSION,
            "recipe": self.recipe.to_yaml(),
            "rollout": self._rollout.state_dict(self._state),
            "evidence": self._evidence.state_dict(),
            "tokens": None if self._tokens is None else self._tokens.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this before the model is set up: it takes effect at the start."""
        check_version(state_dict, STATE_VERSION, "StagedRollout state must have version")
        self._state = self._rollout.load_state_dict(state_dict["rollout"])
        self._loaded = state_dict

    def _restore(self, loaded: Mapping[str, Any], trainer: L.Trainer) -> None:
        same = loaded["recipe"] == self.recipe.to_yaml()
        self._evidence.load_state_dict(loaded["evidence"], same_recipe=same)
        if self._tokens is not None and loaded["tokens"] is not None:
            self._tokens.load_state_dict(loaded["tokens"])
        if same:
            return
        # Other gates may mean other things by the same names: their evidence begins anew.
        old = RolloutRecipe.from_yaml(loaded["recipe"])
        self._state = replace(self._state, evidence={}, answers={})
        if self.stage is not None:
            formats = follow(old, self.plugin(trainer))[old.index(self.stage)].formats
            if self._moves is not None:
                self._moves.changed_from = formats


_CONSEQUENCE = {
    ("hold", "failed"): "the stage goes on until it passes",
    ("step_back", "failed"): "one stage back",
    ("stop", "failed"): "the rollout ends here",
    ("hold", "no data"): "the stage goes on until it is measured",
    ("step_back", "no data"): "the stage goes on until it is measured",
    ("stop", "no data"): "the stage goes on until it is measured",
}
"""What follows when a gate does not pass, by `on_fail` and the gate's answer."""


def _interval(trainer: L.Trainer) -> int:
    interval: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
    return max(1, interval)
