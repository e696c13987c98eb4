"""Where a run's records go: one directory, new for every run.

A run is what begins at step 0 without a checkpoint; what goes on from one, or in the same Trainer,
goes on in its directory. Two runs never share one, or the second would be told as a resume of the
first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_fp.records.run_directory import version_of

ROOT = "runs"
"""Below the Trainer's `default_root_dir`, where there is no logger."""


def run_directories(
    trainer: L.Trainer,
    named: Sequence[tuple[str, str | Path | None]],
    kept: Mapping[str, str],
    *,
    begins: bool,
) -> list[Path]:
    """The directory of each callback; to be called on all ranks, alike.

    Args:
        trainer: the Trainer, at the start of training.
        named: each callback's key, and what it names as its `dirpath`. Those that name none share
            the first that is named, so that the records of a run lie together, or else the run's.
        kept: by key, where the checkpoint says that a callback wrote to.
        begins: whether the run begins here, and does not go on from an earlier one.
    """
    found: list[Path] = []
    if trainer.global_rank == 0:  # whose answer is broadcast
        given = next((Path(path) for _, path in named if path is not None), None)
        by_base: dict[Path, Path] = {}
        for key, path in named:
            base = Path(path) if path is not None else given or _of_the_trainer(trainer)
            if base not in by_base:
                before = Path(kept[key]) if key in kept else None
                ours = given is None and not trainer.loggers
                by_base[base] = version_of(base, before, begins=begins, numbered=ours)
            found.append(by_base[base])
    return trainer.strategy.broadcast(found)


def _of_the_trainer(trainer: L.Trainer) -> Path:
    """The first logger's directory for this run, as checkpoints have it; without one, ours."""
    name = type(trainer.lightning_module).__name__
    if not trainer.loggers:
        return Path(trainer.default_root_dir) / ROOT / name
    logger = trainer.loggers[0]
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return Path(logger.log_dir)
    version: Any = logger.version
    folder = version if isinstance(version, str) else f"version_{version or 0}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name or name) / folder
