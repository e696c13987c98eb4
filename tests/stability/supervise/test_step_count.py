"""Steps are batches that stepped; how far a probe's suspicion goes back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_fp.callbacks.compare.loop_position import steps_done
from lightning_fp.stability import BatchRing, RandomState, Snapshots
from lightning_fp.stability.answers import trajectory_start
from lightning_fp.stability.judge.evidence import MOST_PROBED
from lightning_fp.stability.supervise.step_count import StepCount


@pytest.mark.parametrize(("automatic", "done"), [(True, 80), (False, 40)])
def test_steps_of_a_trainer_are_batches_that_stepped(automatic: bool, done: int) -> None:
    loop = SimpleNamespace(_batches_that_stepped=40)
    trainer: Any = SimpleNamespace(
        global_step=80,
        fit_loop=SimpleNamespace(epoch_loop=loop),
        lightning_module=SimpleNamespace(automatic_optimization=automatic),
    )
    assert steps_done(trainer) == done


def test_with_one_optimizer_it_is_global_step() -> None:
    count = StepCount(40, 40)
    for step in range(41, 50):
        count.ended(step)
    assert count.done == 49
    assert all(count.global_step(step) == step for step in (0, 3, 40, 45, 49))
    assert all(count.step(step) == step for step in (0, 3, 40, 45, 49))


def test_with_two_it_counts_batches_and_knows_global_step() -> None:
    count = StepCount(40, 80)
    for index in range(5):
        count.ended(82 + 2 * index)
    assert count.done == 45
    assert [count.global_step(step) for step in (40, 41, 45)] == [80, 82, 90]
    assert [count.step(at) for at in (80, 82, 90)] == [40, 41, 45]
    resumed = StepCount()
    resumed.load_state_dict(count.state_dict())
    resumed.ended(92)
    assert [resumed.global_step(step) for step in (41, 45, 46)] == [82, 90, 92]


@pytest.mark.parametrize(("risen", "first"), [(True, 0), (False, 400 - MOST_PROBED)])
def test_a_probes_suspicion_does_not_replay_the_whole_run(risen: bool, first: int) -> None:
    snapshots, ring = Snapshots(every_n_steps=16, depth=4), BatchRing()
    part = {"model": torch.nn.Linear(1, 1)}
    for step in range(400):
        if snapshots.due(step):
            snapshots.take(step, part)
        ring.begin(step)
        ring.add(torch.ones(1), step, RandomState.capture())
        ring.end()
    start = trajectory_start(
        snapshots.kept[::-1],
        lambda step: bool(ring.since(step)),
        onset=20,
        at=400,
        most=None if risen else MOST_PROBED,
    )
    assert start is not None
    assert start.step >= first
    steps = ring.since(start.step)
    assert steps is not None
    assert len(steps) == 400 - start.step >= 8
    assert risen is (start.step <= 20)
