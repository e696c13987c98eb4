"""The states of a rollout, and what each step does to them. Pure: no training, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from lightning_fp.argument_types import built
from lightning_fp.counting import counted
from lightning_fp.recipes.evidence import GateVerdict, Series, extend, judge
from lightning_fp.recipes.recipe import RolloutRecipe
from lightning_fp.recipes.stage import Stage
from lightning_fp.state_version import check_version

STATE_VERSION = 1

LOSS_WINDOW = 50
"""Steps over which `until.loss` takes the mean: single steps scatter."""

MOST_DOUBLINGS = 6
"""Of the wait after a stage was given up: at most 64 times its longest window."""

Action = Literal["none", "enter", "step_back", "stop"]


@dataclass(frozen=True, kw_only=True)
class RolloutState:
    """Where a rollout stands."""

    stage: int = -1
    """Index of the stage; -1 before the first."""

    entered: int = 0
    """Step at which it began; moves along while the rollout is held, so that its clock stands."""

    least: int = 0
    """Steps that the stage must last at least, after a later one was given up."""

    last: int = 0
    """Step seen last."""

    tries: Mapping[str, int] = field(default_factory=dict[str, int])
    """How often each stage was given up, by name."""

    evidence: Mapping[str, Series] = field(default_factory=dict[str, Series])
    """What was measured in the stage, by statistic."""

    answers: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the gates of the stage said last, by place."""

    held: str = ""
    """Why the rollout is held from outside; empty if it is not."""

    ended: str = ""
    """Why the rollout is over; empty while it is not."""


@dataclass(frozen=True, kw_only=True)
class RolloutSignals:
    """What there is to know between two steps."""

    step: int
    """Optimizer steps so far."""

    share: float | None = None
    """Share of the run's steps that they are."""

    tokens: int | None = None
    """Training tokens so far."""

    values: Mapping[str, Iterable[tuple[int, float]]] = field(
        default_factory=dict[str, Iterable[tuple[int, float]]]
    )
    """What was measured since the last time: (step, value) by statistic. NaN is no measurement."""

    held: str = ""
    """Why no stage may begin or end now, e.g. that layers are demoted."""

    over: str = ""
    """Why no further stage may begin at all."""

    skipped: frozenset[int] = frozenset()
    """The stages, by index, that come to nothing on this model; never the first."""


@dataclass(frozen=True, kw_only=True)
class RolloutDecision:
    """What is to be done before the next step."""

    action: Action = "none"
    """"enter" the stage, "step_back" to it, or "stop" where the rollout is."""

    reason: str = ""
    """A sentence."""

    verdicts: tuple[GateVerdict, ...] = ()
    """What gates say that they have not said before."""


class Rollout:
    """Takes a run through the stages of a recipe.

    >>> from lightning_fp.recipes import get
    >>> rollout = Rollout(get("bf16-cooldown"))
    >>> state, decision = rollout.step(rollout.init(), RolloutSignals(step=0, share=0.0))
    >>> decision.action, rollout.stage(state).name
    ('enter', 'low')
    >>> state, decision = rollout.step(state, RolloutSignals(step=90, share=0.9))
    >>> decision.reason
    'share of the run is 0.9, until 0.9'

    Args:
        recipe: the stages.
    """

    def __init__(self, recipe: RolloutRecipe) -> None:
        self.recipe = recipe

    def init(self) -> RolloutState:
        """Before the first stage."""
        return RolloutState()

    def stage(self, state: RolloutState) -> Stage | None:
        """The stage that a state is in; None before the first."""
        return None if state.stage < 0 else self.recipe.stages[state.stage]

    def step(
        self, state: RolloutState, signals: RolloutSignals
    ) -> tuple[RolloutState, RolloutDecision]:
        """Take in what there is to know, once between two steps.

        Args:
            state: where the rollout stands.
            signals: what there is to know.

        Returns:
            The new state, and what is to be done before the next step.
        """
        if state.ended:
            return state, RolloutDecision()
        if signals.over:
            return self._end(state, signals.over)
        stage = self.stage(state)
        if stage is None:
            if signals.held:
                return replace(state, held=signals.held), RolloutDecision()
            return self._enter(state, 0, signals.step, "enter", "the rollout begins")
        after = self._next(state.stage, signals)
        if state.stage in signals.skipped and after is not None and not signals.held:
            reason = f"{stage} changes nothing on this model"
            return self._enter(state, after, signals.step, "enter", reason)
        if signals.held:
            state = replace(
                state,
                entered=state.entered + signals.step - state.last,
                last=signals.step,
                held=signals.held,
                evidence={},  # of layers that were demoted
                answers={},
            )
            return state, RolloutDecision()
        state = self._take_in(state, stage, signals)
        lasted = signals.step - state.entered
        verdicts = [
            judge(gate, state.evidence, step=signals.step, lasted=lasted) for gate in stage.gates
        ]
        failed = next((verdict for verdict in verdicts if verdict.answer == "failed"), None)
        state, new = self._answers(state, verdicts)
        if failed is not None and stage.on_fail == "stop":
            return self._end(state, f"a gate failed: {failed.sentence()}", new)
        if failed is not None and stage.on_fail == "step_back":
            return self._step_back(state, stage, signals, failed, new)
        reached = self._reached(state, stage, signals, lasted)
        passed = all(verdict.answer == "passed" for verdict in verdicts)
        if reached is None or not passed or (after is None and not stage.until):
            return state, RolloutDecision(verdicts=new)
        if after is None:
            return self._end(state, f"the last stage is over: {reached}", new)
        reason = reached if not verdicts else f"{reached}; all gates pass".removeprefix("; ")
        return self._enter(state, after, signals.step, "enter", reason, new)

    def _next(self, stage: int, signals: RolloutSignals) -> int | None:
        """The stage after this one; None if it is the last."""
        later = range(stage + 1, len(self.recipe.stages))
        return next((index for index in later if index not in signals.skipped), None)

    # -- moves ----------------------------------------------------------------------------------

    def _enter(
        self,
        state: RolloutState,
        index: int,
        step: int,
        action: Action,
        reason: str,
        verdicts: tuple[GateVerdict, ...] = (),
    ) -> tuple[RolloutState, RolloutDecision]:
        state = replace(
            state,
            stage=index,
            entered=step,
            last=step,
            least=0,
            evidence={},
            answers={},
            held="",
        )
        return state, RolloutDecision(action=action, reason=reason, verdicts=verdicts)

    def _step_back(
        self,
        state: RolloutState,
        stage: Stage,
        signals: RolloutSignals,
        failed: GateVerdict,
        verdicts: tuple[GateVerdict, ...],
    ) -> tuple[RolloutState, RolloutDecision]:
        tries = state.tries.get(stage.name, 0) + 1
        final = tries >= stage.max_tries
        wait = stage.window * 2 ** min(tries - 1, MOST_DOUBLINGS)
        then = "for good" if final else f"for at least {counted(wait, 'step')}"
        reason = f"{failed.sentence()}; try {tries} of {stage.max_tries}, back {then}"
        earlier = range(state.stage - 1, -1, -1)
        to = next((index for index in earlier if index not in signals.skipped), 0)
        state, decision = self._enter(state, to, signals.step, "step_back", reason, verdicts)
        ended = f"{stage} was given up {tries} times" if final else ""
        state = replace(state, tries={**state.tries, stage.name: tries}, least=wait, ended=ended)
        return state, decision

    def _end(
        self, state: RolloutState, reason: str, verdicts: tuple[GateVerdict, ...] = ()
    ) -> tuple[RolloutState, RolloutDecision]:
        state = replace(state, ended=reason, evidence={}, answers={}, held="")
        return state, RolloutDecision(action="stop", reason=reason, verdicts=verdicts)

    # -- what a step shows ------------------------------------------------------------------------

    def _take_in(self, state: RolloutState, stage: Stage, signals: RolloutSignals) -> RolloutState:
        """What was measured in the stage; what is from before its entry was in other formats."""
        longest = max(stage.window, LOSS_WINDOW if "loss" in stage.until else 1)
        values = {
            name: [point for point in points if point[0] > state.entered]
            for name, points in signals.values.items()
        }
        evidence = extend(state.evidence, values, signals.step - longest + 1)
        return replace(state, evidence=evidence, last=signals.step, held="")

    def _answers(
        self, state: RolloutState, verdicts: list[GateVerdict]
    ) -> tuple[RolloutState, tuple[GateVerdict, ...]]:
        """Which gates say something else than last time."""
        told = {f"{i}": verdict.answer for i, verdict in enumerate(verdicts)}
        new = tuple(
            verdict
            for i, verdict in enumerate(verdicts)
            if verdict.answer not in ("too early", state.answers.get(f"{i}"))
        )
        return (replace(state, answers=told) if told != state.answers else state), new

    def _reached(
        self, state: RolloutState, stage: Stage, signals: RolloutSignals, lasted: int
    ) -> str | None:
        """How the stage has lasted long enough, as a sentence; None if it has not."""
        if lasted < state.least:
            return None
        reasons: list[str] = []
        losses = [value for _, value in state.evidence.get("loss", ())][-LOSS_WINDOW:]
        loss = fmean(losses) if len(losses) >= LOSS_WINDOW else None
        share = stage.until.get("share")
        for said, value, limit in (
            ("the stage has lasted {:,} steps (due at {:,})", lasted, stage.until.get("steps")),
            ("{:,.0f} tokens are seen (due at {:,.0f})", signals.tokens, stage.until.get("tokens")),
            ("{:.1%} of the run is done (due at {:.1%})", signals.share, share),
        ):
            if limit is None:
                continue
            if value is None or value < limit:
                return None
            reasons.append(said.format(value, limit))
        if (limit := stage.until.get("loss")) is not None:
            if loss is None or not loss < limit:
                return None
            reasons.append(f"the loss is {loss:.4g} (due below {limit:g})")
        return ", ".join(reasons)

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self, state: RolloutState) -> dict[str, Any]:
        """Plain numbers and strings; stages by name."""
        stage = self.stage(state)
        values = asdict(state)
        values["stage"] = None if stage is None else stage.name
        values["evidence"] = {n: [list(p) for p in s] for n, s in state.evidence.items()}
        return {"version": STATE_VERSION, **values}

    def load_state_dict(self, saved: Mapping[str, Any]) -> RolloutState:
        """See `state_dict`; the recipe may have other stages around the one the state is in.

        Raises:
            ValueError: if the state is of another version, or the recipe lacks its stage.
        """
        values = check_version(saved, STATE_VERSION, "rollout state")
        name = values.pop("stage")
        try:
            stage = -1 if name is None else self.recipe.index(name)
        except ValueError as error:
            raise ValueError(
                f"recipe {self.recipe.name!r} cannot go on from the checkpoint: {error}; keep the"
                " name of the stage that the run is in"
            ) from error
        evidence = {
            statistic: tuple((int(at), float(value)) for at, value in series)
            for statistic, series in values.pop("evidence").items()
        }
        return built(RolloutState, {"stage": stage, "evidence": evidence, **values})
