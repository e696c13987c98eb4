"""The record of the mismatch has every metric, and outlives crashes and resumes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lightning_fp.metrics import TrainingInferenceMismatch
from lightning_fp.records.mismatch_rows import COLUMNS, FILE, MismatchWriter, read_mismatch


def test_a_column_for_every_metric(tmp_path: Path) -> None:
    metric = TrainingInferenceMismatch()
    rollout = -torch.rand(4, 8) - 0.1
    metric.update(rollout, rollout - 1e-3 * torch.rand(4, 8))
    values = {name: value.item() for name, value in metric.compute().items()}
    assert set(COLUMNS) == {"step", *values}
    MismatchWriter(tmp_path / "run").append(1, values)
    (row,) = read_mismatch(tmp_path / "run").to_pylist()
    assert row == {"step": 1, **values}  # to the last bit


def test_what_follows_a_step_back_replaces_what_was(tmp_path: Path) -> None:
    writer = MismatchWriter(tmp_path)
    for step in (1, 2, 3, 4):
        writer.append(step, {"k3_kl": float(step), "js_divergence": math.nan})
    path = tmp_path / FILE
    path.write_text(path.read_text() + "5,0.1,0.")  # a crash tears the last line
    MismatchWriter(tmp_path).append(3, {"k3_kl": 30.0, "gen_kl_error": 1.0})
    table = read_mismatch(tmp_path)
    assert table["step"].to_pylist() == [1, 2, 3]
    assert table["k3_kl"].to_pylist() == [1.0, 2.0, 30.0]
    assert table["tokens"].null_count == 3
    assert table["js_divergence"].to_pylist()[2] is None


def test_none_and_another_file(tmp_path: Path) -> None:
    assert read_mismatch(tmp_path).num_rows == 0
    assert tuple(read_mismatch(tmp_path).column_names) == COLUMNS
    (tmp_path / FILE).write_text("step,loss\n1,2.0\n")
    with pytest.raises(ValueError, match=r"must have the columns step, kl, .*got step, loss"):
        read_mismatch(tmp_path)
