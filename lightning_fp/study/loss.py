"""A run's loss over its steps, from wherever the run has left it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from torch import Tensor

FILE = "loss.parquet"
"""Name of the loss record in a run's directory: columns "step" and "loss"."""

LIGHTNING_FILE = "metrics.csv"
"""What Lightning's CSVLogger writes there."""


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


def write_loss(run_dir: str | Path, loss: Loss) -> None:
    """Leave the loss in a run's directory, where `read_loss` looks first."""
    columns = {"step": loss.steps.numpy(), "loss": loss.values.numpy()}
    pq.write_table(pa.table(columns), Path(run_dir) / FILE)


def read_loss(
    run_dir: str | Path, *, file: str | Path | None = None, column: str = "train_loss"
) -> Loss:
    """The loss of a run.

    Args:
        run_dir: the run's directory; its `loss.parquet` is read, or else its `metrics.csv`.
        file: another file to read: Parquet or CSV with exactly two columns, step and loss, where
            step is the number of optimizer steps done; or a CSVLogger's, which counts from 0.
        column: name of the loss in a CSVLogger's file.

    Raises:
        ValueError: if there is no such file or column.
    """
    places = [Path(run_dir) / FILE, Path(run_dir) / LIGHTNING_FILE]
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
        table = pq.read_table(path) if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    names = table.column_names
    if len(names) == 2:
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
        steps, values = (_numbers(table[name]) for name in (step, column))
        return Loss.of(steps.long() + first, values)
    except (pa.ArrowInvalid, ValueError) as error:
        raise ValueError(f"{column!r} of {str(path)!r}: {error}") from error


def _numbers(column: pa.ChunkedArray) -> Tensor:
    """float64; null becomes NaN."""
    return torch.tensor(column.cast(pa.float64()).to_numpy())
