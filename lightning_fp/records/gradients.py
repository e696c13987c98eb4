"""What FP16 did to a run's gradients: one line of JSON for each step that was looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_fp.records.jsonl import append_line, read_lines, step_of
from lightning_fp.records.newest_run import newest_run
from lightning_fp.records.resume import rows_in_force

FILE = "gradients.jsonl"
"""Name of the file inside of a run's directory."""


@dataclass(frozen=True, kw_only=True)
class GradientShares:
    """Of one layer's gradients, in the range of FP16 with the loss scale, as shares of elements."""

    zero: float
    """Zero: flushed, or nothing there to begin with."""

    subnormal: float
    """Not zero and below FP16's least normal number: bits are lost."""

    overflow: float
    """inf or NaN."""


@dataclass(frozen=True, kw_only=True)
class GradientRow:
    """One step's gradients."""

    step: int
    """Optimizer steps before this one."""

    scale: float
    """The loss scale."""

    layers: Mapping[str, GradientShares]
    """By layer; "" for parameters of the model itself."""


def append_gradients(run_dir: str | Path, row: GradientRow) -> None:
    """Add a row; it is in the file when this returns.

    Args:
        run_dir: the run's directory; made if it is not there.
        row: what was seen.
    """
    append_line(Path(run_dir) / FILE, asdict(row))


def read_gradients(run_dir: str | Path) -> list[GradientRow]:
    """All rows in force: of a step that was made again after a resume the last one.

    Args:
        run_dir: the directory that FP16Monitor wrote to.

    Returns:
        By step; empty if there is no file.
    """
    rows = [row for _, row in read_lines(newest_run(run_dir) / FILE, _row)]
    return rows_in_force(rows, lambda row: row.step)


def _row(values: dict[str, Any]) -> GradientRow:
    layers = {
        name: GradientShares(**{share: float(value) for share, value in shares.items()})
        for name, shares in values["layers"].items()
    }
    return GradientRow(step=step_of(values), scale=float(values["scale"]), layers=layers)
