"""TrainingInferenceMismatch on two real ranks with gloo: test_training_inference_mismatch.py."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_fp.metrics import TrainingInferenceMismatch
from tests.two_ranks import one_of_two_ranks


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
    with one_of_two_ranks(directory) as rank:
        metric = TrainingInferenceMismatch()
        for batch in batches()[rank::2]:
            metric.update(*batch)
        torch.save(metric.compute(), directory / f"rank{rank}.pt")
