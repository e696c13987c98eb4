"""What FP16 did to a run's gradients: one line of JSON for each step that was looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

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
    path = Path(run_dir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read_gradients(run_dir: str | Path) -> list[GradientRow]:
    """All rows in force: of a step that was made again after a resume the last one.

    Args:
        run_dir: the directory that FP16Monitor wrote to.

    Returns:
        By step; empty if there is no file.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        return []
    rows: list[GradientRow] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:  # torn by a crash
            continue
        layers = {name: GradientShares(**shares) for name, shares in values["layers"].items()}
        row = GradientRow(step=values["step"], scale=values["scale"], layers=layers)
        rows = [*(before for before in rows if before.step < row.step), row]
    return rows
