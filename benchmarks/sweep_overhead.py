"""What a sweep adds to a run: the same Trainer, plugin, model and batches with and without it.

    python benchmarks/sweep_overhead.py

Processor time of whole runs of the tiny preset, in turn within one process; of a cell all that the
sweep does for it: building and looking at the model, judging every step, records, the table.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L  # noqa: E402

from benchmarks.proof.journal import quiet  # noqa: E402
from lightning_fp.demo.presets import tiny  # noqa: E402
from lightning_fp.plugins.names import precision_plugin  # noqa: E402
from lightning_fp.study.sweep.factory import CellFactory  # noqa: E402
from lightning_fp.study.sweep.grid import grid  # noqa: E402
from lightning_fp.study.sweep.sweep import Nobody, Sweep  # noqa: E402

STEPS, ROUNDS = 200, 7


def alone(format: str, lr: float, seed: int) -> float:
    """A run without a sweep."""
    begin = time.process_time()
    L.seed_everything(seed, verbose=False)
    model, data = tiny(lr, seed, STEPS)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        plugins=precision_plugin(format),
        max_steps=STEPS,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return time.process_time() - begin


class Cells(Nobody):
    """Runs the same without the sweep before each cell, and takes the time of both."""

    def __init__(self) -> None:
        self.without: list[float] = []
        self.within: list[float] = []
        self._begin = 0.0

    def began(self, cell: Any) -> None:
        if self._begin:
            self.within.append(time.process_time() - self._begin)
        self.without.append(alone(cell.format, cell.lr, cell.seed))
        self._begin = time.process_time()

    def finish(self) -> None:
        self.within.append(time.process_time() - self._begin)


def main() -> None:
    quiet()
    told: dict[str, Any] = {}
    for format in ("bf16", "fp8-dynamic"):
        cells = Cells()
        with tempfile.TemporaryDirectory() as place:
            sweep = Sweep(
                factory=CellFactory("preset tiny", tiny),
                cells=grid([format], [1e-3], range(ROUNDS), {}),
                steps=STEPS,
                directory=Path(place),
            )
            sweep.run(cells)
            cells.finish()
        ratios = [b / a for a, b in zip(cells.without, cells.within, strict=True)]
        told[format] = {"ratio": median(ratios[1:]), "ratios": ratios, "run": median(cells.without)}
        print(format, told[format], flush=True)
    report = {
        "command": "python benchmarks/sweep_overhead.py",
        "date": date.today().isoformat(),
        "steps": STEPS,
        **told,
    }
    path = ROOT / "benchmarks" / "results" / "sweep_overhead.json"
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
