"""FP8 products: `torch._scaled_mm` where the hardware has it, exact emulation elsewhere.

Emulation multiplies the very FP8 values in a wider dtype that holds them exactly, accumulates in
float32, applies the scales once, after the sum, as the hardware does, and rounds to the result's
dtype after that. Where a GPU emulates in bf16 torch rounds the sum first, so a bf16 result is
rounded twice there (52.6 dB in place of 55.6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fp.format_names import ALIGNMENT
from lightning_fp.kernels import hardware
from lightning_fp.kernels.padding import whole
from lightning_fp.numerics import FloatFormat, as_float16
from lightning_fp.numerics.bits import from_codes, to_codes
from lightning_fp.numerics.casting import clamp_into_new
from lightning_fp.numerics.devices import has_dtype

_RESULTS = torch.bfloat16, torch.float16, torch.float32
"""What `torch._scaled_mm` can return."""


def operand_dtype(input: Tensor) -> torch.dtype:
    """The dtype in which emulated operands are multiplied.

    bf16 where it is fast, else float32. Both hold every FP8 value exactly and both accumulate in
    float32; see `emulated_product` for how they round.
    """
    fast_bf16 = input.is_cuda or hardware.CPU_HAS_BF16
    return torch.bfloat16 if fast_bf16 and input.dtype is torch.bfloat16 else torch.float32


def cast_operand(
    x: Tensor, scale: Tensor, format: FloatFormat, wide: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Cast one operand of a product.

    Args:
        x: [rows, columns], high precision.
        scale: float32 scalar.
        format: the 8-bit format.
        wide: dtype to multiply in under emulation; None on FP8 hardware.

    Returns:
        The FP8 tensor (to save; its bytes where the device lacks the dtype), and what to multiply
        with: the same tensor on FP8 hardware, its exact values in `wide` under emulation.
    """
    scaled = clamp_into_new(x, scale, format.max)
    if wide is not None and not has_dtype(format, x.device):
        codes = to_codes(scaled, format)
        return codes, from_codes(codes, format).to(wide)
    cast = scaled.to(format.dtype)
    if wide is None:
        return cast, cast
    if torch.compiler.is_compiling():
        return cast, widen(cast, format, wide)
    return cast, scaled.copy_(as_float16(cast)).to(wide)


def widen(cast: Tensor, format: FloatFormat, wide: torch.dtype | None) -> Tensor:
    """The exact values of an FP8 tensor in `wide`; the tensor itself on FP8 hardware."""
    if wide is None:
        return cast
    if cast.dtype is torch.uint8:
        return from_codes(cast, format).to(wide)
    # By way of float32: torch and its compiler vectorise both steps, and not the direct one.
    narrow = cast if torch.compiler.is_compiling() else as_float16(cast)
    return narrow.float().to(wide)


def unscale(scale: Tensor, amax: Tensor) -> Tensor:
    """The factor that undoes a scale; NaN for an operand with inf or NaN.

    The cast itself saturates inf, since a delayed scale knows nothing of it. Here, after the cast
    and off its critical path, the operand's amax is known: no product hides a non-finite operand.
    """
    if torch.compiler.is_compiling():
        return torch.where(torch.isfinite(amax), scale.reciprocal(), torch.nan)
    return scale.reciprocal() + (amax - amax)  # the same with three launches in place of seven


def emulated_product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`a @ b`, rounded no further than its result will be.

    torch rounds the product of bf16 operands to bf16. Where the result is float32, the gradient of
    a float32 weight, that would cost it 90 dB, and CPUs multiply in float32 then. GPUs do not: it
    takes them ten times as long.

    Args:
        a: [M, K], bf16 or float32.
        b: [K, N], same dtype.
        out_dtype: what the result will be rounded to.

    Returns:
        [M, N], in float32 or in the operands' dtype.
    """
    if out_dtype is torch.float32 and not a.is_cuda:
        return a.float() @ b.float()
    return a @ b


def _scaled_in_bf16(a: Tensor, b: Tensor, unscale: Tensor) -> Tensor:
    return torch.addmm(a.new_empty(b.shape[1]), a, b, beta=0, alpha=unscale.item())


_scaled_in_bf16_compiled = torch.library.custom_op(
    "lightning_fp::scaled_in_bf16", _scaled_in_bf16, mutates_args=()
)


@_scaled_in_bf16_compiled.register_fake
def _(a: Tensor, b: Tensor, unscale: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def scaled_in_bf16(a: Tensor, b: Tensor, unscale: Tensor) -> Tensor:
    """`(a @ b) * unscale` on the CPU, rounded once: the GEMM scales what it has summed in float32.

    It takes the factor as a number, which neither dynamo nor a fake tensor has.

    Args:
        a: [M, K], bf16.
        b: [K, N], bf16.
        unscale: float32 scalar.

    Returns:
        [M, N], bf16.
    """
    if torch.compiler.is_compiling() or type(unscale) is not Tensor:
        return _scaled_in_bf16_compiled(a, b, unscale)
    return _scaled_in_bf16(a, b, unscale)


def forward_products(
    x: Tensor, w: Tensor, unscale_x: Tensor, unscale_w: Tensor, dtype: torch.dtype
) -> Tensor:
    """The product of a layer's forward.

    Args:
        x: [tokens, in_features], FP8 or widened, as from `cast_operand`.
        w: [out_features, in_features], likewise.
        unscale_x: float32 scalar, see `multiply`.
        unscale_w: likewise.
        dtype: of the output.

    Returns:
        [tokens, out_features].
    """
    return multiply(x, w.t(), unscale_x, unscale_w, dtype, fast_accumulation=True)


def backward_products(
    g: Tensor | None,
    g_by_columns: Tensor | None,
    x: Tensor | None,
    w: Tensor | None,
    unscale_g: Tensor,
    unscale_x: Tensor,
    unscale_w: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor | None, Tensor | None]:
    """The two products of a layer's backward.

    Args:
        g: [tokens, out_features], the cast of the output's gradient; needed for `w`.
        g_by_columns: the same, in whichever layout is at hand; needed for `x`.
        x: [tokens, in_features]; None if the weight needs no gradient of this product.
        w: [out_features, in_features]; None if the input needs none.
        unscale_g: float32 scalar, see `multiply`.
        unscale_x: likewise.
        unscale_w: likewise.
        dtypes: of the gradients of input and weight.

    Returns:
        The gradients of input and weight, None where not asked for.
    """
    of_input, of_weight = dtypes
    grad_input = grad_weight = None
    if w is not None and g is not None:
        grad_input = multiply(g, w, unscale_g, unscale_w, of_input)
    if x is not None and g_by_columns is not None:
        columns = g_by_columns.t()
        grad_weight = multiply(columns, x, unscale_g, unscale_x, of_weight, over_tokens=True)
    return grad_input, grad_weight


def multiply(
    a: Tensor,
    b: Tensor,
    unscale_a: Tensor,
    unscale_b: Tensor,
    out_dtype: torch.dtype,
    *,
    fast_accumulation: bool = False,
    over_tokens: bool = False,
) -> Tensor:
    """`a @ b`, its scales undone.

    Args:
        a: [M, K], FP8 or widened.
        b: [K, N], FP8 or widened.
        unscale_a: float32 scalar, the reciprocal of the scale of `a`.
        unscale_b: float32 scalar, the reciprocal of the scale of `b`.
        out_dtype: dtype of the result.
        fast_accumulation: let Hopper accumulate with fewer bits (FP8 hardware only).
        over_tokens: whether K is a number of tokens, which may be any.

    Returns:
        [M, N] in `out_dtype`; NaN where a scale is: widened operands need not show their NaN.
    """
    if a.dtype.itemsize == 1:
        # cuBLAS wants the first operand row-major, the second column-major, and a multiple of 16
        # of what is summed over: features, checked at setup, or tokens. These are padded by the
        # copies that both operands need then anyway.
        multiple = ALIGNMENT if over_tokens else 1
        result = out_dtype if out_dtype in _RESULTS else torch.float32
        product = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            whole(a, columns=multiple),
            whole(b.t(), columns=multiple).t(),
            scale_a=unscale_a,
            scale_b=unscale_b,
            out_dtype=result,
            use_fast_accum=fast_accumulation,
        )
        return product.to(out_dtype)
    both = unscale_a * unscale_b
    if a.device.type == "cpu" and out_dtype is a.dtype is torch.bfloat16:
        return scaled_in_bf16(a, b, both)
    product = emulated_product(a, b, out_dtype).float()
    if torch.compiler.is_compiling():
        return (product * both).to(out_dtype)
    return product.mul_(both).to(out_dtype)
