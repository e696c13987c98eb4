"""Faults that corrupt what a layer returns, forward or backward, while its format is FP8.

They know nothing of scales: what helps against them is another format, whatever the statistics
of the casts say.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_fp.demo.faults.base import Fault
from lightning_fp.numerics import float_format
from lightning_fp.numerics.casting import round_to_format

Kind = Literal["noise", "clamp", "zero", "round"]


class Corruption(Fault):
    """What the two have in common.

    Args:
        layers: as `Fault`.
        kind: "noise" adds normal noise; "clamp" clamps; "zero" flushes small values; "round"
            rounds to few mantissa bits.
        strength: of noise its norm, of "clamp" and "zero" the threshold: relative to the root
            mean square of the tensor. Of "round" the mantissa bits.
        ramp: steps until noise or "zero" have their strength; 1 begins with it.
        formats: how the names of the formats begin that it acts in.
        start: as `Fault`.
        seed: as `Fault`.

    Raises:
        ValueError: for an unknown kind.
    """

    def __init__(
        self,
        layers: str,
        *,
        kind: Kind,
        strength: float,
        ramp: int = 1,
        formats: str = "fp8",
        start: int = 150,
        seed: int = 0,
    ) -> None:
        super().__init__(layers, start=start, seed=seed)
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        self.kind: Kind = kind
        self.strength, self.ramp, self.formats = strength, ramp, formats

    def corrupted(self, x: Tensor, name: str) -> Tensor:
        """`x`, corrupted; in its dtype."""
        size = x.float().square().mean().sqrt()
        grown = self.strength * min(1.0, self.age / self.ramp)
        if self.kind == "noise":
            noise = torch.randn(x.shape, generator=self.generator(name)).to(x.device)
            return (x + grown * size * noise).to(x.dtype)
        if self.kind == "clamp":
            limit = float(self.strength * size)
            return x.clamp(-limit, limit)
        if self.kind == "zero":
            return torch.where(x.abs() < grown * size, 0.0, x)
        return round_to_format(x, float_format(f"e8m{int(self.strength)}")).to(x.dtype)


class ForwardCorruption(Corruption):
    """Corrupts the output; its gradient passes as if nothing were. See `Corruption`."""

    def attach(self, name: str, layer: nn.Linear) -> None:
        def change(output: Tensor) -> Tensor:
            if not self.format(name).startswith(self.formats):
                return output
            return output + (self.corrupted(output.detach(), name) - output.detach())

        self.after(layer, change)


class BackwardCorruption(Corruption):
    """Corrupts the gradient of the output before the layer sees it. See `Corruption`."""

    def attach(self, name: str, layer: nn.Linear) -> None:
        def change(output: Tensor) -> Tensor:
            if not (output.requires_grad and self.format(name).startswith(self.formats)):
                return output
            output = output.view_as(output)
            output.register_hook(lambda gradient: self.corrupted(gradient, name))
            return output

        self.after(layer, change)
