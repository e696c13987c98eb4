"""One optimizer step of a sharded model, as its tests take it."""

from __future__ import annotations

from typing import Any

import torch

from lightning_fp import PrecisionMap


def one_step(
    model: Any,
    table: PrecisionMap,
    optimizer: Any,
    *,
    shape: tuple[int, int],
    micro_batches: int = 2,
) -> float:
    """One step, through which weights stay gathered where forward has left them so."""
    table.before_batch()
    total = 0.0
    for index in range(micro_batches):
        last = index == micro_batches - 1
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        torch.manual_seed(index)
        x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
        loss = model(x).float().square().mean()
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    table.step()
    return total
