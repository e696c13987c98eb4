"""One operand of a layer, cast: by torch's operations, or by one kernel that does all of it.

A product wants contiguous what it sums over. Torch's cast has the layout of its operand, and the
product copies what it wants otherwise; a fused cast writes both layouts at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fp.kernels.gemm import cast_operand
from lightning_fp.kernels.memory import amax_row
from lightning_fp.kernels.triton.fused import fused_cast
from lightning_fp.numerics import FloatFormat, tensor_amax


@dataclass(frozen=True, kw_only=True, slots=True)
class Operand:
    """An operand, cast with one scale."""

    by_rows: Tensor | None
    """To multiply by where its rows are summed over: FP8, or its values in the wide dtype."""

    by_columns: Tensor | None
    """The same where its columns are."""

    kept: Tensor | None
    """FP8, to be kept: of a fused cast the layout of `by_columns`, if that was asked for."""

    scale: Tensor
    """float32 scalar."""

    amax: Tensor
    """float32 scalar."""

    row: Tensor
    """What is recorded of it, see `amax_row`."""


def torch_operand(
    x: Tensor,
    scale_of: Callable[[Tensor], Tensor],
    format: FloatFormat,
    wide: torch.dtype | None,
    *,
    record: bool,
) -> Operand:
    """An operand that torch's operations cast.

    Args:
        x: [rows, columns], high precision.
        scale_of: from its amax to its scale.
        format: the 8-bit format.
        wide: the dtype to multiply in under emulation; None on FP8 hardware.
        record: whether anybody will look at `row`.
    """
    amax = tensor_amax(x)
    scale = scale_of(amax)
    cast, values = cast_operand(x, scale, format, wide)
    row = amax_row(x, amax, record)
    return Operand(by_rows=values, by_columns=values, kept=cast, scale=scale, amax=amax, row=row)


def fused_operand(
    x: Tensor,
    scale: Tensor | None,
    format: FloatFormat,
    *,
    rows: bool = True,
    columns: bool = True,
    record: bool,
) -> Operand:
    """An operand that one kernel casts.

    Args:
        x: as `torch_operand`.
        scale: float32 scalar; None: from its amax.
        format: as `torch_operand`.
        rows: whether `by_rows` is wanted.
        columns: whether `by_columns` is.
        record: as `torch_operand`.
    """
    cast = fused_cast(x, format, scale, rows=rows, columns=columns)
    row = torch.stack([cast.amax, cast.nonfinite.float()]) if record else cast.amax
    kept = cast.columns if columns else cast.rows
    return Operand(
        by_rows=cast.rows,
        by_columns=cast.columns,
        kept=kept,
        scale=cast.scale,
        amax=cast.amax,
        row=row,
    )
