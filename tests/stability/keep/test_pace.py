"""Snapshots of large models: what they take, and how often they are taken."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_fp.stability.keep.host_memory import Layout
from lightning_fp.stability.keep.optimizer_state import state_to_come
from lightning_fp.stability.keep.pace import SnapshotPace, snapshot_interval
from lightning_fp.stability.keep.snapshots import Snapshots

seconds = st.floats(1e-4, 100.0)


@given(st.integers(1, 500), seconds, seconds)
def test_copies_keep_to_their_share(every: int, copy: float, step: float) -> None:
    interval = snapshot_interval(every, copy_seconds=copy, step_seconds=step)
    assert interval >= every
    assert copy <= 0.01 * step * interval * (1 + 1e-9)
    assert interval == every or copy > 0.01 * step * (interval - 1) * (1 - 1e-9)


@pytest.mark.parametrize(("copy", "step"), [(1.0, 0.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_what_cannot_be_measured_changes_nothing(copy: float, step: float) -> None:
    assert snapshot_interval(16, copy_seconds=copy, step_seconds=step) == 16


class Run:
    """Steps of a time, with snapshots whose copies take another, as a clock sees them."""

    def __init__(self, copy: float | None, step: float, *, mean: float | None = None) -> None:
        self.now, self.copy, self.step, self.agreed = 0.0, copy, step, 0
        self.snapshots = Snapshots(every_n_steps=16)
        self.mean = mean
        self.pace = SnapshotPace(self.snapshots, self.over_ranks, clock=lambda: self.now)

    def over_ranks(self, value: float) -> float:
        self.agreed += 1
        return value if self.mean is None or value != self.copy else self.mean

    def make(self, steps: int) -> list[int]:
        """The steps at which one is taken, where the interval has changed."""
        changed, last = [], None
        for step in range(steps):
            if last is None or step >= last + self.snapshots.every_n_steps:
                copied = None if last is None else self.copy
                if self.pace.taken(step, copied):
                    changed.append(step)
                last = step
            self.now += self.step
        return changed


def test_the_interval_follows_what_is_measured_and_is_agreed_upon_seldom() -> None:
    run = Run(copy=1.0, step=2.0)
    assert run.make(2000) == [16]
    assert run.snapshots.every_n_steps == 50
    assert run.agreed <= 2 * 6  # 40 snapshots
    assert Run(copy=0.1, step=2.0).make(2000) == []


def test_ranks_keep_the_mean_of_what_they_measure() -> None:
    run = Run(copy=1.0, step=2.0, mean=2.0)
    run.make(2000)
    assert run.snapshots.every_n_steps == 100


def test_on_the_host_no_clock_decides() -> None:
    run = Run(copy=None, step=0.0)
    assert run.make(2000) == []
    assert run.agreed == 0


class Layer(nn.Module):
    """The linears of one block of Llama-8B, of each an eighth of the rows."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
        shapes += [(14336, 4096), (14336, 4096), (4096, 14336)]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(rows // ranks, columns)) for rows, columns in shapes
        )
        self.norms = nn.ParameterList(nn.Parameter(torch.empty(4096 // ranks)) for _ in range(2))


def test_llama_8b_on_eight_gpus_takes_12_gb_for_each_rank() -> None:
    """Float32 weights and two moments, as FSDP2 shards them; nothing is allocated."""
    with torch.device("meta"):
        model = nn.ModuleList(Layer(8) for _ in range(32))
        model.append(nn.Embedding(128256 // 8, 4096))
        model.append(nn.Linear(4096, 128256 // 8, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    stated = Layout.of(model.parameters()).nbytes + state_to_come(optimizer)
    assert stated == pytest.approx(12 * 8.03e9 / 8, rel=0.001)
    assert 12.0e9 < stated < 12.1e9
