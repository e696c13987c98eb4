"""Faults of precision that are harmless in exact arithmetic: what grows is multiplied by zero.

A layer that ignores a channel has zeros in that column of its weight; one whose row is ignored has
an output that is not used. In high precision a huge value there changes nothing, bit for bit. A
format that shares one scale among neighbours loses these instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fp.demo.faults import Fault


@dataclass(eq=False, repr=False, kw_only=True)
class Growing(Fault):
    """Something that grows by powers of two since the fault began."""

    bits: int = 20
    """To what power."""

    ramp: int = 1
    """Steps until it is there; 1 begins with it."""

    start: int = 100

    @property
    def size(self) -> float:
        return 2.0 ** (self.bits * min(1.0, self.age / self.ramp))


@dataclass(eq=False, repr=False, kw_only=True)
class HotChannels(Growing):
    """Channels of a layer's input that it ignores hold huge values."""

    apart: int = 0
    """One channel in so many, the first of each; 0 is one channel in all."""

    def attach(self, name: str, layer: nn.Linear) -> None:
        channels = slice(0, 1) if self.apart == 0 else slice(0, None, self.apart)
        ignore(self, layer, channels)

        def heat(x: Tensor) -> Tensor:
            x = x.clone()
            x[..., channels] = self.size
            return x

        self.before(layer, heat)


class HugeValue(Growing):
    """One batch in 20, at random, holds a huge value where the layers that it comes to ignore it.

    So the batch has it wherever it is run again.
    """

    every = 20

    def attach(self, name: str, layer: nn.Linear) -> None:
        ignore(self, layer, slice(0, 1))

    def spoil(self, batch: tuple[Tensor, Tensor], number: int) -> tuple[Tensor, Tensor]:
        """The batch, with the value if it has one.

        Args:
            batch: inputs, whose very first value is not used, and targets.
            number: counted from 0.
        """
        dice = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        if number < self.start or torch.rand((), generator=dice) >= 1 / self.every:
            return batch
        inputs, targets = batch[0].clone(), batch[1]
        inputs.view(-1)[0] = 2.0**self.bits
        return inputs, targets


@dataclass(eq=False, repr=False, kw_only=True)
class AlignedPair(Growing):
    """Rows of a SwiGLU's gate and up have turned the same way and grow: their product grows twice
    as fast, in a channel that down ignores (Fishman et al., arXiv 2409.12517, section 4)."""

    ramp: int = 100

    def attach(self, name: str, layer: nn.Linear) -> None:
        if name.endswith(".down"):
            ignore(self, layer, slice(0, 1))
        elif name.endswith((".gate", ".up")):
            generator = torch.Generator().manual_seed(self.seed)
            direction = torch.randn(layer.in_features, generator=generator)
            direction /= direction.norm()

            def grow(x: Tensor) -> Tensor:
                with torch.no_grad():
                    layer.weight[0] = direction * self.size**0.5
                return x

            self.before(layer, grow)


@dataclass(eq=False, repr=False, kw_only=True)
class HotRow(Growing):
    """One row of the weight grows; what it gives is not used."""

    def attach(self, name: str, layer: nn.Linear) -> None:
        def grow(x: Tensor) -> Tensor:
            with torch.no_grad():
                layer.weight[0] = self.size
            return x

        def unused(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            kept = torch.ones(output.shape[-1], dtype=torch.bool, device=output.device)
            kept[0] = False
            return torch.where(kept, output, 0.0)

        self.before(layer, grow)
        self._keep(layer.register_forward_hook(unused))


def ignore(fault: Fault, layer: nn.Linear, channels: slice) -> None:
    """Have the layer ignore channels of its input, and learn nothing else."""
    with torch.no_grad():
        layer.weight[:, channels] = 0.0

    def nothing(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:, channels] = 0.0
        return gradient

    fault.on_gradient(layer.weight, nothing)
