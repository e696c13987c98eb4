"""Signals of the optimizer's step: how far weights move, and how much of the gradient is noise.

Both look at some evenly spaced elements of each Parameter, through hooks that torch's optimizers
call before and after their step, so it is the same in every loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fp.telemetry.stability.step_values import StepValues

ELEMENTS = 4096
"""Elements of a Parameter that are looked at."""

MEMORY = 0.9
"""Decay of the running mean of the gradient's direction: it remembers about ten steps."""


class UpdateSignals:
    """Watches the steps of optimizers.

    Args:
        optimizers: whose.
        values: where signals go.
        active: whether a step is one of the run's own, and not of a replay.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], values: StepValues, active: Callable[[], bool]
    ) -> None:
        self._values, self._active = values, active
        self._moving = [_Moving() for _ in optimizers]
        self._hooks: list[Any] = []
        for optimizer, moving in zip(optimizers, self._moving, strict=True):
            self._hooks.append(
                optimizer.register_step_pre_hook(lambda o, *_, m=moving: self._before(o, m))
            )
            self._hooks.append(
                optimizer.register_step_post_hook(lambda o, *_, m=moving: self._after(o, m))
            )

    def close(self) -> None:
        """Leave the optimizers as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def forget(self) -> None:
        """The run went back: gradients of before are not those before the next."""
        for moving in self._moving:
            moving.mean = None

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, moving: _Moving) -> None:
        moving.weights = None
        if self._active():
            moving.parameters = _trained(optimizer)
            moving.weights = _some(moving.parameters)

    # After the step, since in a closure gradients are made within it.
    @torch.no_grad()
    def _after(self, optimizer: Optimizer, moving: _Moving) -> None:
        before, moving.weights = moving.weights, None
        if before is None:
            return
        rates = [float(group["lr"]) for group in optimizer.param_groups if group["params"]]
        change = (_some(moving.parameters) - before).square().mean().sqrt()
        rate = max(rates, default=0.0)
        self._values.add("update_rms", change / rate if rate > 0 else change * torch.nan)
        gradients = [p.grad for p in moving.parameters if p.grad is not None]
        if len(gradients) == len(moving.parameters):
            self._values.add("gradient_noise", moving.noise(_some(gradients)))


class _Moving:
    """What is remembered of one optimizer's steps."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.weights: Tensor | None = None
        self.mean: Tensor | None = None
        """Running mean of the gradient's direction."""

    def noise(self, gradient: Tensor) -> Tensor:
        """1 - |mean direction|^2: 0 where the gradient does not turn, 1 where it is all noise."""
        gradient = torch.where(torch.isfinite(gradient), gradient, 0.0)
        gradient = gradient / gradient.norm().clamp(min=torch.finfo(torch.float32).tiny)
        if self.mean is None or self.mean.shape != gradient.shape:
            self.mean = gradient
            return torch.full((), torch.nan, device=gradient.device)
        self.mean.mul_(MEMORY).add_(gradient, alpha=1 - MEMORY)
        return 1 - self.mean.square().sum()


def _trained(optimizer: Optimizer) -> list[Tensor]:
    return [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and parameter.numel()
    ]


def _some(tensors: Sequence[Tensor]) -> Tensor:
    """Evenly spaced elements of all; float32, a copy on one device."""
    parts: list[Tensor] = []
    for tensor in tensors:
        local = getattr(tensor, "to_local", None)  # of a sharded one, this rank's part
        flat = (tensor if local is None else local()).detach().reshape(-1)
        parts.append(flat[:: max(1, -(-flat.numel() // ELEMENTS))].float())
    if not parts:
        return torch.zeros(1)
    return torch.cat([part.to(parts[0].device) for part in parts])
