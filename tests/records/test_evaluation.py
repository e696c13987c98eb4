"""The record of evaluations in two precisions."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_fp.records.evaluation import (
    COLUMNS,
    EvaluationRow,
    EvaluationWriter,
    read_evaluation,
)


@pytest.mark.parametrize(
    ("loss", "high", "gap"),
    [(2.1, 2.0, 0.05), (1.9, 2.0, -0.05), (-1.9, -2.0, 0.05), (0.25, 0.0, 0.25), (2.0, 2.0, 0.0)],
)
def test_the_gap_says_what_the_training_formats_cost(loss: float, high: float, gap: float) -> None:
    assert EvaluationRow(step=1, loss=loss, loss_high=high).gap == pytest.approx(gap)


def test_round_trip(tmp_path: Path) -> None:
    assert read_evaluation(tmp_path).column_names == list(COLUMNS)
    writer = EvaluationWriter(tmp_path / "run")
    for step, loss in ((10, 0.1 + 0.2), (20, 3.0), (20, 2.0)):  # a resumed run repeats a step
        writer.append(EvaluationRow(step=step, loss=loss, loss_high=1.5))
    assert read_evaluation(tmp_path / "run").to_pylist() == [
        {"step": 10, "loss": 0.1 + 0.2, "loss_high": 1.5, "gap": (0.1 + 0.2 - 1.5) / 1.5},
        {"step": 20, "loss": 2.0, "loss_high": 1.5, "gap": 0.5 / 1.5},
    ]
