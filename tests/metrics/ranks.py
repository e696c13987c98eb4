"""TrainingInferenceMismatch on two real ranks with gloo: test_training_inference_mismatch.py."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fp.metrics import TrainingInferenceMismatch


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of different length; rank r takes every second one, from the r-th on."""
    generator = torch.Generator().manual_seed(0)

    def batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        rollout = -torch.rand(4, tokens, generator=generator) * 3
        train = rollout + 0.3 * torch.randn(4, tokens, generator=generator)
        mask = torch.rand(4, tokens, generator=generator) < 0.7
        return rollout, train.clamp(max=0), mask

    return [batch(tokens) for tokens in (7, 30, 1)]


def main(directory: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    metric = TrainingInferenceMismatch()
    for batch in batches()[rank::2]:
        metric.update(*batch)
    torch.save(metric.compute(), directory / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
