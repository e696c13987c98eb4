"""What a cast does to an operand.

Every statistic is a sum or a maximum, so that rows add up over calls, micro-batches, steps and
ranks; shares are formed at the end, from sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_fp.numerics.casting import round_in_range
from lightning_fp.numerics.formats import FloatFormat, float_format
from lightning_fp.numerics.scaling import amax_to_scale, row_amax, tensor_amax


@dataclass(frozen=True)
class Statistic:
    """One column of a row of statistics."""

    name: str
    combine: Literal["max", "sum"]
    meaning: str


STATISTICS = (
    Statistic("amax", "max", "largest finite magnitude"),
    Statistic("nonfinite", "sum", "elements that are inf or NaN"),
    Statistic("numel", "sum", "elements"),
    Statistic("nonzero", "sum", "finite elements that are not zero"),
    Statistic("clamped", "sum", "finite elements that the clamp changed more than rounding would"),
    Statistic("excess", "sum", "sum of |scaled| beyond the format's max, over clamped elements"),
    Statistic("magnitude", "sum", "sum of |scaled|, over finite elements"),
    Statistic("underflow", "sum", "finite elements that are not zero and round to zero"),
    Statistic("signal", "sum", "sum of squares, over finite elements of the sampled rows"),
    Statistic("noise", "sum", "sum of squared cast errors, over the same elements"),
    Statistic("clamp_noise", "sum", "the same for clamping alone, without rounding"),
    Statistic("size", "sum", "what-if: sum of |x|, over finite elements"),
    Statistic("delayed_numel", "sum", "what-if: elements for which there was a delayed scale"),
    Statistic("delayed_clamped", "sum", "elements that delayed scaling would have clamped"),
    Statistic("delayed_excess", "sum", "sum of |x| beyond what delayed scaling can hold"),
    Statistic("sampled_nonzero", "sum", "what-if: finite non-zero elements of the sampled rows"),
    Statistic("delayed_underflow", "sum", "of these, flushed to zero by delayed scaling"),
    Statistic("dynamic_underflow", "sum", "of these, flushed to zero by dynamic scaling"),
    Statistic("rowwise_underflow", "sum", "of these, flushed to zero by a scale per row"),
    Statistic("other_underflow", "sum", "of these, flushed by e5m2 for e4m3 or the other way"),
)
"""The columns, in order. The first two are what is recorded at every step; from "size" on they are
what other scalings would have done to the same tensors, 0 where that was not asked for."""

WHAT_IF = STATISTICS[[statistic.name for statistic in STATISTICS].index("size") :]
"""The columns of `what_if_statistics`."""

COLUMN = {statistic.name: index for index, statistic in enumerate(STATISTICS)}
"""Index of each column by name."""

_LARGEST = 1e16
"""Scaled magnitudes count as this at most, so that sums of squares stay within float32."""


def operand_statistics(
    x: Tensor,
    scale: Tensor,
    format: FloatFormat,
    rows: Tensor | None = None,
    what_if: Tensor | None = None,
) -> Tensor:
    """Statistics of one cast.

    Args:
        x: [rows, columns], high precision.
        scale: float32, scalar or [rows, 1].
        format: the format that `x * scale` is cast to.
        rows: int64 indices of the rows that SQNR is computed on; None takes all.
        what_if: what `what_if_statistics` returned for `x`, if it was asked.

    Returns:
        float64 [len(STATISTICS)].
    """
    amax, nonfinite = tensor_amax(x), torch.zeros((), device=x.device)
    x, scale = x.detach().float(), torch.nan_to_num(scale, nan=1.0)
    if not _surely(torch.isfinite(amax)):
        finite = torch.isfinite(x)
        x = torch.where(finite, x, 0.0)
        amax, nonfinite = tensor_amax(x), x.numel() - torch.count_nonzero(finite)
    fits = x.numel() == 0 or _surely(amax * scale.amax() <= format.max)
    size = x.abs().mul_(scale)
    if not fits:
        size = size.clamp_(max=_LARGEST)
    nonzero = torch.count_nonzero(size)
    clamped = excess = torch.zeros((), device=x.device)
    if not fits:
        point = format.clamp_point
        over = size >= point if format.clamp_point_clamps else size > point
        clamped = torch.count_nonzero(over)
        excess = _sums(torch.where(over, size - format.max, 0.0)).sum()
    row = [
        amax,
        nonfinite,
        torch.full((), x.numel(), device=x.device),
        nonzero,
        clamped,
        excess,
        _sums(size).sum(),
        # A mask of floats: on the CPU twice as fast as one of bools.
        nonzero - _sums(size.clone().gt_(format.underflow_point)).sum(),
    ]
    if rows is not None:
        x = x.index_select(0, rows)
        scale = scale.index_select(0, rows) if scale.numel() > 1 else scale
    # Squares are summed before the scale is undone: scaled values cannot under- or overflow.
    unscale = scale.double().square().reciprocal()
    scaled = (x * scale).clamp(-_LARGEST, _LARGEST)
    inside = scaled if fits else scaled.clamp(-format.max, format.max)
    errors = (scaled, round_in_range(inside, format) - scaled, inside - scaled)
    row += [(_sums(error.square()) * unscale).sum() for error in errors]
    sums = torch.stack([value.double() for value in row])
    return torch.cat([sums, sums.new_zeros(len(WHAT_IF)) if what_if is None else what_if])


_OTHER = {"e4m3": "e5m2", "e5m2": "e4m3", "e4m3fnuz": "e5m2fnuz", "e5m2fnuz": "e4m3fnuz"}


def what_if_statistics(
    x: Tensor, format: FloatFormat, delayed_scale: Tensor | None, rows: Tensor | None = None
) -> Tensor:
    """What other scalings would have done to an operand.

    Dynamic and per-row scales cannot clamp, so only delayed scaling's clamping is counted.

    Args:
        x: [rows, columns], high precision.
        format: the 8-bit format of the operand.
        delayed_scale: float32 scalar from the layer's history; None or 0 if there is none.
        rows: int64 indices of the rows that underflow is counted on; None takes all.

    Returns:
        float64 [len(WHAT_IF)].
    """
    x = x.detach().float()
    size = torch.where(torch.isfinite(x), x, 0.0).abs()
    amax = _amax(size)
    sampled = size if rows is None else size.index_select(0, rows)
    nonzero = sampled > 0
    zero = torch.zeros((), device=x.device)
    scale = zero if delayed_scale is None else delayed_scale
    held = torch.where(scale > 0, format.max / scale, torch.inf)
    clamped = size > torch.where(scale > 0, format.clamp_point / scale, torch.inf)
    other = float_format(_OTHER.get(format.name, format.name))

    def flushed(scale: Tensor, format: FloatFormat) -> Tensor:
        return (nonzero & (sampled * scale <= format.underflow_point)).sum()

    values = (
        size.sum(dtype=torch.float64),
        torch.where(scale > 0, size.numel(), 0),
        clamped.sum(),
        torch.where(clamped, size - held, 0.0).sum(dtype=torch.float64),
        nonzero.sum(),
        torch.where(scale > 0, flushed(scale, format), 0),
        flushed(amax_to_scale(amax, format.max), format),
        flushed(amax_to_scale(row_amax(sampled), format.max), format),
        flushed(amax_to_scale(amax, other.max), other),
    )
    return torch.stack([value.double() for value in values])


def output_statistics(exact: Tensor, clamped: Tensor, cast: Tensor) -> Tensor:
    """Error of a layer's output, split into what clamping and what rounding did.

    Args:
        exact: [rows, out_features], the product of the operands as they are.
        clamped: the product of the operands clamped but not rounded.
        cast: the product of the operands as cast.

    Returns:
        float64 [len(STATISTICS)]; only amax, nonfinite, numel, signal, noise and clamp_noise
        are filled.
    """
    row = torch.zeros(len(STATISTICS), dtype=torch.float64, device=exact.device)
    exact = exact.float()
    finite = torch.isfinite(exact)
    exact = torch.where(finite, exact, 0.0)
    values = {
        "amax": _amax(exact),
        "nonfinite": (~finite).sum(),
        "numel": torch.full((), exact.numel(), device=exact.device),
        "signal": _sums(exact.square()).sum(),
        "noise": _sums(torch.where(finite, cast.float() - exact, 0.0).square()).sum(),
        "clamp_noise": _sums(torch.where(finite, clamped.float() - exact, 0.0).square()).sum(),
    }
    index = torch.tensor([COLUMN[name] for name in values], device=exact.device)
    return row.index_copy(0, index, torch.stack([value.double() for value in values.values()]))


def sampled_rows(count: int, stride: int, offset: Tensor) -> Tensor:
    """Indices of every `stride`-th row.

    Args:
        count: number of rows.
        stride: distance between sampled rows.
        offset: int64 scalar, where to begin; a tensor, so that a rotating offset does not
            recompile.

    Returns:
        int64 [ceil(count / stride)], all within `count`.
    """
    steps = torch.arange(0, count, stride, device=offset.device)
    return (steps + offset % stride) % count


def shares(sums: Tensor) -> dict[str, Tensor]:
    """The shares that users read, from sums.

    Args:
        sums: float64 [..., len(STATISTICS)].

    Returns:
        float64 [...] each: clamped_fraction (of all elements), clamped_mass (of the finite
        magnitude) and underflow_fraction (of non-zero elements), 0 where there are none of
        these; sqnr_db and clamp_sqnr_db, inf where nothing is lost, NaN where nothing was seen.
    """
    column = dict(zip(COLUMN, sums.unbind(-1), strict=True))
    return {
        "clamped_fraction": _ratio(column["clamped"], column["numel"]),
        "clamped_mass": _ratio(column["excess"], column["magnitude"]),
        "underflow_fraction": _ratio(column["underflow"], column["nonzero"]),
        "sqnr_db": _decibel(column["signal"], column["noise"]),
        "clamp_sqnr_db": _decibel(column["signal"], column["clamp_noise"]),
    }


def what_if_shares(sums: Tensor) -> dict[str, Tensor]:
    """The same shares, had the operand been scaled otherwise.

    Args:
        sums: float64 [..., len(STATISTICS)].

    Returns:
        float64 [...] each, by "what_if_{scaling}_{share}"; NaN where nothing was measured.
    """
    column = dict(zip(COLUMN, sums.unbind(-1), strict=True))
    shares = {
        "delayed_clamped_fraction": _ratio(column["delayed_clamped"], column["delayed_numel"]),
        "delayed_clamped_mass": _ratio(column["delayed_excess"], column["size"]),
    }
    for scaling in ("delayed", "dynamic", "rowwise", "other"):
        flushed = column[f"{scaling}_underflow"]
        shares[f"{scaling}_underflow_fraction"] = _ratio(flushed, column["sampled_nonzero"])
    measured, has_history = column["size"] > 0, column["delayed_numel"] > 0
    return {
        f"what_if_{name}": torch.where(
            has_history if name.startswith("delayed") else measured, share, torch.nan
        )
        for name, share in shares.items()
    }


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0.0)


def _decibel(signal: Tensor, noise: Tensor) -> Tensor:
    return torch.where(signal > 0, 10 * torch.log10(signal / noise), torch.nan)


def _amax(x: Tensor) -> Tensor:
    return x.abs().amax() if x.numel() else x.new_zeros(())


def _sums(x: Tensor) -> Tensor:
    """By row: float64 [rows, 1]; float32 within a row, which makes no float64 copy of `x`."""
    return x.sum(dim=-1, keepdim=True).double()


def _surely(condition: Tensor) -> bool:
    """Whether it holds, where that can be read without waiting for a device; else False.

    Most tensors have nothing to clamp and nothing that is not finite: on the CPU that saves more
    than half of the passes.
    """
    return not torch.compiler.is_compiling() and condition.device.type == "cpu" and bool(condition)
