"""The demo's second part: FP8 rolled out by a recipe, two faults, the rescue, and the report."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from rich.console import Console

from lightning_fp import recipes
from lightning_fp.callbacks import (
    ClampMonitor,
    EvaluationGap,
    LossRecorder,
    ParityProbe,
    PrecisionFallback,
    StagedRollout,
)
from lightning_fp.demo.faults import (
    ActivationOutliers,
    BackwardCorruption,
    FaultRun,
    fault_plugin,
    fault_run,
)
from lightning_fp.demo.run import quiet_lightning
from lightning_fp.plugins import FP8Precision
from lightning_fp.records.events import Event, read_events
from lightning_fp.report import write_report
from lightning_fp.terminal import FittedTable

STEPS = 480
BLOCKS = 4
RECIPE = "balanced"
WARMUP = 0.2
"""Share of the run in high precision at the beginning."""
WINDOW = 32
"""Steps that the recipe's gates look back, and the least length of its middle stage."""

OUTLIERS = "*attention*"
"""The layers whose inputs have outliers, which grow from `OUTLIERS_START` on."""
OUTLIERS_START = 220
LOST = "blocks.1.mlp.down"
"""The layer that most of the gradient is lost in, from `LOST_START` on, as a kernel at fault might
do it: no statistics of the casts can show that."""
LOST_START = 240

VALIDATION_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class RolloutResult:
    """What the faults did, and what was done about them."""

    high: FaultRun
    unprotected: FaultRun
    rescued: FaultRun

    run_dir: Path
    """The records of the rescued run."""

    baseline: Path
    """The records of the run in high precision."""

    report: Path
    """The report of the one, compared with the other."""

    events: list[Event]
    """What was noticed and done in it."""

    steps: str
    """What became of its steps."""

    def gap(self, run: FaultRun) -> float:
        """How much higher a run's final loss is, as a share of that in high precision."""
        return run.final_loss / self.high.final_loss - 1

    def to_dict(self) -> dict[str, object]:
        """As plain data."""
        return {
            "recipe": RECIPE,
            "faults": {
                "activation outliers": {"layers": OUTLIERS, "from step": OUTLIERS_START},
                "lost gradient": {"layers": LOST, "from step": LOST_START},
            },
            "final_loss": {
                "high precision": self.high.final_loss,
                "fp8": self.unprotected.final_loss,
                "fp8 rolled out with fallback": self.rescued.final_loss,
            },
            "gap": self.gap(self.unprotected),
            "gap_with_fallback": self.gap(self.rescued),
            "steps": self.steps,
        }


def run_rollout(output: Path, console: Console, *, seed: int = 0) -> RolloutResult:
    """Train three times with the same faults, and write the report of the run that is protected.

    Args:
        output: where the records and the report go; what is there of an earlier demo is removed.
        console: where the lines of rollout and fallback go, as they come.
        seed: of weights and batches.
    """
    console.print(
        f"\nThe safe way in: the recipe {RECIPE!r} takes a run from high precision to delayed FP8"
        " in stages. Two faults are planted, which do nothing in high precision. From step"
        f" {OUTLIERS_START} on, outliers grow in the inputs of the attention layers, and delayed"
        f" scaling clamps them. From step {LOST_START} on, most of the gradient of {LOST} is lost"
        " while that layer is in FP8."
    )
    baseline, run_dir = output / "baseline", output / "rollout"
    for directory in (baseline, run_dir):
        shutil.rmtree(directory, ignore_errors=True)
    fallback = PrecisionFallback()
    monitor = ClampMonitor(  # its warnings are in the report
        dirpath=run_dir,
        every_n_steps=8,
        log_every_n_steps=8,
        what_if=True,
        warn_clamped_mass=None,
        warn_underflow=None,
    )
    protection = [
        monitor,
        ParityProbe(every_n_steps=48, worst=2),
        EvaluationGap(),
        fallback,
        StagedRollout(recipes.get(RECIPE, warmup=WARMUP, window=WINDOW), baseline=baseline),
    ]
    with quiet_lightning(), _lines(console):
        high = _run(None, [LossRecorder(baseline)], seed)
        unprotected = _run(fault_plugin("fp8-delayed"), [], seed)
        rescued = _run(fault_plugin("fp8-delayed"), protection, seed)
    return RolloutResult(
        high=high,
        unprotected=unprotected,
        rescued=rescued,
        run_dir=run_dir,
        baseline=baseline,
        report=write_report([run_dir], output / "report.html", baseline=baseline),
        events=read_events(run_dir),
        steps=fallback.steps.sentence(),
    )


def _run(plugin: FP8Precision | None, callbacks: Sequence[L.Callback], seed: int) -> FaultRun:
    """One run with both faults."""
    return fault_run(
        ActivationOutliers(OUTLIERS, bits=24, start=OUTLIERS_START),
        plugin,
        [BackwardCorruption(LOST, kind="zero", strength=2.0, start=LOST_START), *callbacks],
        seed=seed,
        steps=STEPS,
        blocks=BLOCKS,
        validation_batches=VALIDATION_BATCHES if callbacks else 0,
        val_check_interval=STEPS // 8,
    )


def rollout_table(result: RolloutResult) -> FittedTable:
    """The three runs side by side."""
    title = "The same faults, three times"
    columns = ("high precision", "fp8-delayed", f"{RECIPE}, with fallback")
    grid = FittedTable(title, "", *columns, right=columns)
    runs = (result.high, result.unprotected, result.rescued)
    grid.add_row("training loss at the end", *(f"{run.final_loss:.4f}" for run in runs))
    grid.add_row("gap to high precision", "", *(f"{result.gap(run):+.2%}" for run in runs[1:]))
    return grid


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
