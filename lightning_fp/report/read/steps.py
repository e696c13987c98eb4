"""The steps of a run, as `loss.csv` has them: loss, gradient norm, seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_fp.records.loss import FILE, read_loss
from lightning_fp.records.resume import in_force
from lightning_fp.records.step_rows import numbers, read_csv


@dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """Every step that counts, in order."""

    steps: Tensor
    """int64 [steps], ascending: optimizer steps done, 1 after the first."""

    losses: Tensor
    """float64 [steps]; may be inf or NaN."""

    grad_norms: Tensor
    """float64 [steps]; NaN where nobody told it."""

    seconds: Tensor
    """float64 [steps]: what each took; NaN where it is not known."""

    repeated: int = 0
    """Steps that a later line replaces: the run resumed from a checkpoint before them."""

    repeated_seconds: float = 0.0
    """What these had taken."""

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> int:
        """The last step."""
        return int(self.steps[-1])

    def up_to(self, step: int) -> Steps:
        """Those up to a step, that one included."""
        kept = self.steps <= step
        return Steps(
            steps=self.steps[kept],
            losses=self.losses[kept],
            grad_norms=self.grad_norms[kept],
            seconds=self.seconds[kept],
        )

    def seconds_per_step(self) -> float | None:
        """Median; None if no step's time is known."""
        known = self.seconds[self.seconds.isfinite()]
        return known.median().item() if len(known) else None

    def final_steps(self, over: int = 30) -> int:
        """How many steps `final_loss` is the mean of."""
        return max(1, min(over, len(self) // 10))

    def final_loss(self, over: int = 30) -> float | None:
        """Mean of the last finite losses; None if there is none.

        Args:
            over: how many; fewer of a short run, a tenth of it.
        """
        last = self.losses[-self.final_steps(over) :]
        finite = last[last.isfinite()]
        return finite.mean().item() if len(finite) else None


def read_steps(run_dir: Path) -> Steps | None:
    """The steps of a run; None if it has recorded none.

    Args:
        run_dir: the run's directory, with a `loss.csv`, or else a CSVLogger's `metrics.csv`.

    Raises:
        ValueError: if what is there cannot be read.
    """
    if not (run_dir / FILE).is_file():
        try:
            loss = read_loss(run_dir)
        except ValueError:
            return None
        unknown = torch.full_like(loss.values, math.nan)
        return Steps(
            steps=loss.steps, losses=loss.values, grad_norms=unknown, seconds=unknown.clone()
        )
    columns = read_columns(run_dir / FILE)
    if not columns:
        return None
    if not {"step", "loss"} <= columns.keys():
        raise ValueError(f"{FILE} has no columns step and loss; it has {', '.join(columns)}")
    steps = columns["step"]
    if not len(steps):
        return None
    unknown = torch.full_like(steps, math.nan)
    seconds = columns.get("seconds", unknown)
    counts = in_force(steps)
    gone = seconds[~counts]
    return Steps(
        steps=steps[counts].long(),
        losses=columns["loss"][counts],
        grad_norms=columns.get("grad_norm", unknown)[counts],
        seconds=seconds[counts],
        repeated=len(gone),
        repeated_seconds=float(gone.nansum()),
    )


def read_columns(path: Path) -> Mapping[str, Tensor]:
    """A CSV of numbers with a column "step", whatever the others, also one being written.

    Args:
        path: the file.

    Returns:
        float64 by column, every whole line; NaN where a field is empty.

    Raises:
        ValueError: if there is something else than numbers in it.
    """
    if b"\n" not in path.read_bytes():
        return {}
    table = read_csv(path)
    return {name: numbers(table[name]) for name in table.column_names}
