"""The states of the fallback, and what each signal does to them. Pure: no training, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lightning_fp.argument_types import built, checked
from lightning_fp.state_version import check_version

Phase = Literal["warmup", "healthy", "suspect", "attribute", "demote", "probation", "permanent"]

Action = Literal["none", "investigate", "promote"]

Scope = Literal["layers", "group", "all"]

STATE_VERSION = 1

MOST_DOUBLINGS = 6
"""Of the grace: a run is never left unwatched for longer than 64 times that."""


@checked
@dataclass(frozen=True, kw_only=True)
class FallbackPolicy:
    """How long the fallback waits, and how often it tries.

    The waits and counts are starting values: 50 steps of grace and 500 of probation, at most
    three demotions, are what the practice of large runs suggests.
    """

    grace: int = 50
    """Steps after a verdict before the loss alone is a reason for the next investigation; what
    batches and gradients show meanwhile is looked into at once. After one against precision they
    are doubled each time, up to 64-fold, until a run is quiet for as long; after an unclear one an
    eighth of them, then a quarter, a half, all: a fault that has just begun is soon clear, and
    every step counts."""

    hold: int = 500
    """Steps that demoted layers stay demoted before they are tried again; doubled each time."""

    max_demotions: int = 3
    """Incidents that precision caused before all layers go to high precision for good."""

    max_skips: int = 3
    """Steps in a row that may be left out as not finite before that is a suspicion."""

    def __post_init__(self) -> None:
        for name in ("grace", "hold", "max_demotions", "max_skips"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class FallbackState:
    """Where the fallback stands."""

    phase: Phase = "warmup"

    since: int = 0
    """Step at which the phase began."""

    onset: int | None = None
    """Step of the first anomalous signal of the incident that is open."""

    demoted: Mapping[str, str] = field(default_factory=dict[str, str])
    """The demoted layers, and the format each of them had before."""

    demotions: int = 0
    """Incidents that precision caused so far."""

    escalation: int = 0
    """Incidents since everything was last in its own format; decides the scope of the next."""

    quiet_until: int = 0
    """Step up to which what the loss shows is not investigated."""

    acquittals: int = 0
    """Verdicts against precision in a row."""

    doubts: int = 0
    """Unclear verdicts in a row, in the incident that is open."""


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What one step showed."""

    step: int
    armed: bool
    """Whether the detector has seen enough."""

    suspicious: bool
    """Whether the detector, or a probe, suspects something."""

    onset: int | None = None
    """The step at which what it suspects began."""

    skips: int = 0
    """Steps left out in a row, up to this one."""


class Fallback:
    """Turns signals into actions.

    Args:
        policy: waits and counts.
    """

    def __init__(self, policy: FallbackPolicy | None = None) -> None:
        self.policy = FallbackPolicy() if policy is None else policy

    def init(self, step: int = 0) -> FallbackState:
        """Warming up."""
        return FallbackState(since=step)

    def step(self, state: FallbackState, signals: Signals) -> tuple[FallbackState, Action]:
        """Take in one step's signals.

        Args:
            state: where the fallback stands.
            signals: what the step showed.

        Returns:
            The new state, and what is to be done before the next step.
        """
        step = signals.step
        stuck = signals.skips > self.policy.max_skips
        if state.phase == "warmup":
            if signals.armed:
                state = _enter(state, "healthy", step)
            elif not stuck:  # a run that cannot make a step is an incident at any time
                return state, "none"
        if state.phase == "permanent":
            return state, "none"
        if signals.suspicious or stuck:
            if step < state.quiet_until:
                return state, "none"
            onset = step - signals.skips if signals.onset is None else signals.onset
            return self.suspected(state, step, onset), "investigate"
        if state.phase == "suspect" and step >= state.quiet_until:
            back: Phase = "probation" if state.demoted else "healthy"
            return replace(_enter(state, back, step), onset=None, doubts=0), "none"
        if state.phase == "probation" and step - state.since >= self.hold(state):
            return state, "promote"
        return state, "none"

    def suspected(self, state: FallbackState, step: int, onset: int) -> FallbackState:
        """Something is suspicious, and is looked into at once.

        What replays have shown, and not the loss, waits for no grace.

        Args:
            state: where the fallback stands.
            step: this step.
            onset: the first anomalous one.
        """
        if state.phase == "permanent":
            return state
        if state.onset is not None:  # an open incident keeps its beginning
            onset = min(onset, state.onset)
        return replace(_enter(state, "suspect", step), onset=onset)

    # -- what an investigation says -------------------------------------------------------------

    def scope(self, state: FallbackState) -> Scope:
        """What the next demotion takes in: the culprits, their group, everything."""
        scopes: tuple[Scope, ...] = ("layers", "group", "all")
        return scopes[min(state.escalation, len(scopes) - 1)]

    def gives_up(self, state: FallbackState) -> bool:
        """Whether the next demotion is the last: everything to high precision, for good."""
        return state.demotions + 1 >= self.policy.max_demotions

    def convicted(
        self,
        state: FallbackState,
        step: int,
        before: Mapping[str, str],
        *,
        one_more: bool = False,
    ) -> FallbackState:
        """Precision was to blame, and layers were demoted.

        Args:
            state: where the fallback stands.
            step: the step at whose boundary it happens.
            before: the formats that the demoted layers had.
            one_more: whether it is of layers that were not demoted yet, and shown by a single
                batch or left over by the last demotion: so the fault has not come back.
        """
        final = self.gives_up(state) and not one_more
        return replace(
            _enter(state, "permanent" if final else "probation", step),
            onset=None,
            # A layer that is demoted again keeps the format that it had in the first place.
            demoted={**before, **state.demoted},
            demotions=state.demotions + (not one_more),
            escalation=state.escalation + (not one_more),
            acquittals=0,
            doubts=0,
            quiet_until=step,
        )

    def acquitted(self, state: FallbackState, step: int, *, firm: bool = True) -> FallbackState:
        """Precision was not to blame: leave it alone, and do not ask again too soon.

        Args:
            state: where the fallback stands.
            step: the step of the verdict.
            firm: whether there was something else to blame, which may go on raising the loss; else
                precision has done no harm so far, and a rise is looked into at once.
        """
        back: Phase = "probation" if state.demoted else "healthy"
        if not firm:
            return replace(_enter(state, back, step), onset=None, doubts=0)
        wait = self.policy.grace * 2 ** min(state.acquittals, MOST_DOUBLINGS)
        before = state.acquittals
        if step >= state.quiet_until + wait:  # quiet for so long: another matter
            before, wait = 0, self.policy.grace
        return replace(
            state,
            phase=back,
            since=step,
            onset=None,
            acquittals=before + 1,
            doubts=0,
            quiet_until=step + wait,
        )

    def unclear(self, state: FallbackState, step: int) -> FallbackState:
        """Neither convicted nor acquitted: look again soon, if it lasts."""
        wait = max(1, self.policy.grace * 2 ** min(state.doubts, 3) // 8)
        return replace(state, quiet_until=step + wait, doubts=state.doubts + 1)

    def promoted(self, state: FallbackState, step: int) -> FallbackState:
        """The demoted layers are back in their formats."""
        return replace(_enter(state, "healthy", step), demoted={}, escalation=0)

    def hold(self, state: FallbackState) -> int:
        """Steps of probation: longer after every incident."""
        return self.policy.hold * 2 ** max(0, min(state.demotions - 1, 10))

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self, state: FallbackState) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {"version": STATE_VERSION, **asdict(state)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> FallbackState:
        """See `state_dict`.

        Raises:
            ValueError: if the state is of another version.
        """
        return built(FallbackState, check_version(saved, STATE_VERSION, "fallback state"))


def _enter(state: FallbackState, phase: Phase, step: int) -> FallbackState:
    return state if state.phase == phase else replace(state, phase=phase, since=step)
