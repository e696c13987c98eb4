"""A run's loss over its steps: a line per step that outlives a crash, and who reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.records.newest_run import newest_run
from lightning_fp.records.step_rows import (
    StepRows,
    numbers,
    read_csv,
    read_step_rows,
    table_in_force,
)

FILE = "loss.csv"
"""Name of the loss record in a run's directory."""

COLUMNS = ("step", "loss", "grad_norm", "seconds")
"""Its columns: the number of optimizer steps done, 1 after the first; mean loss of the step over
micro-batches and ranks; norm of its gradient, empty where nobody told it; seconds it took."""

LIGHTNING_FILE = "metrics.csv"
"""What Lightning's CSVLogger writes there."""

TRAIN_LOSS = "train_loss"
"""Its column with the loss, if the module logs it under the usual name."""


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss curve."""

    steps: Tensor
    """int64 [points], ascending: the number of optimizer steps done, 1 after the first."""

    values: Tensor
    """float64 [points]; NaN and inf stay, they are what a run that fails has."""

    @classmethod
    def of(cls, steps: Sequence[int] | Tensor, values: Sequence[float] | Tensor) -> Loss:
        """A curve from points in any order; those of one step are averaged.

        >>> Loss.of([2, 1, 1], [3.0, 1.0, 2.0]).values.tolist()
        [1.5, 3.0]

        Args:
            steps: number of optimizer steps done at each point.
            values: the loss there.

        Raises:
            ValueError: if there are no points, their numbers differ, or none is finite.
        """
        at = torch.as_tensor(steps, dtype=torch.int64).flatten()
        loss = torch.as_tensor(values, dtype=torch.float64).flatten()
        if len(at) != len(loss):
            raise ValueError(f"loss must have one value per step, got {len(loss)} for {len(at)}")
        if not torch.isfinite(loss).any():
            raise ValueError(f"loss must have finite values, got {len(loss)} that are not")
        unique, place, count = torch.unique(at, return_inverse=True, return_counts=True)
        mean = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, place, loss) / count
        return cls(unique, mean)


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """One step."""

    step: int
    """Optimizer steps done, 1 after the first."""

    loss: float

    grad_norm: float | None = None
    seconds: float | None = None


class LossWriter:
    """Appends rows to `<run_dir>/loss.csv`, as `StepRows` does.

    Args:
        run_dir: the run's directory; made if it is not there.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._rows = StepRows(Path(run_dir) / FILE, COLUMNS)

    def append(self, rows: Iterable[LossRow]) -> None:
        """Add rows; they are in the file when this returns. Without a row there is no file."""
        self._rows.append((row.step, row.loss, row.grad_norm, row.seconds) for row in rows)


def write_loss(run_dir: str | Path, loss: Loss) -> None:
    """Leave a loss in a run's directory, where `read_loss` looks first."""
    steps, values = loss.steps.tolist(), loss.values.tolist()
    rows = [LossRow(step=step, loss=value) for step, value in zip(steps, values, strict=True)]
    LossWriter(run_dir).append(rows)


@checked
def read_loss(
    run_dir: str | Path, *, file: str | Path | None = None, column: str = TRAIN_LOSS
) -> Loss:
    """The loss of a run.

    Args:
        run_dir: the run's directory; its `loss.csv`, which ClampMonitor and LossRecorder write, is
            read, or else its `metrics.csv`.
        file: another file to read: Parquet or CSV with exactly two columns, step and loss, where
            step is the number of optimizer steps done; or a CSVLogger's, which counts from 0.
        column: name of the loss in a CSVLogger's file; another than this one is looked for there
            alone.

    Raises:
        ValueError: if there is no such file or column.
    """
    files = (FILE, LIGHTNING_FILE) if column == TRAIN_LOSS else (LIGHTNING_FILE,)
    places = [newest_run(run_dir) / name for name in files]
    path = (
        next((place for place in places if place.is_file()), None) if file is None else Path(file)
    )
    if path is None:
        raise ValueError(
            f"no loss in {str(run_dir)!r}: it has neither {FILE} nor {LIGHTNING_FILE}; give the"
            " file, e.g. a CSVLogger's of a Trainer(log_every_n_steps=1)"
        )
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else read_csv(path)
        names = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} cannot be read: {reason}") from error
    if tuple(names) == COLUMNS:
        step, column, first = "step", "loss", 0
    elif len(names) == 2:
        step, column = names
        first = 0
    elif "step" in names and column in names:
        step, first = "step", 1
        table = table.filter(table[column].is_valid())  # other metrics have rows of their own
    else:
        raise ValueError(
            f"{str(path)!r} has no column {column!r} beside 'step'; it has {', '.join(names)}"
        )
    try:
        table = table_in_force(table) if tuple(names) == COLUMNS else table
        steps, values = (numbers(table[name]) for name in (step, column))
        return Loss.of(steps.long() + first, values)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{column!r} of {str(path)!r}: {error}") from error


@checked
def read_steps(run_dir: str | Path) -> pa.Table:
    """Loss, gradient norm and time of a run's steps.

    Args:
        run_dir: the directory that ClampMonitor or LossRecorder wrote to.

    Returns:
        A table with the columns of `COLUMNS`; empty if nothing was recorded.

    Raises:
        ValueError: if the file is not one of these.
    """
    return read_step_rows(newest_run(run_dir) / FILE, COLUMNS)
