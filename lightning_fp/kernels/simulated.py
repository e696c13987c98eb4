"""Any e{X}m{Y}: operands are rounded to the format, products are computed in high precision.

No float8 dtype is involved, so this runs on every device. Values of at most 7 mantissa bits are
bf16 values too: they are multiplied in bf16 where that is the dtype of the layer and the hardware
is fast in it, which is as exact as float32, since both sum in float32. Where they have scales, CPUs
multiply the scaled values and undo the scales in the product; see `scaled_product`.

Kept for backward are the rounded input and the parameter, which is rounded again there, alike: what
rounds by chance keeps its seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fp.format_names import Rounding
from lightning_fp.kernels.base import Kernel, compute_dtype, without_autocast
from lightning_fp.kernels.gathered_casts import KeptCasts, identity
from lightning_fp.kernels.gemm import operand_dtype
from lightning_fp.kernels.memory import GRAD_OUTPUT, INPUT, WEIGHT
from lightning_fp.kernels.plain_linear import (
    differentiated_again,
    linear_without_autocast,
    transformed,
)
from lightning_fp.kernels.scaled_product import ScaledOperand, scaled_linear
from lightning_fp.numerics import (
    FORMATS,
    FloatFormat,
    amax_to_scale,
    new_seed,
    round_to_format,
    tensor_amax,
)


@dataclass(frozen=True, kw_only=True)
class SimulatedKernel(Kernel):
    """Rounds input, weight and grad_output, each to its format."""

    every_derivative = True

    input: FloatFormat
    """Format of the input, e.g. e8m3."""

    weight: FloatFormat
    """Format of the weight."""

    grad_output: FloatFormat
    """Format of the gradient of the output."""

    rounding: Rounding = "nearest"  # pyright: ignore[reportIncompatibleVariableOverride]
    """How values between two representable ones are rounded."""

    scaled: bool = False
    """Whether an operand's amax is scaled to the largest value of its format."""

    power_of_two: bool = False
    """Whether scales are powers of two."""

    @property
    def name(self) -> str:
        """See `Kernel.name`."""
        return "simulated"

    @property
    def runs_on_fp8_hardware(self) -> bool:
        """See `Kernel.runs_on_fp8_hardware`."""
        return False

    def multiply(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: str,
        memory: Any = None,
        *,
        gathered: KeptCasts | None = None,
        **ignored: Any,
    ) -> Tensor:
        """See `Kernel.multiply`."""
        casts = self if gathered is None else CastOnce(self, gathered)
        input = input.to(compute_dtype(input))
        seeds = self.seeds(input.device)
        with without_autocast(input.device.type):
            if self.multiplies_scaled(input, weight):
                output = scaled_linear(input, weight, casts, seeds)
            else:
                x = _rounded(input, self, INPUT, None, self.product_dtype(input), seeds)
                output = linear_without_autocast(x, weight, None, casts, seeds)
                output = _rounded(output, self, None, GRAD_OUTPUT, output.dtype, seeds)
                output = output.to(input.dtype)
            return output if bias is None else output + bias.to(output.dtype)

    def seeds(self, device: torch.device) -> Tensor | None:
        """int32 [3, 2], one for each operand of a product; None where nothing falls by chance."""
        if self.rounding != "stochastic":
            return None
        # All in forward: what backward drew would depend on the order in which it runs.
        return torch.stack([new_seed(device) for _ in range(3)])

    def straight_through(
        self,
        x: Tensor,
        forward: int | None,
        backward: int | None,
        dtype: torch.dtype,
        seeds: Tensor | None,
    ) -> Tensor:
        """Rounded on the way forward, on the way back, or both, and as it is otherwise.

        Args:
            x: any shape.
            forward: as which operand its values are rounded; None: not.
            backward: as which operand its gradient is rounded; None: not.
            dtype: of the result where values are rounded.
            seeds: of `seeds`.
        """
        return _rounded(x, self, forward, backward, dtype, seeds)

    def product_dtype(self, input: Tensor) -> torch.dtype:
        """The dtype that holds the rounded operands and is multiplied in."""
        unscaled = not self.scaled or self.power_of_two
        return operand_dtype(input) if self._fits_bf16 and unscaled else torch.float32

    def multiplies_scaled(self, input: Tensor, weight: Tensor) -> bool:
        """Whether the rounded, scaled values themselves are multiplied, in bf16.

        Not on GPUs, whose product would be rounded before its scales are undone, and again after.
        """
        scaled = self.scaled and not self.power_of_two and self._fits_bf16
        there = input.device.type == "cpu" and operand_dtype(input) is torch.bfloat16
        return scaled and there and input.numel() * weight.numel() > 0 and not transformed()

    def scaled_operand(
        self, operand: int, x: Tensor, seeds: Tensor | None, scale: Tensor | None = None
    ) -> ScaledOperand:
        """See `ScalesOperands`."""
        seed = None if seeds is None else seeds[operand]
        format = self.operand_formats[operand]
        if scale is None:
            scale, _ = self.cast_of(operand, x, None)
        rounded = round_to_format(x.float() * scale, format, self.rounding, seed)
        # The scale's exponent alone, of its reciprocal, which is never subnormal.
        power = (scale.reciprocal().view(torch.int32) & 0x7F800000).view(torch.float32)
        return ScaledOperand((rounded * power).bfloat16(), (scale * power).reciprocal(), scale)

    @property
    def operand_formats(self) -> tuple[FloatFormat, FloatFormat, FloatFormat]:
        """Of input, weight and grad_output."""
        return self.input, self.weight, self.grad_output

    @property
    def _fits_bf16(self) -> bool:
        most = FORMATS["bf16"].mantissa_bits
        return all(format.mantissa_bits <= most for format in self.operand_formats)

    def cast_weight(self, weight: Tensor, dtype: torch.dtype, seeds: Tensor | None) -> Tensor:
        """See `CastsWeight`."""
        if transformed() or differentiated_again():
            return _rounded(weight, self, WEIGHT, None, dtype, seeds)
        return self.rounded(WEIGHT, weight, dtype, seeds)

    def weight_gradient_dtype(self, dtype: torch.dtype, weight: torch.dtype) -> torch.dtype:
        """See `CastsWeight`; rounded no further than the gradient will be."""
        return torch.promote_types(dtype, weight)

    def rounded(self, operand: int, x: Tensor, dtype: torch.dtype, seeds: Tensor | None) -> Tensor:
        """What is left of an operand.

        Args:
            operand: INPUT, WEIGHT or GRAD_OUTPUT.
            x: any shape.
            dtype: of the result.
            seeds: int32 [3, 2], one per operand; None where nothing is rounded by chance.

        Returns:
            `dtype`, same shape.
        """
        seed = None if seeds is None else seeds[operand]
        scale, format = self.cast_of(operand, x, None)
        if not self.scaled:
            return round_to_format(x, format, self.rounding, seed).to(dtype)
        return (round_to_format(x.float() * scale, format, self.rounding, seed) / scale).to(dtype)

    def cast_of(self, operand: int, x: Tensor, scales: Tensor | None) -> tuple[Tensor, FloatFormat]:
        """See `Kernel.cast_of`."""
        format = self.operand_formats[operand]
        if not self.scaled:
            return torch.ones((), device=x.device), format
        amax = tensor_amax(x)
        return amax_to_scale(amax, format.max, power_of_two=self.power_of_two), format


@dataclass(frozen=True, slots=True)
class CastOnce:
    """The kernel, where FSDP2 has gathered the weight: each cast of it is made once.

    What rounds by chance is rounded anew for each forward.
    """

    kernel: SimulatedKernel
    gathered: KeptCasts

    def cast_weight(self, weight: Tensor, dtype: torch.dtype, seeds: Tensor | None) -> Tensor:
        """See `CastsWeight`."""
        if seeds is not None or transformed() or differentiated_again():
            return self.kernel.cast_weight(weight, dtype, seeds)
        return self.gathered.of(
            weight,
            (self.kernel, dtype),
            lambda: self.kernel.cast_weight(weight, dtype, None),
            lambda cast: () if cast.data_ptr() == weight.data_ptr() else (cast,),
        )

    def weight_gradient_dtype(self, dtype: torch.dtype, weight: torch.dtype) -> torch.dtype:
        """See `CastsWeight`."""
        return self.kernel.weight_gradient_dtype(dtype, weight)

    def scaled_operand(
        self, operand: int, x: Tensor, seeds: Tensor | None, scale: Tensor | None = None
    ) -> ScaledOperand:
        """See `ScalesOperands`."""

        def make() -> ScaledOperand:
            return self.kernel.scaled_operand(operand, x, seeds, scale)

        if operand != WEIGHT or seeds is not None:
            return make()
        kept = self.gathered.of(x, self.kernel, make, lambda cast: (cast.values,))
        return kept if scale is None or identity(scale) == identity(kept.scale) else make()

    def straight_through(
        self,
        x: Tensor,
        forward: int | None,
        backward: int | None,
        dtype: torch.dtype,
        seeds: Tensor | None,
    ) -> Tensor:
        """See `ScalesOperands`."""
        return self.kernel.straight_through(x, forward, backward, dtype, seeds)


def _rounded(
    x: Tensor,
    kernel: SimulatedKernel,
    forward: int | None,
    backward: int | None,
    dtype: torch.dtype,
    seeds: Tensor | None,
) -> Tensor:
    """Rounded as an operand on the way forward, on the way back, or both; else as it is."""
    function = _TransformedRound if transformed() else _Round
    return function.apply(x, kernel, forward, backward, dtype, seeds)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: SimulatedKernel,
        forward: int | None,
        backward: int | None,
        dtype: torch.dtype,
        seeds: Tensor | None,
    ) -> Tensor:
        if seeds is not None and backward is not None:
            ctx.save_for_backward(seeds)
        ctx.dtype, ctx.kernel, ctx.operand = x.dtype, kernel, backward
        return _once(x, kernel, forward, dtype, seeds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if ctx.operand is not None:
            saved = ctx.saved_tensors  # asked for once: checkpointing unpacks it once
            seeds = saved[0] if saved else None
            if transformed() or differentiated_again():
                grad = _rounded(grad, ctx.kernel, ctx.operand, None, grad.dtype, seeds)
            else:
                grad = ctx.kernel.rounded(ctx.operand, grad, grad.dtype, seeds)
        return grad.to(ctx.dtype), None, None, None, None, None


class _TransformedRound(torch.autograd.Function):
    """The same for torch.func and forward mode; slower to call, and unknown to dynamo."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        kernel: SimulatedKernel,
        forward: int | None,
        backward: int | None,
        dtype: torch.dtype,
        seeds: Tensor | None,
    ) -> Tensor:
        return _once(x, kernel, forward, dtype, seeds)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.kernel, _, ctx.operand, _, seeds = inputs
        if seeds is not None and ctx.operand is not None:
            ctx.save_for_backward(seeds)
        ctx.dtype, ctx.out_dtype = x.dtype, output.dtype

    backward = staticmethod(_Round.backward)  # pyright: ignore

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # pyright: ignore
        return tangent.to(ctx.out_dtype)


def _once(
    x: Tensor,
    kernel: SimulatedKernel,
    operand: int | None,
    dtype: torch.dtype,
    seeds: Tensor | None,
) -> Tensor:
    if operand is None:
        return x.clone()  # a view made in here could not be changed in place
    return kernel.rounded(operand, x, dtype, seeds)
