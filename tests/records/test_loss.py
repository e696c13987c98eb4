"""The loss record: whole lines, whatever happened to the run."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lightning_fp.records import Loss, LossRow, LossWriter, read_loss, write_loss
from lightning_fp.records.loss import COLUMNS, FILE


def rows(*steps: int, loss: float = 1.0) -> list[LossRow]:
    return [LossRow(step=step, loss=loss) for step in steps]


def test_round_trip(tmp_path: Path) -> None:
    writer = LossWriter(tmp_path / "run")
    writer.append([LossRow(step=1, loss=0.1, grad_norm=2.5, seconds=0.25)])
    writer.append([LossRow(step=2, loss=math.nan), LossRow(step=3, loss=-math.inf)])
    loss = read_loss(tmp_path / "run")
    assert loss.steps.tolist() == [1, 2, 3]
    assert loss.values[0] == 0.1  # to the last bit
    assert math.isnan(loss.values[1])
    assert loss.values[2] == -math.inf
    lines = (tmp_path / "run" / FILE).read_text().splitlines()
    assert lines[:2] == [",".join(COLUMNS), "1,0.1,2.5,0.25"]


def test_what_follows_a_step_back_replaces_what_was(tmp_path: Path) -> None:
    writer = LossWriter(tmp_path)
    writer.append(rows(1, 2, 3, 4, 5))
    writer.append(rows(3, 4, loss=2.0))  # a rollback
    LossWriter(tmp_path).append(rows(4, loss=3.0))  # a resume
    loss = read_loss(tmp_path)
    assert loss.steps.tolist() == [1, 2, 3, 4]
    assert loss.values.tolist() == [1, 1, 2, 3]


@pytest.mark.parametrize("torn", ["3", "3,1.2", "3,1.25,,0.1"])
def test_a_torn_last_line(tmp_path: Path, torn: str) -> None:
    LossWriter(tmp_path).append(rows(1, 2))
    path = tmp_path / FILE
    path.write_text(path.read_text() + torn)
    assert read_loss(tmp_path).steps.tolist() == [1, 2]
    LossWriter(tmp_path).append(rows(3, loss=2.0))
    assert read_loss(tmp_path).values.tolist() == [1, 1, 2]


def test_a_torn_header(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("step,lo")
    LossWriter(tmp_path).append(rows(1))
    assert read_loss(tmp_path).steps.tolist() == [1]


def test_a_run_without_a_loss_leaves_the_place_to_others(tmp_path: Path) -> None:
    LossWriter(tmp_path).append([])
    (tmp_path / "metrics.csv").write_text("step,train_loss\n0,5.0\n")
    assert read_loss(tmp_path, column="train_loss").values.tolist() == [5.0]


def test_only_a_header(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(ValueError, match="must have finite values, got 0"):
        read_loss(tmp_path)


def test_a_loss_from_elsewhere(tmp_path: Path) -> None:
    write_loss(tmp_path, Loss.of([2, 1], [0.5, 1.5]))
    assert read_loss(tmp_path).values.tolist() == [1.5, 0.5]


def test_readable_after_kill(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from lightning_fp.records import LossRow, LossWriter
        writer = LossWriter(sys.argv[1])
        for step in range(1, 10**9):
            writer.append([LossRow(step=step, loss=1.0 / step)])
            if step == 100:
                print("go", flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    loss = read_loss(tmp_path)
    assert loss.steps.tolist() == list(range(1, len(loss.steps) + 1))
    assert len(loss.steps) >= 100
