"""Faults that corrupt what a layer returns, forward or backward, while its format is FP8.

They know nothing of scales: what helps against them is another format, whatever the statistics
of the casts say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_fp.choices import check_choice
from lightning_fp.demo.faults.base import Fault
from lightning_fp.numerics import float_format
from lightning_fp.numerics.simulated import round_to_format

Kind = Literal["noise", "clamp", "zero", "round"]


@dataclass(eq=False, repr=False, kw_only=True)
class Corruption(Fault):
    """What the two have in common.

    Raises:
        ValueError: for an unknown kind.
    """

    kind: Kind
    """"noise" adds normal noise; "clamp" clamps; "zero" flushes small values; "round" rounds to few
    mantissa bits."""

    strength: float
    """Of noise its norm, of "clamp" and "zero" the threshold: relative to the root mean square of
    the tensor. Of "round" the mantissa bits."""

    ramp: int = 1
    """Steps until noise or "zero" have their strength; 1 begins with it."""

    formats: str = "fp8"
    """How the names of the formats begin that it acts in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind", self.kind, get_args(Kind))

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
