"""The figures of a recorded run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lightning_fp.records import LossRow, LossWriter, read_loss
from lightning_fp.records.baseline import read_baseline


def test_figures(tmp_path: Path) -> None:
    losses = [math.nan, *(float(loss) for loss in range(25, 0, -1))]
    LossWriter(tmp_path).append(
        LossRow(step=step, loss=loss, grad_norm=2.0 * step, seconds=9.0 if step == 1 else 0.5)
        for step, loss in enumerate(losses, start=1)
    )
    found = read_baseline(tmp_path)
    assert (found.steps, found.nonfinite_steps, found.last_steps) == (26, 1, 3)
    assert found.mean_loss == 13.0
    assert found.last_loss == 2.0
    assert found.step_seconds == 0.5
    assert found.grad_norm == 27.0
    assert len(read_loss(tmp_path).steps) == 26  # the gate of a rollout reads this


def test_what_was_not_recorded_is_not_known(tmp_path: Path) -> None:
    LossWriter(tmp_path).append([LossRow(step=1, loss=2.0)])
    found = read_baseline(tmp_path)
    assert (found.last_loss, found.step_seconds, found.grad_norm) == (2.0, None, None)


def test_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have a loss\.csv, got none; record a baseline"):
        read_baseline(tmp_path)
    LossWriter(tmp_path).append([LossRow(step=1, loss=math.inf)])
    with pytest.raises(ValueError, match="must have a finite loss"):
        read_baseline(tmp_path)
