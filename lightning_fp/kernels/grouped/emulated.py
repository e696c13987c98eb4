"""The grouped product in FP8, emulated exactly: per row or per tensor, each expert by itself.

As `lightning_fp.kernels.gemm` does for one product: the FP8 values are multiplied in a wider dtype
that holds them, accumulated in float32, and the scales are undone once, after the sum. Rows belong
to one expert each, so scales per row need no groups; along the tokens, for the gradient of the
weights, and per tensor, each expert has scales of its own, made of its own tokens. What torchao's
grouped product computes on CUDA is the same in exact arithmetic
(`torchao.prototype.moe_training.fp8_grouped_mm`, which scales by powers of two).

Kept for backward are input and weight as they are, as torchao does. Of a weight that FSDP2 has
gathered each cast is made once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fp.kernels.base import without_autocast
from lightning_fp.kernels.derivatives import first_derivatives_only, refuse_transforms
from lightning_fp.kernels.float8_free import Cast, Casts
from lightning_fp.kernels.gathered_casts import KeptCasts
from lightning_fp.kernels.gemm import cast_operand, operand_dtype, widen
from lightning_fp.kernels.grouped.groups import Groups
from lightning_fp.kernels.grouped.product import of_rows, over_rows
from lightning_fp.numerics import amax_to_scale, row_amax, through_bf16


def emulated_groups(
    input: Tensor,
    weight: Tensor,
    groups: Groups,
    casts: Casts,
    layer: str,
    *,
    exported: bool = False,
    gathered: KeptCasts | None = None,
) -> Tensor:
    """The products of a layer's experts.

    Args:
        input: [tokens, in_features], sorted by expert.
        weight: [experts, out_features, in_features].
        groups: whose the rows of `input` are.
        casts: of the operands.
        layer: the layer's name, for error messages.
        exported: whether weights are rounded to bf16 before they are cast.
        gathered: what is kept of the casts of a weight that FSDP2 has gathered.

    Returns:
        [tokens, out_features] in the dtype of `input`.
    """
    output = _Grouped.apply(input, weight, *groups, casts, layer, exported, gathered)
    return first_derivatives_only(output, layer)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        ends: Tensor,
        of_row: Tensor,
        casts: Casts,
        layer: str,
        exported: bool,
        gathered: KeptCasts | None,
    ) -> Tensor:
        needs_input, needs_weight, *_ = ctx.needs_input_grad
        saved = input if needs_weight else None, weight if needs_input else None
        ctx.save_for_backward(*saved, ends, of_row)
        ctx.casts, ctx.layer, ctx.exported, ctx.gathered = casts, layer, exported, gathered
        ctx.dtypes = input.dtype, weight.dtype
        groups, wide = Groups(ends, of_row), operand_dtype(input)
        of_input, of_weight = casts.output
        x, undo_x = _rows(input, of_input, groups, wide)
        w, undo_w = _weights(weight, of_weight, 2, wide, exported, gathered)
        product = of_rows(x, w.transpose(1, 2), ends, _sum_dtype(casts.output, input.dtype)).float()
        return (product * undo_x * groups.per_row(undo_w.squeeze(2))).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        refuse_transforms(ctx.layer, grad_output)
        input, weight, ends, of_row = ctx.saved_tensors
        casts: Casts = ctx.casts
        groups, wide = Groups(ends, of_row), operand_dtype(grad_output)
        grad_input = grad_weight = None
        with torch.no_grad(), without_autocast(grad_output.device.type):
            if weight is not None:
                of_grad, of_weight = casts.grad_input
                g, undo_g = _rows(grad_output, of_grad, groups, wide)
                w, undo_w = _weights(weight, of_weight, 1, wide, ctx.exported, ctx.gathered)
                product = of_rows(g, w, ends, _sum_dtype(casts.grad_input, ctx.dtypes[0])).float()
                grad_input = product * undo_g * groups.per_row(undo_w.squeeze(1))
                grad_input = grad_input.to(ctx.dtypes[0])
            if input is not None and casts.grad_weight is None:
                product = over_rows(grad_output, input.to(grad_output.dtype), ends, ctx.dtypes[1])
                grad_weight = product.to(ctx.dtypes[1])
            elif input is not None and casts.grad_weight is not None:
                of_grad, of_input = casts.grad_weight
                g, undo_g = _columns(grad_output, of_grad, groups, wide)
                x, undo_x = _columns(input, of_input, groups, wide)
                product = over_rows(
                    g, x, ends, _sum_dtype(casts.grad_weight, ctx.dtypes[1])
                ).float()
                undone = product * undo_g.unsqueeze(2) * undo_x.unsqueeze(1)
                grad_weight = undone.to(ctx.dtypes[1])
        return grad_input, grad_weight, *[None] * 6


def _sum_dtype(casts: tuple[Cast, Cast], dtype: torch.dtype) -> torch.dtype:
    """What a product is rounded to before its scales are undone: powers of two round nothing."""
    return dtype if all(cast.power_of_two for cast in casts) else torch.float32


def _rows(x: Tensor, cast: Cast, groups: Groups, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """An operand whose rows are summed over: its FP8 values, and what undoes their scales.

    Returns:
        [rows, columns] in `wide`, and float32 [rows, 1].
    """
    amax = row_amax(x) if cast.by_row else groups.per_row(groups.amax(x))
    return _cast(x, amax, cast, wide)[1:]


def _columns(x: Tensor, cast: Cast, groups: Groups, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """An operand whose columns are summed over, by each expert its own part of them.

    Returns:
        [rows, columns] in `wide`, and float32 [experts, columns], or [experts, 1] per tensor.
    """
    amax = groups.column_amax(x) if cast.by_row else groups.amax(x)
    scale = amax_to_scale(amax, cast.format.max, power_of_two=cast.power_of_two)
    values = cast_operand(x, groups.per_row(scale), cast.format, wide)[1]
    return values, scale.reciprocal()


def _weights(
    weight: Tensor,
    cast: Cast,
    summed: int,
    wide: torch.dtype,
    exported: bool,
    gathered: KeptCasts | None,
) -> tuple[Tensor, Tensor]:
    """The experts' weights.

    Args:
        weight: [experts, out_features, in_features].
        cast: how they are cast.
        summed: the dimension that the product sums over.
        wide: dtype of the values.
        exported: whether they are rounded to bf16 before.
        gathered: see `emulated_groups`.

    Returns:
        The same shape in `wide`, and what undoes the scales, float32, 1 in the summed dimension.
    """
    dims = (summed,) if cast.by_row else (1, 2)

    def make() -> tuple[Tensor, Tensor, Tensor]:
        x = through_bf16(weight) if exported else weight
        return _cast(x, x.detach().abs().amax(dim=dims, keepdim=True).float(), cast, wide)

    if gathered is None:
        return make()[1:]
    key = cast, dims, exported
    kept = gathered.find(weight, key)
    if kept is None:
        fp8, values, undo = make()
        gathered.keep(weight, (key,), (fp8, undo), (fp8, undo))
        return values, undo
    fp8, undo = kept
    return widen(fp8, cast.format, wide), undo


def _cast(x: Tensor, amax: Tensor, cast: Cast, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """FP8, its values in `wide`, and what undoes the scales."""
    scale = amax_to_scale(amax, cast.format.max, power_of_two=cast.power_of_two)
    return *cast_operand(x, scale, cast.format, wide), scale.reciprocal()
