"""What EvaluationGap left behind: validation losses in training formats and high precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lightning_fp.argument_types import checked
from lightning_fp.records.newest_run import newest_run
from lightning_fp.records.step_rows import StepRows, read_step_rows

FILE = "eval_gap.csv"
"""Name of the file inside of a run's directory: one line per evaluation."""

COLUMNS = ("step", "loss", "loss_high", "gap")
"""Its columns: optimizer steps done; the loss in the formats that the layers train in; the loss in
high precision; the gap between them as a share of the second."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """The same validation batches, evaluated twice."""

    step: int
    """Optimizer steps done."""

    loss: float
    """Mean over batches and ranks, in the formats that the layers train in."""

    loss_high: float
    """The same in high precision."""

    @property
    def gap(self) -> float:
        """What the training formats cost: (loss - loss_high) / |loss_high|.

        Negative where the model is worse in high precision than in the formats it was trained in.
        """
        difference = self.loss - self.loss_high
        return difference / abs(self.loss_high) if self.loss_high else difference


class EvaluationWriter:
    """Appends rows to `<run_dir>/eval_gap.csv`.

    Args:
        run_dir: the run's directory; made if it is not there.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._rows = StepRows(Path(run_dir) / FILE, COLUMNS)

    def append(self, row: EvaluationRow) -> None:
        """Add a row; it is in the file when this returns."""
        self._rows.append([(row.step, row.loss, row.loss_high, row.gap)])


@checked
def read_evaluation(run_dir: str | Path) -> pa.Table:
    """The evaluations of a run, also of one that still runs or was killed.

    Args:
        run_dir: the directory that EvaluationGap wrote to.

    Returns:
        A table with the columns of `COLUMNS`, by step; empty if there was no evaluation.

    Raises:
        ValueError: if the file is not one of these.
    """
    return read_step_rows(newest_run(run_dir) / FILE, COLUMNS)
