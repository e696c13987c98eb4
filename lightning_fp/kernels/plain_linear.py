"""F.linear in the operands' own dtype, differentiable in every way that F.linear is.

Where the weight is cast first, the parameter is kept for backward and cast again, not the cast:
under FSDP2 a saved copy would keep the unsharded weight from forward to backward (torchao#1629).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lightning_fp.kernels.base import without_autocast


class CastsWeight(Protocol):
    """A kernel whose weight is cast before it is multiplied."""

    def cast_weight(self, weight: Tensor, dtype: torch.dtype, seeds: Tensor | None) -> Tensor:
        """The weight in `dtype`, differentiable wherever `differentiated_again` or `transformed`.

        Args:
            weight: [out_features, in_features].
            dtype: the one to multiply in.
            seeds: what it rounds by, if by chance; see `lightning_fp.kernels.SimulatedKernel`.
        """
        ...

    def weight_gradient_dtype(self, dtype: torch.dtype, weight: torch.dtype) -> torch.dtype:
        """The dtype in which the weight's gradient is multiplied.

        Args:
            dtype: the one that the other products are multiplied in.
            weight: the weight's.
        """
        ...


def linear_without_autocast(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kernel: CastsWeight | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """F.linear without autocast, in derivatives of any order too.

    torch.compile traces the backward of F.linear under the autocast around the compiled region
    (`torch._functorch.config.backward_pass_autocast`), where it would be cast again.

    Args:
        input: [..., in_features].
        weight: [out_features, in_features], same dtype, or any that `kernel` casts.
        bias: [out_features] or None, in the dtype of `input`.
        kernel: casts the weight; None takes it as it is.
        seeds: handed to `kernel`.

    Returns:
        [..., out_features].
    """
    with without_autocast(input.device.type):
        inside = transformed()
        if kernel is not None and (inside or input.numel() == 0):
            weight, kernel = kernel.cast_weight(weight, input.dtype, seeds), None
        if input.numel() == 0:
            return F.linear(input, weight, bias)
        # As rows, because a view made in there could not be changed in place.
        rows = input.reshape(-1, input.shape[-1])
        if inside:
            output = _TransformedLinear.apply(rows, weight, bias)
        else:
            output = _Linear.apply(rows, weight, bias, kernel, seeds)
        return output.reshape(*input.shape[:-1], weight.shape[0])


def transformed() -> bool:
    """Whether torch.func or a forward-mode derivative looks on."""
    if torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active()
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiated_again() -> bool:
    """Asked in backward: whether its results are to be differentiated (`create_graph=True`)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernel: CastsWeight | None,
        seeds: Tensor | None,
    ) -> Tensor:
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            input if needs_weight else None, weight if needs_input else None, seeds
        )
        ctx.kernel, ctx.dtypes = kernel, (input.dtype, weight.dtype)
        if kernel is not None:
            weight = kernel.cast_weight(weight, input.dtype, seeds)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        input, weight, seeds = ctx.saved_tensors
        kernel, (dtype, weight_dtype) = ctx.kernel, ctx.dtypes
        with without_autocast(grad_output.device.type):
            if weight is not None and kernel is not None:
                weight = kernel.cast_weight(weight, dtype, seeds)
            grad_input = None if weight is None else _product(grad_output, weight)
            grad_weight = None
            if input is not None:
                wide = dtype if kernel is None else kernel.weight_gradient_dtype(*ctx.dtypes)
                grad_weight = _product(grad_output.to(wide).t(), input.to(wide)).to(weight_dtype)
            grad_bias = grad_output.sum(0) if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, None, None


class _TransformedLinear(torch.autograd.Function):
    """The same for torch.func and forward mode; slower to call, and unknown to dynamo."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _ = inputs
        # Both, whoever needs them: vmap cannot give None a batch dimension.
        ctx.save_for_backward(input, weight)
        ctx.save_for_forward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        with without_autocast(grad_output.device.type):
            grad_input = _product(grad_output, weight) if needs_input else None
            grad_weight = _product(grad_output.t(), input) if needs_weight else None
            grad_bias = grad_output.sum(0) if needs_bias else None
        return grad_input, grad_weight, grad_bias

    @staticmethod
    def jvp(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, input_tangent: Tensor, weight_tangent: Tensor, bias_tangent: Tensor | None
    ) -> Tensor:
        input, weight = ctx.saved_tensors
        with without_autocast(input.device.type):
            tangent = F.linear(input_tangent, weight, bias_tangent)
            return tangent + F.linear(input, weight_tangent)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, whose derivatives, where they are asked for, are without autocast too."""
    if transformed() or differentiated_again():
        return linear_without_autocast(a, b.t())
    return a @ b
