"""What a factory gives to be trained: a LightningModule, its data, options of the Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What a factory gave."""

    module: L.LightningModule

    data: Mapping[str, Any]
    """For `Trainer.fit`; empty if the module has its own."""

    options: Mapping[str, Any]
    """For the Trainer."""

    @property
    def callbacks(self) -> list[Any]:
        """Those among the options."""
        callbacks: Any = self.options.get("callbacks") or []
        return list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]

    @property
    def loader(self) -> Any:
        """The training data, as an iterable of batches; None where only a Trainer can tell."""
        if "train_dataloaders" in self.data:
            return self.data["train_dataloaders"]
        return None if self.data else self.module.train_dataloader()


def quiet() -> dict[str, Any]:
    """Options of a Trainer for one run among many: one device, no evaluation, nothing shown."""
    return {
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }


def read_job(reference: str, built: Any, ours: Sequence[str]) -> TrainingJob:
    """Check what a factory has returned.

    Args:
        reference: the factory, for messages.
        built: what it returned.
        ours: options of the Trainer that the command sets itself.

    Raises:
        ValueError: naming the factory and what is missing in what it returned.
    """
    module, data, options, *rest = (
        *(built if isinstance(built, tuple) else (built,)),
        *(None, None, None),
    )
    if any(each is not None for each in rest) or not isinstance(module, L.LightningModule):
        got = ", ".join(type(each).__name__ for each in built) if isinstance(built, tuple) else ""
        raise ValueError(
            f"{reference} must return a LightningModule, or one and its data, or both and Trainer"
            f" options, got {got or type(built).__name__}"
        )
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise ValueError(f"{reference}: Trainer options must be a mapping, got {options!r}")
    if taken := [name for name in ours if name in options]:
        raise ValueError(
            f"{reference}: the Trainer options must leave out {', '.join(taken)};"
            " the command sets them"
        )
    if not is_overridden("training_step", module):
        raise ValueError(f"{reference}: {type(module).__name__} must have a training_step")
    if data is None and not is_overridden("train_dataloader", module):
        raise ValueError(
            f"{reference}: there is no training data: return (module, dataloader), or define"
            f" {type(module).__name__}.train_dataloader"
        )
    kind = "datamodule" if isinstance(data, L.LightningDataModule) else "train_dataloaders"
    return TrainingJob(module=module, data={} if data is None else {kind: data}, options=options)
