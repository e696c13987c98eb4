"""What replays may cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp.stability.replay.budget import (
    INCIDENT,
    PROBE,
    RESERVE,
    TRAJECTORIES,
    ReplayBudget,
    most_steps,
)


def test_probes_keep_to_the_share_and_leave_the_incident() -> None:
    budget, made = ReplayBudget(share=0.05), list[int]()
    for step in range(1, 401):
        probes = len(made)
        if budget.affords_probe(steps=step, replayed=PROBE * probes, probes=probes):
            made.append(step)
    assert made == [1, 40, 80, 120, 160, 200, 240, 280, 320, 360, 400]


def test_an_incident_that_was_dear_leaves_less_for_the_next() -> None:
    budget = ReplayBudget(share=0.05)
    assert budget.left(steps=0, replayed=0) == INCIDENT
    assert budget.left(steps=1000, replayed=300) == INCIDENT - 250
    assert not budget.affords_probe(steps=1000, replayed=INCIDENT + 49, probes=0)
    assert budget.affords_look(steps=0, replayed=INCIDENT - RESERVE - 6, batches=8)
    assert not budget.affords_look(steps=0, replayed=INCIDENT - RESERVE - 5, batches=8)


def test_snapshots_far_apart_need_longer_trajectories() -> None:
    assert ReplayBudget.with_snapshots(0.05, 16).incident == INCIDENT
    assert most_steps(ReplayBudget.with_snapshots(0.05, 200).incident) >= 200


@given(st.floats(0, 1), st.integers(0, 10**6), st.integers(0, 10**5))
def test_what_a_trajectory_leaves_is_enough(share: float, steps: int, replayed: int) -> None:
    left = ReplayBudget(share=share).left(steps=steps, replayed=replayed)
    most = most_steps(left)
    assert most >= 0
    if most:
        assert TRAJECTORIES * most + RESERVE <= left + 1e-6


@pytest.mark.parametrize("share", [-0.01, 1.5])
def test_a_share_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match="replay_budget must be a share of the steps from 0 to 1"):
        ReplayBudget(share=share)
