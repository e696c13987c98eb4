"""Staging: a recipe played over a run, once between two optimizer steps.

When a stage begins and ends is decided by a pure machine (`recipes.Rollout`). This brings it what
it decides from and carries out what it says: a stage is a write to the table. All that goes in is
alike on all ranks, so that all decide alike and no rank need ask another.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_fp.counting import counted
from lightning_fp.layers.table_owner import TableOwner
from lightning_fp.recipes import (
    Rollout,
    RolloutDecision,
    RolloutRecipe,
    RolloutSignals,
    RolloutState,
)
from lightning_fp.recipes.evidence import GateVerdict
from lightning_fp.records.event_log import EventLog
from lightning_fp.records.events import GateResult, Note, StageChange
from lightning_fp.state_version import check_version, reads
from lightning_fp.telemetry.casts.summary import flops_share
from lightning_fp.telemetry.rollout.gate_evidence import GateEvidence
from lightning_fp.telemetry.rollout.stage_moves import StageMoves, follow
from lightning_fp.telemetry.rollout.token_counter import TokenCounter
from lightning_fp.telemetry.run_telemetry import RunTelemetry

log = logging.getLogger(__name__)

STATE_VERSION = 1

STAGE = "fp8/stage"
"""Under this name loggers and the progress bar show the index of the stage, from 0."""


class Staging:
    """Where a run stands in its recipe.

    Args:
        recipe: the stages.
        evidence: what gates go by.
        tokens: counts tokens, where a stage ends by them.
    """

    def __init__(
        self,
        recipe: RolloutRecipe,
        evidence: GateEvidence | None = None,
        tokens: TokenCounter | None = None,
    ) -> None:
        self.recipe = recipe
        self.rollout = Rollout(recipe)
        """Decides."""
        self.state: RolloutState = self.rollout.init()
        """Where the rollout stands, and why it is held or over."""
        self.evidence = evidence or GateEvidence({}, None, None)
        self.tokens = tokens
        self.moves: StageMoves | None = None
        """What stages do to the table; None before `follow`."""
        self.run: RunTelemetry | None = None
        """The run; None before it begins, and after a failure."""
        self._log = EventLog(None)
        self._steps = math.inf
        self._open: int | None = None
        self._shown = -1
        self._loaded: Mapping[str, Any] | None = None

    @property
    def stage(self) -> str | None:
        """The name of the stage that the run is in; None before the first."""
        stage = self.rollout.stage(self.state)
        return None if stage is None else stage.name

    def follow(self, owner: TableOwner) -> StageMoves:
        """Take the recipe over a model's layers.

        Args:
            owner: of the table, when it is filled.

        Raises:
            ValueError: see `stage_moves.follow`.
        """
        self.moves = StageMoves(self.recipe, owner)
        return self.moves

    def begin(self, run: RunTelemetry, log: EventLog, steps: float) -> None:
        """Begin, or go on from a checkpoint.

        Args:
            run: where evidence is published, and the stage shown.
            log: where stages and gates are told.
            steps: of the whole run; inf where no stage asks.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is not None and self.moves is not None:
            self._restore(loaded, self.moves)
        self.run, self._log, self._steps = run, log, steps
        self._open, self._shown = None, -1
        self.evidence.follow(run)

    # -- steps ----------------------------------------------------------------------------------

    def before_batch(self, batch: Any, step: int, *, held: str = "", over: str = "") -> None:
        """At the begin of a micro-batch: count its tokens, and `settle` if it is a step's first.

        Args:
            batch: to count its tokens.
            step: optimizer steps done.
            held: why no stage may begin or end now.
            over: why none may ever again.
        """
        # First: tokens that cannot be counted are an error of the first batch, and no stage that
        # never ends.
        self.count(batch)
        self.settle(step, held=held, over=over)

    def count(self, batch: Any) -> None:
        """Count the tokens of a micro-batch."""
        if self.run is not None and self.tokens is not None:
            self.tokens.add(batch)

    def settle(self, step: int, *, held: str = "", over: str = "") -> None:
        """Between two steps: gather, decide, write to the table; once in a step.

        Args:
            step: optimizer steps done.
            held: why no stage may begin or end now.
            over: why none may ever again.
        """
        if self.run is None or self._open is not None:
            return
        try:
            if self.moves is not None:
                self._boundary(self.moves, step, held, over)
        except Exception as error:
            self.run = None
            log.exception("StagedRollout failed; training continues in the current formats")
            text = f"the rollout has failed in stage {self.stage}, the run goes on: {error}"
            self._log.write(Note(step=self.state.last, reason=text))
        self._open = step

    def after_batch(self, step: int, interval: int, device: torch.device) -> float | None:
        """At the end of a step: count its tokens, and show the stage.

        Args:
            step: optimizer steps done.
            interval: steps from one showing to the next.
            device: where collectives run.

        Returns:
            The stage's index, where it was shown.
        """
        run = self.run
        if run is None or step == self._open:
            return None
        self._open = None
        if self.tokens is not None:
            self.tokens.end_step(step, device)
        if self._shown >= 0 and step // interval == self._shown // interval:
            return None
        self._shown = step
        index = float(self.state.stage)
        run.show({STAGE: index}, step)
        return index

    # -- between two steps ----------------------------------------------------------------------

    def _boundary(self, moves: StageMoves, step: int, held: str, over: str) -> None:
        moves.begin(self.state.stage)
        self.evidence.gather(step, self.state.entered)
        signals = RolloutSignals(
            step=step,
            share=step / self._steps,
            tokens=None if self.tokens is None else self.tokens.total,
            values=self.evidence.take(),
            held=held,
            over=over,
            skipped=moves.skipped,
        )
        before = self.state
        self.state, decision = self.rollout.step(before, signals)
        self._tell_gates(step, before, decision.verdicts)
        if self.state.held != before.held:
            self._tell_hold(step, before.held)
        if decision.action == "stop":
            self._tell_end(step, decision.reason)
        elif decision.action != "none":
            self._enter(moves, before, decision, signals)

    def _enter(
        self,
        moves: StageMoves,
        before: RolloutState,
        decision: RolloutDecision,
        signals: RolloutSignals,
    ) -> None:
        """Carry a decision out: give the stage's layers their formats."""
        # The stage is told before its writes, whose events follow it in the log.
        name = self.recipe.stages[self.state.stage].name
        changes, left = moves.plan(self.state.stage, before.stage)
        action = f"{counted(len(changes), 'layer')} {'changes' if len(changes) == 1 else 'change'}"
        if left:
            stay = "stays as others have set it" if len(left) == 1 else "stay as others set them"
            action += f", {counted(len(left), 'layer')} {stay}"
        self._log.write(
            StageChange(
                step=signals.step,
                reason=decision.reason,
                stage=name,
                previous="" if before.stage < 0 else self.recipe.stages[before.stage].name,
                numbers={
                    "stage": float(self.state.stage),
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
        self._log.count("stage_changes", signals.step)
        self._shown = -1  # shown at the end of this step, wherever the interval stands
        if self.state.ended:
            self._tell_end(signals.step, self.state.ended)

    # -- what is said ---------------------------------------------------------------------------

    def _tell_gates(self, step: int, state: RolloutState, verdicts: Sequence[GateVerdict]) -> None:
        stage = self.rollout.stage(state)
        if stage is None:
            return
        for verdict in verdicts:
            gate, passed = verdict.gate, verdict.answer == "passed"
            bounds = {"below": gate.below, "above": gate.above}
            self._log.write(
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
                self._log.count("gate_failures", step)

    def _tell_hold(self, step: int, before: str) -> None:
        if self.state.held:
            text = f"the rollout waits in stage {self.stage}: {self.state.held}"
        else:
            text = f"the rollout goes on in stage {self.stage}, no longer waiting: {before}"
        self._log.write(Note(step=step, reason=text))

    def _tell_end(self, step: int, reason: str) -> None:
        text = f"the rollout ends in stage {self.stage}: {reason}"
        self._log.write(Note(step=step, reason=text))

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Stage, evidence, counts; the recipe too, to notice on resume that it was changed."""
        if self.run is not None:
            step = self.run.step if self._open is None else None
            self.evidence.wait(step, self.state.entered)
        return {
            "version": STATE_VERSION,
            "recipe": self.recipe.to_yaml(),
            "rollout": self.rollout.state_dict(self.state),
            "evidence": self.evidence.state_dict(),
            "tokens": None if self.tokens is None else self.tokens.state_dict(),
        }

    @reads("StagedRollout state")
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `state_dict`; it takes effect when the run begins."""
        saved = check_version(state_dict, STATE_VERSION, "StagedRollout state")
        self.state = self.rollout.load_state_dict(saved["rollout"])
        self._loaded = saved

    @reads("StagedRollout state")
    def _restore(self, loaded: Mapping[str, Any], moves: StageMoves) -> None:
        same = loaded["recipe"] == self.recipe.to_yaml()
        self.evidence.load_state_dict(loaded["evidence"], same_recipe=same)
        if self.tokens is not None and loaded["tokens"] is not None:
            self.tokens.load_state_dict(loaded["tokens"])
        if same:
            return
        # Other gates may mean other things by the same names: their evidence begins anew.
        old = RolloutRecipe.from_yaml(loaded["recipe"])
        self.state = replace(self.state, evidence={}, answers={})
        if self.stage is not None:
            moves.changed_from = follow(old, moves.owner)[old.index(self.stage)].formats


_CONSEQUENCE = {
    ("hold", "failed"): "the stage goes on until it passes",
    ("step_back", "failed"): "one stage back",
    ("stop", "failed"): "the rollout ends here",
    ("hold", "no data"): "the stage goes on until it is measured",
    ("step_back", "no data"): "the stage goes on until it is measured",
    ("stop", "no data"): "the stage goes on until it is measured",
}
"""What follows when a gate does not pass, by `on_fail` and the gate's answer."""


def held_by_fallback(phase: str) -> tuple[str, str]:
    """Why no stage may begin or end now, and why none may ever again.

    Args:
        phase: where the fallback stands; "" without one.
    """
    # A stage that moved layers now would change what the fallback compares, and its formats would
    # be judged by a loss that has other reasons to be unusual.
    if phase == "permanent":
        return "", "PrecisionFallback has put all layers into high precision for good"
    if phase in ("suspect", "attribute", "demote"):
        return "PrecisionFallback looks into an incident", ""
    held = "PrecisionFallback watches the layers that it has moved"
    return (held if phase == "probation" else ""), ""
