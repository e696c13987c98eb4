"""How far training was from the rollout engine, step by step: `mismatch.csv`, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from lightning_fp.argument_types import checked
from lightning_fp.metrics.mismatch_values import COUNTS, VALUES
from lightning_fp.records.newest_run import newest_run
from lightning_fp.records.step_rows import StepRows, read_step_rows

FILE = "mismatch.csv"
"""Name of the file inside of a run's directory."""

COLUMNS = ("step", *VALUES, *COUNTS)
"""Its columns: the number of optimizer steps done, 1 after the first, and what
`TrainingInferenceMismatch` found in that step over micro-batches and ranks, before the step's
update; docs/training-inference-mismatch.md defines every name."""


CAUSES_FILE = "mismatch_causes.csv"
"""Name of the file with what the mismatch came from, where that is told apart."""

CAUSES = ("precision", "sampling", "routing", "staleness")
"""The causes, whose shares of the sum of k3 are columns."""

CAUSE_COLUMNS = (
    "step",
    *CAUSES,
    "stale_tokens",
    "staleness_mean",
    "staleness_max",
    "k3_rest",
    "rerouted_tokens_max",
)
"""Its columns: the step as in `mismatch.csv`, and the numbers of `lightning_fp.rl.Causes`."""


class MismatchWriter:
    """Appends rows to `<run_dir>/mismatch.csv` and `mismatch_causes.csv`, as `StepRows` does.

    Args:
        run_dir: the run's directory; made if it is not there.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._rows = StepRows(Path(run_dir) / FILE, COLUMNS)
        self._causes = StepRows(Path(run_dir) / CAUSES_FILE, CAUSE_COLUMNS)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row; it is in the file when this returns.

        Args:
            step: optimizer steps done, 1 after the first.
            values: of `TrainingInferenceMismatch.compute()`; those that are no column are left
                out.
        """
        self._rows.append([(step, *(values.get(name) for name in COLUMNS[1:]))])

    def append_causes(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row of what the mismatch came from.

        Args:
            step: optimizer steps done.
            values: by the names in `CAUSE_COLUMNS`; others are left out.
        """
        self._causes.append([(step, *(values.get(name) for name in CAUSE_COLUMNS[1:]))])


@checked
def read_mismatch_causes(run_dir: str | Path) -> pa.Table:
    """What the mismatch of a run's steps came from.

    Args:
        run_dir: the directory that MismatchMonitor or a loop wrote to.

    Returns:
        A table with the columns of `CAUSE_COLUMNS`, null where nothing was known; empty if nothing
        was ever told apart.

    Raises:
        ValueError: if the file is not one of these.
    """
    return read_step_rows(newest_run(run_dir) / CAUSES_FILE, CAUSE_COLUMNS)


@checked
def read_mismatch(run_dir: str | Path) -> pa.Table:
    """The training-inference mismatch of a run's steps.

    Args:
        run_dir: the directory that MismatchMonitor wrote to.

    Returns:
        A table with the columns of `COLUMNS`, null where a value was not a number; empty if there
        was no monitor. Where a resumed run has repeated a step, the later row counts.

    Raises:
        ValueError: if the file is not one of these.
    """
    return read_step_rows(newest_run(run_dir) / FILE, COLUMNS)
