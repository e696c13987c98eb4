"""A user's factory called for a cell, and what is asked of it before a sweep begins.

Cells are compared with each other, so a factory must build the same thing anew for the same seed,
whatever ran before. It is called twice, and what it gives must be equal and share nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_fp.choices import did_you_mean
from lightning_fp.study.sweep.grid import Cell
from lightning_fp.study.sweep.own_axes import OWN_AXES
from lightning_fp.study.training_job import TrainingJob, read_job

_TOLD = ("steps", "directory")
"""Parameters that a factory may have to be told what it cannot know."""

_OURS = ("precision", "plugins", "max_steps", "max_epochs", "max_time", "fast_dev_run")
"""Options of the Trainer that the sweep sets itself."""

_SAMPLED = 4096
"""Elements of a Parameter that are looked at to compare it."""


@dataclass(frozen=True)
class CellFactory:
    """Builds what a cell trains."""

    reference: str
    """Its name, for messages."""

    make: Callable[..., Any]

    def job(self, cell: Cell, steps: int, directory: Path) -> TrainingJob:
        """Model, data and options of a cell, under its seed.

        Args:
            cell: which.
            steps: of its run.
            directory: of its records.

        Raises:
            ValueError: if the factory fails or returns something else.
        """
        parameters = inspect.signature(self.make).parameters
        own = {name: value for name, value in cell.axes.items() if name not in OWN_AXES}
        given = {"lr": cell.lr, "seed": cell.seed, "steps": steps, "directory": directory}
        takes = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        told = {name: value for name, value in given.items() if name in parameters or takes}
        L.seed_everything(cell.seed, verbose=False)
        try:
            built = self.make(**told, **own)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"{self.reference} raised {type(error).__name__}: {error}"
                f" ({place.filename}, line {place.lineno})"
            ) from error
        return read_job(self.reference, built, _OURS)

    def check_axes(self, axes: Sequence[str]) -> None:
        """Refuse axes that nobody knows.

        Raises:
            ValueError: if the factory takes no learning rate, or no such axis.
        """
        parameters = inspect.signature(self.make).parameters
        if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            return
        if "lr" not in parameters:
            raise ValueError(
                f"{self.reference} must take lr, the learning rate, as a parameter; it takes"
                f" {', '.join(parameters) or 'nothing'}"
            )
        known = [*OWN_AXES, *(n for n in parameters if n not in ("lr", "seed", *_TOLD))]
        for name in axes:
            if name not in known:
                raise ValueError(
                    f"--axis {name}: neither the sweep nor {self.reference} has it; there are"
                    f" {', '.join(known)}{did_you_mean(name, known)}"
                )

    def check_state(self, cells: Sequence[Cell], steps: int, directory: Path) -> None:
        """Refuse a factory that keeps something from one call to the next.

        Args:
            cells: of the sweep; each setting is built once, the first one twice.
            steps: of a run.
            directory: of the sweep.

        Raises:
            ValueError: naming what is shared or differs.
        """
        first = cells[0]
        one, other = (self.job(first, steps, directory) for _ in range(2))
        shared = {p.data_ptr() for p in one.module.parameters() if p.numel()}
        for name, parameter in other.module.named_parameters():
            if parameter.numel() and parameter.data_ptr() in shared:
                raise ValueError(
                    f"{self.reference} gives the same {name} in two calls: runs would train on"
                    " each other's weights; build the model inside of the factory"
                )
        if weights(one.module) != weights(other.module):
            raise ValueError(
                f"{self.reference} gives other weights in a second call with seed {first.seed}: it"
                " keeps state between calls, such as a generator of its own; make it inside of the"
                " factory"
            )
        batches = [_first_batch(job.loader, first.seed) for job in (one, other)]
        if batches[0] != batches[1]:
            raise ValueError(
                f"{self.reference} gives another first batch in a second call with seed"
                f" {first.seed}: its data keeps a position between calls; make the loader inside"
                " of the factory"
            )
        settings = {cell.setting: cell for cell in reversed(cells)}
        for setting, cell in settings.items():
            if setting != first.setting:
                self.job(cell, steps, directory)


def check_weights(reference: str, cell: Cell, before: str, now: str) -> None:
    """Refuse a run whose weights at the start are others than in a cell like it before.

    Args:
        reference: the factory, for messages.
        cell: which.
        before: of the cell before, see `weights`.
        now: of this one.

    Raises:
        ValueError: if they differ.
    """
    if before != now:
        raise ValueError(
            f"{reference} gives other weights for seed {cell.seed} than in a cell before: training"
            " leaves something behind, such as a model that is kept in a global; build everything"
            " inside of the factory"
        )


def weights_key(cell: Cell) -> str:
    """Cells of one key begin with the same weights: format and learning rate do not matter."""
    own = {name: value for name, value in cell.axes.items() if name not in OWN_AXES}
    return f"{cell.seed} {own}"


def weights(model: nn.Module) -> str:
    """A hash of a model's Parameters, of large ones of some elements."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            digest.update(_bytes(parameter.detach()))
    return digest.hexdigest()[:16]


def _first_batch(loader: Any, seed: int) -> str:
    """A hash of the tensors in a loader's first batch; "" where there is none to look at."""
    if loader is None or not hasattr(loader, "__iter__"):
        return ""
    L.seed_everything(seed, verbose=False)
    iterator: Iterator[Any] = iter(loader)
    batch: Any = next(iterator, None)
    digest = hashlib.sha256()
    for leaf in tree_leaves(batch):
        digest.update(_bytes(leaf) if isinstance(leaf, Tensor) else repr(type(leaf)).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.flatten()
    sampled = flat[:: max(1, len(flat) // _SAMPLED)].cpu().contiguous()
    return bytes(sampled.view(torch.uint8).tolist()) if len(sampled) else b""
