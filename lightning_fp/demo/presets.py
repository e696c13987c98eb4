"""Small runs to study formats on, by name: `lightning-fp study sweep --preset tiny`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_fp.demo.data import ByteBatches, read_sources
from lightning_fp.demo.model import ByteGPT

CONTEXT = 64


class StudyGPT(ByteGPT):
    """The demo's GPT with a warm-up to choose.

    Args:
        warmup: steps until the learning rate is reached; 0 begins with it.
        options: of `ByteGPT`.
    """

    def __init__(self, *, warmup: int, **options: Any) -> None:
        super().__init__(**options)
        self.warmup = warmup

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.95))
        if not self.warmup:
            return optimizer
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rise, "interval": "step"}}


def tiny(
    lr: float = 1e-3,
    seed: int = 0,
    steps: int = 200,
    batch_size: int = 8,
    warmup: int = 20,
    width: int = 64,
    blocks: int = 2,
) -> tuple[StudyGPT, ByteBatches]:
    """A byte-level GPT of 64 features on real text, seconds on a CPU.

    Args:
        lr: learning rate.
        seed: of the batches.
        steps: of the run.
        batch_size: sequences of a batch.
        warmup: steps of warm-up.
        width: features.
        blocks: of the GPT.
    """
    text, _ = read_sources()
    model = StudyGPT(
        layers=blocks,
        width=width,
        heads=max(1, width // 32),
        context=CONTEXT,
        learning_rate=lr,
        warmup=warmup,
    )
    data = ByteBatches(text, batches=steps, batch_size=batch_size, context=CONTEXT, seed=seed)
    return model, data


PRESETS: Mapping[str, Any] = {"tiny": tiny}
"""Factories by name."""
