"""What the demo found out: as a table, as JSON and as CSV."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lightning_fp.demo.clamping import Worst
from lightning_fp.layers import ConversionReport
from lightning_fp.records.jsonl import json_text
from lightning_fp.terminal import FittedTable

LAST_STEPS = 10
"""Steps that the training loss at the end is averaged over."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One training run."""

    losses: dict[int, float]
    """Training loss by step."""

    validation_loss: float
    seconds_per_step: float

    report: ConversionReport | None
    """What ran in FP8; None for BF16."""

    formats: dict[str, str]
    """Every layer's format at the end."""

    weights: dict[str, Tensor] = field(repr=False)
    optimizer: dict[str, Any] = field(repr=False)

    @property
    def training_loss(self) -> float:
        """Mean over the last steps."""
        return mean(list(self.losses.values())[-LAST_STEPS:])


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """All runs, and what they show."""

    device: str
    scaling: str
    other_scaling: str
    flipped: str
    flips: dict[int, str]
    checkpoint: str
    checkpoint_step: int
    bf16: RunResult
    fp8: RunResult
    other: RunResult
    resumed: RunResult
    resume_is_exact: bool
    clamping: tuple[Worst, ...]
    """The worst operands of the FP8 runs."""

    def gap(self, run: RunResult) -> float:
        """How much higher a run's validation loss is, as a share of the BF16 run's."""
        return run.validation_loss / self.bf16.validation_loss - 1

    @property
    def kernels(self) -> dict[str, int]:
        """Converted layers by kernel."""
        report = self.fp8.report
        return dict(Counter(layer.kernel for layer in report.converted)) if report else {}

    @property
    def is_emulated(self) -> bool:
        """Whether no FP8 hardware took part."""
        return any("emulated" in kernel or kernel == "simulated" for kernel in self.kernels)

    def to_dict(self) -> dict[str, Any]:
        """Everything but weights and losses, as plain data."""
        runs = {"bf16": self.bf16, "fp8": self.fp8, "other": self.other, "resumed": self.resumed}
        return {
            "device": self.device,
            "scaling": self.scaling,
            "other_scaling": self.other_scaling,
            "steps": max(self.fp8.losses),
            "runs": {
                name: {
                    "training_loss": run.training_loss,
                    "validation_loss": run.validation_loss,
                    "seconds_per_step": run.seconds_per_step,
                }
                for name, run in runs.items()
            },
            "gap": self.gap(self.fp8),
            "other_gap": self.gap(self.other),
            "clamping": [asdict(run) for run in self.clamping],
            "flipped_layer": {"name": self.flipped, "formats_by_step": self.flips},
            "checkpoint": {"path": self.checkpoint, "step": self.checkpoint_step},
            "resume_is_exact": self.resume_is_exact,
            "conversion": self.fp8.report.to_dict() if self.fp8.report else None,
        }


def same(a: RunResult, b: RunResult) -> bool:
    """Whether two runs ended alike, bit for bit.

    Compared are weights, optimizer state, formats, and the losses of the steps that both made.
    """
    common = a.losses.keys() & b.losses.keys()
    return (
        _equal(a.weights, b.weights)
        and _equal(a.optimizer, b.optimizer)
        and a.formats == b.formats
        and a.validation_loss == b.validation_loss
        and all(a.losses[step] == b.losses[step] for step in common)
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def write(result: DemoResult, directory: Path) -> None:
    """Write `losses.csv` and `summary.json`."""
    with (directory / "losses.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "bf16", "fp8", "fp8_other", "fp8_resumed"])
        for step, loss in result.bf16.losses.items():
            resumed = result.resumed.losses.get(step, "")
            rows.writerow([step, loss, result.fp8.losses[step], result.other.losses[step], resumed])
    (directory / "summary.json").write_text(json_text(result.to_dict()) + "\n")


def summary_table(result: DemoResult) -> FittedTable:
    """The runs side by side."""
    fp8 = result.fp8
    title = "BF16 and FP8 from the same seed"
    columns = ("BF16", result.scaling, result.other_scaling, "resumed")
    grid = FittedTable(title, "", *columns, right=columns)
    runs = (result.bf16, fp8, result.other, result.resumed)
    grid.add_row(
        f"training loss, last {LAST_STEPS} steps", *(f"{run.training_loss:.4f}" for run in runs)
    )
    grid.add_row("validation loss", *(f"{run.validation_loss:.4f}" for run in runs))
    grid.add_row("gap to BF16", "", *(f"{result.gap(run):+.2%}" for run in runs[1:3]), "")
    share = fp8.report.flops_share if fp8.report else 0.0
    grid.add_row("model FLOPs in FP8", "0.0%", *3 * (f"{share:.1%}",))
    converted = len(fp8.report.converted) if fp8.report else 0
    grid.add_row("linear layers in FP8", "0", *3 * (f"{converted}",))
    grid.add_row("kernel", "nn.Linear", *3 * (", ".join(result.kernels),))
    grid.add_row("time per step", *(f"{run.seconds_per_step * 1000:.0f} ms" for run in runs))
    return grid


def findings(result: DemoResult) -> list[str]:
    """What the table does not say, a line each."""
    flips = ", ".join(f"{format} after step {step}" for step, format in result.flips.items())
    exact = "bit for bit as" if result.resume_is_exact else "DIFFERENTLY from"
    lines = [
        f"Flipped at run time: {result.flipped} to {flips}.",
        f"Resumed after step {result.checkpoint_step}: ended {exact} the uninterrupted run"
        " (weights, optimizer state, formats, losses).",
    ]
    if result.is_emulated:
        lines.append("FP8 was emulated: the numbers are those of FP8 hardware, the times are not.")
    return lines
