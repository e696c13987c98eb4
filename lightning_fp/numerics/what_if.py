"""What other scalings would have done to an operand."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fp.numerics.blocks import Block, block_amax, spread_blocks
from lightning_fp.numerics.combining import COLUMN, wide, wide_dtype
from lightning_fp.numerics.formats import FloatFormat, float_format
from lightning_fp.numerics.scaling import amax_to_scale, row_amax, tensor_amax
from lightning_fp.numerics.statistics import ratio

_OTHER = {"e4m3": "e5m2", "e5m2": "e4m3", "e4m3fnuz": "e5m2fnuz", "e5m2fnuz": "e4m3fnuz"}


def what_if_statistics(
    x: Tensor,
    format: FloatFormat,
    delayed_scale: Tensor | None,
    rows: Tensor | None = None,
    block: Block = (1, 128),
) -> Tensor:
    """What other scalings would have done to an operand.

    Dynamic scales, per tensor, row or block, cannot clamp, so only delayed scaling's clamping is
    counted.

    Args:
        x: [rows, columns], high precision.
        format: the 8-bit format of the operand.
        delayed_scale: float32 scalar from the layer's history; None or 0 if there is none.
        rows: int64 indices of the rows that underflow is counted on; None takes all.
        block: rows and columns of the blocks that `fp8-block` would have.

    Returns:
        float64 [len(WHAT_IF)].
    """
    x = x.detach().float()
    size = torch.where(torch.isfinite(x), x, 0.0).abs()
    amax = tensor_amax(size)
    sampled = size if rows is None else size.index_select(0, rows)
    nonzero = sampled > 0
    zero = torch.zeros((), device=x.device)
    scale = zero if delayed_scale is None else delayed_scale
    held = torch.where(scale > 0, format.max / scale, torch.inf)
    clamped = size > torch.where(scale > 0, format.clamp_point / scale, torch.inf)
    other = float_format(_OTHER.get(format.name, format.name))

    # Blocks of one row need no other rows than the sampled ones.
    of_blocks = sampled if block[0] == 1 else size
    by_block = amax_to_scale(block_amax(of_blocks, block), format.max)
    by_block = spread_blocks(by_block, block, of_blocks.shape)
    if block[0] > 1 and rows is not None:
        by_block = by_block.index_select(0, rows)

    def flushed(scale: Tensor, format: FloatFormat) -> Tensor:
        return (nonzero & (sampled * scale <= format.underflow_point)).sum()

    values = (
        size.sum(dtype=wide_dtype(x.device)),
        torch.where(scale > 0, size.numel(), 0),
        clamped.sum(),
        torch.where(clamped, size - held, 0.0).sum(dtype=wide_dtype(x.device)),
        nonzero.sum(),
        torch.where(scale > 0, flushed(scale, format), 0),
        flushed(amax_to_scale(amax, format.max), format),
        flushed(amax_to_scale(row_amax(sampled), format.max), format),
        flushed(by_block, format),
        flushed(amax_to_scale(amax, other.max), other),
    )
    return torch.stack([wide(value) for value in values])


def what_if_shares(sums: Tensor) -> dict[str, Tensor]:
    """The same shares, had the operand been scaled otherwise.

    Args:
        sums: float64 [..., len(STATISTICS)].

    Returns:
        float64 [...] each, by "what_if_{scaling}_{share}"; NaN where nothing was measured.
    """
    column = dict(zip(COLUMN, sums.unbind(-1), strict=True))
    shares = {
        "delayed_clamped_fraction": ratio(column["delayed_clamped"], column["delayed_numel"]),
        "delayed_clamped_mass": ratio(column["delayed_excess"], column["size"]),
    }
    for scaling in ("delayed", "dynamic", "rowwise", "block", "other"):
        flushed = column[f"{scaling}_underflow"]
        shares[f"{scaling}_underflow_fraction"] = ratio(flushed, column["sampled_nonzero"])
    measured, has_history = column["size"] > 0, column["delayed_numel"] > 0
    return {
        f"what_if_{name}": torch.where(
            has_history if name.startswith("delayed") else measured, share, torch.nan
        )
        for name, share in shares.items()
    }
