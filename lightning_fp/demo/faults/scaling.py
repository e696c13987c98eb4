"""Faults that harm through scales: in exact arithmetic, and in high precision, they do nothing.

Factors are powers of two, so that a layer without bias gives the same bits in high precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fp.demo.faults.base import Fault
from lightning_fp.kernels.memory import GRAD_OUTPUT
from lightning_fp.layers import FPLinear


@dataclass(eq=False, repr=False, kw_only=True)
class ActivationOutliers(Fault):
    """Some steps have inputs that are far larger, ever larger as time goes on.

    The layer's output is divided by what its input was multiplied with. Under delayed scaling the
    steps that follow use the scale of the large one and flush what they have to zero, and the first
    large one in a while is clamped. With `share=1` dynamic scaling holds all of them; outliers in
    a share of the tokens only want a scale per row.
    """

    bits: int = 18
    """How large they become, as a power of two."""

    ramp: int = 60
    """Steps until they are."""

    every: int = 8
    """One step in so many has them, at random, each layer for itself."""

    share: float = 1.0
    """Of the tokens that are large in such a step; 1 is all of them."""

    def attach(self, name: str, layer: nn.Linear) -> None:
        def enlarge(input: Tensor) -> Tensor:
            return input * self._factor(name, input)

        def undo(output: Tensor) -> Tensor:
            factor = self._factor(name, output)
            output = output / factor
            if layer.bias is not None:  # which was not enlarged
                output = output + (layer.bias * (1 - 1 / factor)).to(output.dtype)
            return output

        self.before(layer, enlarge)
        self.after(layer, undo)

    def _factor(self, name: str, x: Tensor) -> Tensor:
        """[..., 1] in the dtype of `x`: the factor of every token."""
        generator = self.generator(name)
        now = bool(torch.rand((), generator=generator) < 1 / self.every)
        size = 2.0 ** round(self.bits * min(1.0, self.age / self.ramp)) if now else 1.0
        large = torch.rand(x.shape[:-1], generator=generator) < self.share
        return torch.where(large, size, 1.0).unsqueeze(-1).to(x)


@dataclass(eq=False, repr=False, kw_only=True)
class GradientBursts(Fault):
    """Some steps have gradients of the output that are far larger.

    The gradients of input, weight and bias are divided by the same. Under delayed scaling such a
    step is clamped, and the steps that follow use its scale and flush their gradients to zero. The
    layers' weights must not be tied to others.
    """

    bits: int = 30
    """How large they are, as a power of two; e5m2 by itself holds about 30."""

    ramp: int = 1
    """Steps until they are; 1 begins with the full size."""

    every: int = 8
    """One step in so many has them, at random, each layer for itself."""

    def attach(self, name: str, layer: nn.Linear) -> None:
        self.before(layer, lambda x: _GradientTimes.apply(x, 1 / self._factor(name)))
        self.after(layer, lambda x: _GradientTimes.apply(x, self._factor(name)))
        for parameter in layer.parameters():
            self.on_gradient(parameter, lambda gradient: gradient / self._factor(name))

    def _factor(self, name: str) -> float:
        if self.age <= 0 or torch.rand((), generator=self.generator(name)) >= 1 / self.every:
            return 1.0
        return 2.0 ** round(self.bits * min(1.0, self.age / self.ramp))


class _GradientTimes(torch.autograd.Function):
    """Identity; backward multiplies the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output * ctx.factor, None


@dataclass(eq=False, repr=False, kw_only=True)
class StuckScale(Fault):
    """A delayed scale sticks where it is when the fault begins, times a power of two.

    It acts only while a layer is under delayed scaling. Nothing here is random.
    """

    bits: int = 8
    """The power of two; a positive one clamps."""

    operand: int = GRAD_OUTPUT
    """Whose scale, in the order of `lightning_fp.kernels.memory`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stuck: dict[str, float] = {}

    def attach(self, name: str, layer: nn.Linear) -> None:
        def stick(input: Tensor) -> Tensor:
            scales = layer.memory.scales if isinstance(layer, FPLinear) and layer.memory else None
            if scales is not None and self.format(name) == "fp8-delayed":
                # .data, because a backward may still wait for the scales of another layer, and
                # autograd would see that the arena of all scales was written to.
                scales = scales.data
                stuck = self._stuck.setdefault(name, float(scales[self.operand]) * 2.0**self.bits)
                scales[self.operand] = stuck
            return input

        self.before(layer, stick)

    def state_dict(self) -> dict[str, Any]:
        return {"stuck": dict(self._stuck)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stuck = dict(state_dict["stuck"])
