"""What replays may cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp.stability.replay.budget import ReplayBudget


def test_routine_keeps_to_its_share() -> None:
    budget = ReplayBudget(share=0.05)
    state = budget.init()
    assert not budget.affords(state, steps=39, cost=2)
    assert budget.affords(state, steps=40, cost=2)
    state = budget.spend(state, 2)
    assert not budget.affords(state, steps=79, cost=2)
    assert budget.affords(state, steps=80, cost=2)


def test_one_incident_is_free_and_the_next_is_not() -> None:
    budget = ReplayBudget(share=0.05)
    state = budget.init()
    assert budget.affords(state, steps=0, cost=500, incident=True)
    state = budget.closed(budget.spend(state, 500, incident=True))
    assert not budget.affords(state, steps=100, cost=6)
    assert budget.affords(state, steps=100, cost=5)
    assert not budget.affords(state, steps=100, cost=20, incident=True)
    assert budget.affords(state, steps=400, cost=20, incident=True)


def test_an_incident_in_many_parts_is_one() -> None:
    budget = ReplayBudget(share=0.0)
    state = budget.init()
    for _ in range(5):
        assert budget.affords(state, steps=1, cost=10, incident=True)
        state = budget.spend(state, 10, incident=True)
    assert budget.spent(state) == 50
    state = budget.closed(state)
    assert not budget.affords(state, steps=1, cost=1)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(ValueError, match="replay_budget must be a share from 0 to 1"):
        ReplayBudget(share=share)


@given(
    st.floats(0, 1),
    st.lists(st.tuples(st.integers(1, 50), st.booleans(), st.booleans()), max_size=60),
)
def test_who_asks_first_never_spends_more(
    share: float, asked: list[tuple[int, bool, bool]]
) -> None:
    budget = ReplayBudget(share=share)
    state, steps = budget.init(), 0
    incidents = [0.0]
    for cost, incident, ends in asked:
        steps += 10
        if budget.affords(state, steps=steps, cost=cost, incident=incident):
            state = budget.spend(state, cost, incident=incident)
            incidents[-1] += cost if incident else 0
        if ends:
            state = budget.closed(state)
            incidents.append(0.0)
        state = budget.load_state_dict(budget.state_dict(state))
        assert budget.spent(state) <= share * steps + max(incidents) + 1e-6
