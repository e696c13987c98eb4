"""The demo's second part: faults that only FP8 suffers from, without and with the fallback."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_fp.callbacks import PrecisionFallback
from lightning_fp.demo.faults import (
    ActivationOutliers,
    BackwardCorruption,
    FaultRun,
    fault_plugin,
    fault_run,
)
from lightning_fp.demo.run import quiet_lightning
from lightning_fp.records.events import Event, read_events

STEPS = 300
OUTLIERS = "*attention*"
"""The layers whose inputs have outliers, which grow from `OUTLIERS_START` on."""
OUTLIERS_START = 150
LOST = "blocks.1.mlp.down"
"""The layer that most of the gradient is lost in, from `LOST_START` on, as a kernel at fault might
do it: no statistics of the casts can show that."""
LOST_START = 160


@dataclass(frozen=True, kw_only=True)
class IncidentResult:
    """What the faults did, and what the fallback did about them."""

    high: FaultRun
    unprotected: FaultRun
    rescued: FaultRun

    events: list[Event]
    """What the fallback noticed and did."""

    steps: str
    """What became of the rescued run's steps."""

    def gap(self, run: FaultRun) -> float:
        """How much higher a run's final loss is, as a share of that in high precision."""
        return run.final_loss / self.high.final_loss - 1

    def to_dict(self) -> dict[str, object]:
        """As plain data."""
        return {
            "faults": {
                "activation outliers": {"layers": OUTLIERS, "from step": OUTLIERS_START},
                "lost gradients": {"layers": LOST, "from step": LOST_START},
            },
            "final_loss": {
                "high precision": self.high.final_loss,
                "fp8": self.unprotected.final_loss,
                "fp8 with fallback": self.rescued.final_loss,
            },
            "gap": self.gap(self.unprotected),
            "gap_with_fallback": self.gap(self.rescued),
            "steps": self.steps,
        }


def run_incident(output: Path, console: Console, *, seed: int = 0) -> IncidentResult:
    """Train three times with the same faults: in high precision, in FP8, in FP8 with the fallback.

    Args:
        output: where `events.jsonl` goes.
        console: where the fallback's lines go, as they come.
        seed: of weights and batches.
    """
    console.print(
        f"\nTwo faults that high precision does not notice: from step {OUTLIERS_START} on inputs of"
        " the attention layers\ngrow outliers, which delayed scaling clamps; from step"
        f" {LOST_START} on most of the gradient is lost in\n{LOST} while it is in FP8."
    )
    (output / "events.jsonl").unlink(missing_ok=True)
    fallback = PrecisionFallback(dirpath=output)
    with quiet_lightning(), _lines(console):
        runs = [
            fault_run(
                ActivationOutliers(OUTLIERS, bits=24, start=OUTLIERS_START),
                plugin,
                [BackwardCorruption(LOST, kind="zero", strength=2.0, start=LOST_START), *callbacks],
                seed=seed,
                steps=STEPS,
            )
            for plugin, callbacks in (
                (None, []),
                (fault_plugin("fp8-delayed"), []),
                (fault_plugin("fp8-delayed"), [fallback]),
            )
        ]
    high, unprotected, rescued = runs
    return IncidentResult(
        high=high,
        unprotected=unprotected,
        rescued=rescued,
        events=read_events(output),
        steps=fallback.steps.sentence(),
    )


def incident_table(result: IncidentResult) -> Table:
    """The three runs side by side."""
    title = "The same faults, three times"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("", "high precision", "fp8-delayed", "with fallback"):
        table.add_column(column, justify="left" if not column else "right")
    runs = (result.high, result.unprotected, result.rescued)
    table.add_row("training loss at the end", *(f"{run.final_loss:.4f}" for run in runs))
    table.add_row("gap to high precision", "", *(f"{result.gap(run):+.2%}" for run in runs[1:]))
    return table


@contextmanager
def _lines(console: Console) -> Generator[None, None, None]:
    """The fallback's log lines on the console."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(f"  {record.getMessage()}", highlight=False, soft_wrap=True)

    logger, handler = logging.getLogger("lightning_fp.fallback"), Lines()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
