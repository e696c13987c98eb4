"""What StabilityMonitor left behind: a row per step, as Parquet parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from lightning_fp.argument_types import checked
from lightning_fp.records.newest_run import newest_run
from lightning_fp.records.tables import TableWriter, read_parts

DIRECTORY = "stability"
"""Name of the directory inside of a run's."""

SIGNALS = (
    "logit_sharpness",
    "output_logit_max",
    "attention_logit_max",
    "activation_kurtosis",
    "update_rms",
    "gradient_noise",
)
"""What is measured; docs/stability-signals.md says what each is."""

SCHEMA = pa.schema(
    {
        "step": pa.int64(),  # optimizer steps done when it was over
        "loss": pa.float32(),
        "grad_norm": pa.float32(),
        "lr": pa.float64(),
        **dict.fromkeys(SIGNALS, pa.float32()),
    }
)
"""The columns; null where there was nothing to measure."""


class StabilityWriter(TableWriter):
    """Appends rows to `<run_dir>/stability/`; see `TableWriter`."""

    def __init__(self, run_dir: Path, *, step: int = 0) -> None:
        super().__init__(run_dir, DIRECTORY, SCHEMA, step=step)


@checked
def read_stability(run_dir: str | Path, *, columns: Sequence[str] | None = None) -> pa.Table:
    """The signals of a run, also of one that is still being written or was killed.

    Args:
        run_dir: the directory that the run wrote to.
        columns: which columns to read; all by default.

    Returns:
        One row per step, in the order of the steps.

    Raises:
        FileNotFoundError: if the run has written none.
    """
    directory = newest_run(run_dir) / DIRECTORY
    if not directory.is_dir():
        raise FileNotFoundError(
            f"no stability signals in {str(run_dir)!r}: run_dir must be a directory that"
            " StabilityMonitor wrote to (its dirpath, by default the run's directory)"
        )
    return read_parts(directory, SCHEMA, columns=columns).sort_by("step")
