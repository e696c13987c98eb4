"""Record a short run in BF16: what rollout gates and reports compare an FP8 run with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_fp.callbacks import LossRecorder
from lightning_fp.cli.loading import factory_error, find_factory
from lightning_fp.cli.output import console, print_json
from lightning_fp.demo.run import quiet_lightning
from lightning_fp.records import Baseline, RunInfo, read_baseline, read_run
from lightning_fp.study.training_job import TrainingJob, read_job
from lightning_fp.terminal import FittedTable

_OURS = ("precision", "plugins", "max_steps", "max_epochs", "max_time", "fast_dev_run")
"""Options of the Trainer that the command sets itself, or that would leave nothing to record."""


# `json` is the name of the option.
def run(factory: str, steps: int, output: str, precision: str, seed: int, *, json: bool) -> int:
    """Train, record, and print the figures; see `commands.baseline`.

    Raises:
        ValueError: for what the user can put right.
    """
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    screen = console()
    L.seed_everything(seed, verbose=False)
    job = build_job(factory)
    directory = Path(output)
    for old in ("loss.csv", "run.jsonl"):
        (directory / old).unlink(missing_ok=True)
    with quiet_lightning():
        progress = screen.is_terminal and not json
        trainer = _trainer(job, steps, directory, precision, progress=progress)
        try:
            trainer.fit(job.module, **job.data)
        except MisconfigurationException as error:
            raise ValueError(f"{factory}: {' '.join(str(error).split())}") from error
    try:
        baseline = read_baseline(output)
    except ValueError as error:
        raise ValueError(
            f"{factory}: {trainer.global_step} steps left no loss behind: its loader must give"
            " batches, and its training_step must return a finite loss"
        ) from error
    if json:
        print_json({**asdict(baseline), "precision": precision})
        return 0
    screen.print(baseline_table(baseline, precision, read_run(output)))
    screen.print(f"Written to {output}: loss.csv, run.jsonl", markup=False, soft_wrap=True)
    return 0


# -- what is trained ------------------------------------------------------------------------------


def build_job(reference: str) -> TrainingJob:
    """Call a factory that returns what to train.

    Raises:
        ValueError: if there is no such factory, it fails, or something is missing in what it
            returns.
    """
    factory = find_factory(reference)
    try:
        built = factory()
    except Exception as error:
        raise factory_error(reference, error) from error
    return read_job(reference, built, _OURS)


def _trainer(
    job: TrainingJob, steps: int, output: Path, precision: Any, *, progress: bool
) -> L.Trainer:
    given = dict(job.options)
    given.pop("callbacks", None)
    defaults: dict[str, Any] = {
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": progress,
        "limit_val_batches": 0,
        "default_root_dir": output,
    }
    try:
        return L.Trainer(
            **{**defaults, **given},
            precision=precision,
            max_steps=steps,
            max_epochs=-1,
            callbacks=[*job.callbacks, LossRecorder(output)],
        )
    except TypeError as error:  # an option that it does not have
        raise ValueError(f"the Trainer options are refused: {error}") from error


# -- what it came to ------------------------------------------------------------------------------


def baseline_table(baseline: Baseline, precision: str, starts: list[RunInfo]) -> FittedTable:
    """The figures of a run in high precision.

    Args:
        baseline: what was recorded.
        precision: what it ran in.
        starts: what the run was, if it is known.
    """
    last = (
        f"loss, mean of the last {baseline.last_steps}" if baseline.last_steps > 1 else "last loss"
    )
    rows = {
        f"loss, mean of {baseline.steps} steps": f"{baseline.mean_loss:.4f}",
        last: f"{baseline.last_loss:.4f}",
        "gradient norm, median": _text(baseline.grad_norm, "{:.3g}"),
        "time of a step, median": _text(baseline.step_seconds, "{:.4g} s"),
    }
    if baseline.nonfinite_steps:
        rows["steps with inf or NaN"] = str(baseline.nonfinite_steps)
    if starts:
        run = starts[-1]
        rows["parameters"] = f"{run.parameters:,}"
        rows["device"] = run.device
    grid = FittedTable(f"Baseline in {precision}", "", "value", right=("value",))
    for name, value in rows.items():
        grid.add_row(name, value)
    return grid


def _text(value: float | None, form: str) -> str:
    return "not recorded" if value is None else form.format(value)
