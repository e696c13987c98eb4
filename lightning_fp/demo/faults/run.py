"""The run that faults are tried on: a tiny GPT on real text, a matter of seconds on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fp.demo.data import ByteBatches, read_sources
from lightning_fp.demo.faults.innocent import Batch, DataFault
from lightning_fp.demo.model import ByteGPT
from lightning_fp.plugins import FP8Precision

STEPS = 360
CONTEXT = 64
BATCH_SIZE = 8
LAST_STEPS = 30
"""Steps that the loss at the end is averaged over."""
HELD_OUT_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class FaultRun:
    """A run that has ended."""

    losses: list[float]
    """Training loss of every step that was counted, in order."""

    held_out_loss: float
    """At the end, in high precision, on text that is the same for all runs."""

    model: TinyByteGPT = field(repr=False)
    trainer: L.Trainer = field(repr=False)

    @property
    def final_loss(self) -> float:
        """Mean training loss over the last steps."""
        last = self.losses[-LAST_STEPS:]
        return sum(last) / len(last)


class TinyByteGPT(ByteGPT):
    """A GPT of a few blocks without biases, trained on weighted sequences."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__(layers=blocks, width=64, heads=2, context=CONTEXT, learning_rate=1e-3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.register_parameter("bias", None)

    def _loss(self, batch: Batch) -> Tensor:
        inputs, targets, weights = batch
        logits = self(inputs).float().transpose(1, 2)
        return (F.cross_entropy(logits, targets, reduction="none").mean(dim=1) * weights).mean()


class TinyBatches(ByteBatches):
    """Inputs, targets and weights, spoiled by a fault in the data if there is one."""

    def __init__(
        self, text: Tensor, *, batches: int, seed: int, fault: DataFault | None = None
    ) -> None:
        super().__init__(text, batches=batches, batch_size=BATCH_SIZE, context=CONTEXT, seed=seed)
        self.fault = fault

    def _batch(self, number: int) -> Batch:
        rows = super()._batch(number)
        batch = rows[:, :-1], rows[:, 1:], torch.ones(len(rows))
        return batch if self.fault is None else self.fault(batch, number)


class _Losses(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.losses.append(float(outputs["loss"]))


def fault_plugin(scaling: str = "fp8-delayed", base: str = "32-true") -> FP8Precision:
    """FP8 in all layers, also where their size does not pay.

    Args:
        scaling: the format.
        base: as `FP8Precision`; on most CPUs "32-true" is the fastest.
    """
    return FP8Precision(scaling, base=base, layers={"*": scaling})  # pyright: ignore[reportArgumentType]


def fault_run(
    fault: L.Callback | DataFault | None,
    plugin: FP8Precision | None,
    callbacks: Sequence[L.Callback] = (),
    *,
    seed: int = 0,
    steps: int = STEPS,
    blocks: int = 2,
    validation_batches: int = 0,
    **options: Any,
) -> FaultRun:
    """Train the tiny GPT with a fault.

    Args:
        fault: what goes wrong; None for a run in which nothing does.
        plugin: e.g. `fault_plugin()`; None trains in high precision.
        callbacks: further ones, after the fault's.
        seed: of weights and batches.
        steps: optimizer steps.
        blocks: of the GPT.
        validation_batches: of held-out text, whenever the Trainer validates.
        options: of the Trainer; `ckpt_path` resumes.
    """
    text, held_out = read_sources()
    data = fault if isinstance(fault, DataFault) else None
    losses = _Losses()
    first = [fault] if isinstance(fault, L.Callback) else []
    ckpt_path = options.pop("ckpt_path", None)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "precision": "32-true" if plugin is None else None,
        "plugins": plugin,
        "gradient_clip_val": 1.0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    L.seed_everything(seed, verbose=False)
    model = TinyByteGPT(blocks)
    trainer = L.Trainer(**{**defaults, **options}, callbacks=[*first, *callbacks, losses])
    batches = TinyBatches(text, batches=steps, seed=seed, fault=data)
    validation = TinyBatches(held_out, batches=validation_batches, seed=0)
    trainer.fit(model, batches, validation if validation_batches else None, ckpt_path=ckpt_path)
    return FaultRun(
        losses=losses.losses,
        held_out_loss=_held_out_loss(model, held_out),
        model=model,
        trainer=trainer,
    )


@torch.no_grad()
def _held_out_loss(model: TinyByteGPT, text: Tensor) -> float:
    model.eval()
    batches = TinyBatches(text, batches=HELD_OUT_BATCHES, seed=0)
    losses = [model._loss(batches._batch(number)) for number in range(1, HELD_OUT_BATCHES + 1)]
    model.train()
    return float(torch.stack(losses).mean())
