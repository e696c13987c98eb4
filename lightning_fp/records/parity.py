"""What ParityProbe left behind, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_fp.argument_types import checked
from lightning_fp.records.jsonl import append_line, plain, read_lines, step_of
from lightning_fp.records.newest_run import newest_run
from lightning_fp.records.resume import rows_in_force

FILE = "parity.jsonl"
"""Name of the file inside of a run's directory: one line per probe."""

SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "layer": pa.string(),
        "format": pa.string(),
        "cosine": pa.float64(),
        "norm_ratio": pa.float64(),
        "cast_error": pa.float64(),
        "removed_error": pa.float64(),
        "removed_loss_gap": pa.float64(),
        "loss": pa.float64(),
        "loss_gap": pa.float64(),
        "grad_cosine": pa.float64(),
        "grad_norm_ratio": pa.float64(),
        "grad_error": pa.float64(),
        "noise": pa.float64(),
        "seconds": pa.float64(),
    }
)
"""One row per probe and layer. From "loss" on the columns are those of the whole probe, the same in
each of its rows. docs/parity-probe.md says what they mean; null stands for what was not tried or
is not finite."""

_OF_LAYER = SCHEMA.names[SCHEMA.names.index("layer") : SCHEMA.names.index("loss")]


def append_parity(run_dir: str | Path, probe: Mapping[str, Any]) -> None:
    """Add a probe, null where a number is not finite; it is in the file when this returns.

    Args:
        run_dir: the run's directory; made if it is not there.
        probe: the columns from "loss" on, and "layers", a sequence of the others.
    """
    append_line(Path(run_dir) / FILE, plain(probe))


@checked
def read_parity(run_dir: str | Path) -> pa.Table:
    """The probes of a run, also of one that still runs or was killed.

    Args:
        run_dir: the run's directory, with its `parity.jsonl`.

    Returns:
        A table with the columns of `SCHEMA`, by step; empty if there was no probe. Where a resumed
        run has repeated a step, the later probe counts.
    """
    probes = [probe for _, probe in read_lines(newest_run(run_dir) / FILE, _probe)]
    tables = [table for _, table in rows_in_force(probes, lambda probe: probe[0])]
    return pa.concat_tables([SCHEMA.empty_table(), *tables]).combine_chunks()


def _probe(values: dict[str, Any]) -> tuple[int, pa.Table]:
    """Its step, and a row for each layer."""
    step = step_of(values)
    rows = [
        {name: (layer if name in _OF_LAYER else values).get(name) for name in SCHEMA.names}
        for layer in values["layers"]
    ]
    return step, pa.Table.from_pylist(rows, schema=SCHEMA)
