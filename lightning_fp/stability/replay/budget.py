"""What replays may cost: a share of the steps, and one incident.

Replays take the run's own time, and a watch that asks at every doubt can cost more than it saves.
So what is replayed is counted in steps, and bounded by a share of those that the run has made. A
young run has made few: the most expensive incident is free, or the first could never be answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

FORWARD = 1 / 3
"""A forward pass alone, in steps: backward costs twice as much."""


@dataclass(frozen=True, kw_only=True)
class BudgetState:
    """What was spent, in replayed steps."""

    routine: float = 0.0
    """On looks that nobody's suspicion has asked for."""

    incidents: float = 0.0
    """On all incidents, the open one too."""

    open: float = 0.0
    """On the open one so far."""

    dearest: float = 0.0
    """On the most expensive of those that have ended."""


@dataclass(frozen=True, kw_only=True)
class ReplayBudget:
    """Says what may still be replayed. Pure: old states stay usable.

    The most expensive incident is free, so that a young run can be saved too. All else is together
    at most a share of the steps that the run has made.

    >>> budget = ReplayBudget(share=0.05)
    >>> state = budget.spend(budget.init(), 400, incident=True)
    >>> budget.affords(budget.closed(state), steps=400, cost=16)
    True
    """

    share: float = 0.05
    """Of the run's steps."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"replay_budget must be a share from 0 to 1, got {self.share!r}")

    def init(self) -> BudgetState:
        """Nothing is spent."""
        return BudgetState()

    def spent(self, state: BudgetState) -> float:
        """Replayed steps so far."""
        return state.routine + state.incidents

    def affords(
        self, state: BudgetState, *, steps: int, cost: float, incident: bool = False
    ) -> bool:
        """Whether something may be replayed.

        Args:
            state: what was spent.
            steps: optimizer steps that the run has made.
            cost: in replayed steps.
            incident: whether the open incident asks for it.
        """
        free = max(state.dearest, state.open + (cost if incident else 0.0))
        return self.spent(state) + cost - free <= self.share * steps

    def spend(self, state: BudgetState, cost: float, *, incident: bool = False) -> BudgetState:
        """Something was replayed; see `affords`."""
        if not incident:
            return replace(state, routine=state.routine + cost)
        return replace(state, incidents=state.incidents + cost, open=state.open + cost)

    def closed(self, state: BudgetState) -> BudgetState:
        """The open incident has ended."""
        return replace(state, open=0.0, dearest=max(state.dearest, state.open))

    def state_dict(self, state: BudgetState) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(state)

    def load_state_dict(self, saved: Mapping[str, Any]) -> BudgetState:
        """See `state_dict`."""
        return BudgetState(**saved)
