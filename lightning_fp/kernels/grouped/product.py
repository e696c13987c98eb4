"""The grouped products that emulation is made of, each one operator to compilers and counters.

CUDA has a kernel for bf16 operands (`torch._grouped_mm`); everything else is multiplied expert by
expert, for which a GPU's host waits once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fp.kernels.gemm import emulated_product

_GROUPED_MM = torch.ops.aten._grouped_mm


def _of_rows(a: Tensor, b: Tensor, ends: Tensor, in_float32: bool) -> Tensor:
    if _takes(a, in_float32, *b.shape[1:]):
        product = _GROUPED_MM(a, b, offs=ends)
        # What is behind the last group, it leaves as it was in memory.
        own = torch.arange(a.shape[0], device=a.device) < ends[-1]
        return torch.where(own.unsqueeze(1), product, 0)
    out = torch.zeros(a.shape[0], b.shape[2], dtype=_result(a, in_float32), device=a.device)
    start = 0
    for matrix, end in zip(b.unbind(0), ends.tolist(), strict=True):
        if end > start:
            out[start:end] = emulated_product(a[start:end], matrix, out.dtype)
        start = end
    return out


def _over_rows(a: Tensor, b: Tensor, ends: Tensor, in_float32: bool) -> Tensor:
    if _takes(a, in_float32, a.shape[1], b.shape[1]):
        return _GROUPED_MM(a.t(), b, offs=ends)
    dtype = _result(a, in_float32)
    out = torch.zeros(ends.shape[0], a.shape[1], b.shape[1], dtype=dtype, device=a.device)
    start = 0
    for matrix, end in zip(out.unbind(0), ends.tolist(), strict=True):
        if end > start:
            matrix.copy_(emulated_product(a[start:end].t(), b[start:end], dtype))
        start = end
    return out


def _takes(a: Tensor, in_float32: bool, *features: int) -> bool:
    """Whether CUDA's grouped kernel does: bf16 alone, with rows of whole 16 bytes."""
    if not a.is_cuda or a.dtype is not torch.bfloat16 or in_float32:
        return False
    return all(size % 8 == 0 for size in features)


def _result(a: Tensor, in_float32: bool) -> torch.dtype:
    return torch.float32 if in_float32 and not a.is_cuda else a.dtype


_of_rows_op = torch.library.custom_op("lightning_fp::grouped_of_rows", _of_rows, mutates_args=())
_over_rows_op = torch.library.custom_op(
    "lightning_fp::grouped_over_rows", _over_rows, mutates_args=()
)


@_of_rows_op.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor, in_float32: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2], dtype=_result(a, in_float32))


@_over_rows_op.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor, in_float32: bool) -> Tensor:
    return a.new_empty(ends.shape[0], a.shape[1], b.shape[1], dtype=_result(a, in_float32))


def of_rows(a: Tensor, b: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Each group of rows times its own matrix.

    Args:
        a: [rows, K], bf16 or float32.
        b: [experts, K, N], same dtype.
        ends: int32 [experts], see `Groups`.
        out_dtype: what the result will be rounded to.

    Returns:
        [rows, N], in float32 or in the operands' dtype; 0 for rows of nobody.
    """
    return _of_rows_op(a, b, ends, out_dtype is torch.float32)


def over_rows(a: Tensor, b: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Of each group, the product that sums over its rows.

    Args:
        a: [rows, N], bf16 or float32.
        b: [rows, K], same dtype.
        ends: int32 [experts], see `Groups`.
        out_dtype: what the result will be rounded to.

    Returns:
        [experts, N, K], in float32 or in the operands' dtype; 0 for experts without a row.
    """
    return _over_rows_op(a, b, ends, out_dtype is torch.float32)
