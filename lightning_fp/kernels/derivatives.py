"""Derivatives beyond the first, of products whose operands are cast.

A gradient penalty or a Hessian-vector product differentiates what backward has returned. The
derivative of that is the one of the product in high precision: straight through the casts, as the
first derivative goes. Under torch.compile there is none, as for everything else in there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from lightning_fp.kernels.base import without_autocast
from lightning_fp.kernels.plain_linear import (
    differentiated_again,
    linear_without_autocast,
    transformed,
)


def place_of(x: Tensor, weight: Tensor) -> Tensor | None:
    """A tensor without memory that stands where `x` stands in the graph.

    A backward that keeps only the cast of `x` returns gradients to `x` through it. It is no tensor
    to save for backward: what offloads those would copy all of it.

    Args:
        x: an operand.
        weight: the other one, whose gradient is what depends on `x`.

    Returns:
        Shape and dtype of `x`, its values are never read; None where no gradient will be asked
        for.
    """
    asked = torch.is_grad_enabled() and x.requires_grad and weight.requires_grad
    return _Place.apply(x) if asked and not torch.compiler.is_compiling() else None


def in_place_of(values: Tensor, place: Tensor | None) -> Tensor:
    """`values`, whose gradients go to where `place` was taken."""
    return values if place is None else _Placed.apply(place, values)


def gradients_again(
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients as they are, with the derivatives of high precision.

    Args:
        grad_input: [M, K], the value; None where it was not asked for.
        grad_weight: [N, K], the value; None where it was not asked for.
        grad_output: [M, N].
        input: [M, K], in its place in the graph; needed for `grad_weight`.
        weight: [N, K], the parameter; needed for `grad_input`.

    Returns:
        Both, each None where it was.
    """
    dtype = grad_output.dtype
    with without_autocast(grad_output.device.type):
        if grad_input is not None and weight is not None:
            grad_input = _StandIn.apply(grad_input, grad_output, weight.to(dtype).t())
        if grad_weight is not None and input is not None:
            grad_weight = _StandIn.apply(grad_weight, grad_output.t(), input.to(dtype).t())
    return grad_input, grad_weight


def first_derivatives_only(output: Tensor, layer: str) -> Tensor:
    """`output`, of a product that others compute; to differentiate its backward is an error.

    Args:
        output: what they returned.
        layer: the layer's name.
    """
    asked = torch.is_grad_enabled() and output.requires_grad and not torch.compiler.is_compiling()
    return _FirstOnly.apply(output, layer) if asked else output


def refuse_transforms(layer: str, grad_output: Tensor) -> None:
    """Refuse, in backward, a transform that has begun after the forward.

    Args:
        layer: the layer's name.
        grad_output: which torch.autograd.grad(is_grads_batched=True) transforms too.

    Raises:
        RuntimeError: inside of such a transform, naming the layer.
    """
    if transformed() or batched(grad_output):
        raise RuntimeError(
            f"layer {layer!r}: its format cannot go backward under vmap or is_grads_batched where"
            f" its forward ran without; {_remedy(layer)}"
        )


def batched(x: Tensor) -> bool:
    """Whether it is many gradients at once, as torch.autograd.grad(is_grads_batched=True) has."""
    return not torch.compiler.is_compiling() and is_legacy_batchedtensor(x)


def _remedy(layer: str) -> str:
    return f"leave the layer in high precision with layers={{{layer!r}: 'bf16'}}"


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # else each first backward adds zeros of the input's size
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:  # pyright: ignore
        return grad


class _Placed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(place: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return grad, None


class _StandIn(torch.autograd.Function):
    """The value of a cast product, with the derivatives of `a @ b.t()`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        a, b = ctx.saved_tensors
        _, needs_a, needs_b = ctx.needs_input_grad
        grad = grad.to(a.dtype)
        grad_a = linear_without_autocast(grad, b.t()) if needs_a else None
        grad_b = linear_without_autocast(grad.t(), a.t()) if needs_b else None
        return None, grad_a, grad_b


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, layer: str) -> Tensor:
        ctx.layer = layer
        return output.clone()  # a view made in here could not be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        if differentiated_again():
            raise RuntimeError(
                f"layer {ctx.layer!r}: what multiplies it has no second derivatives, as"
                f" create_graph=True asks for; {_remedy(ctx.layer)}"
            )
        return grad, None
