"""What a cast does to an operand.

Every statistic is a sum or a maximum, so that rows add up over calls, micro-batches, steps and
ranks; shares are formed at the end, from sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fp.format_names import Rounding
from lightning_fp.numerics.combining import COLUMN, STATISTICS, WHAT_IF, wide, wide_dtype
from lightning_fp.numerics.formats import FloatFormat
from lightning_fp.numerics.rounding import round_in_range
from lightning_fp.numerics.scaling import tensor_amax

_LARGEST = 1e16
"""Scaled magnitudes count as this at most, so that sums of squares stay within float32."""

_PIECE = 2**16
"""Elements that are summed in float32, which counts so many exactly."""

_TOGETHER = 8
"""Pieces that are looked at together on the CPU: two float32 buffers of so many, 4 MiB, fit into
its last cache, and fewer would be as many more calls."""


@dataclass(frozen=True)
class Casts:
    """Rows of an operand, and what a cast makes of them."""

    values: Tensor
    """float32 [rows, columns], as they are."""

    scale: Tensor
    """float32, scalar, [rows, 1] or one per value, never NaN: what all that follows is multiplied
    by."""

    scaled: Tensor
    """Same shape as `values`; at most 1e16, so that sums of squares stay within float32."""

    clamped: Tensor
    """To the range of the format."""

    cast: Tensor
    """Clamped and rounded; any value where `values` has NaN."""


def casts_of(
    x: Tensor,
    scale: Tensor,
    format: FloatFormat,
    rows: Tensor | None = None,
    rounding: Rounding = "nearest",
) -> Casts:
    """What a cast makes of some rows.

    Args:
        x: [rows, columns], high precision.
        scale: float32, scalar, [rows, 1] or [rows, columns]; NaN counts as 1.
        format: the format that `x * scale` is cast to.
        rows: int64 indices of the rows; None takes all.
        rounding: how the cast rounds.
    """
    scale = torch.nan_to_num(scale, nan=1.0)
    if rows is not None:
        x = x.index_select(0, rows)
        scale = scale.index_select(0, rows) if scale.numel() > 1 else scale
    values = x.detach().float()
    scaled = (values * scale).clamp_(-_LARGEST, _LARGEST)
    clamped = scaled.clamp(-format.max, format.max)
    return Casts(values, scale, scaled, clamped, round_in_range(clamped, format, rounding))


def operand_statistics(
    x: Tensor,
    scale: Tensor,
    format: FloatFormat,
    casts: Casts | None = None,
    what_if: Tensor | None = None,
    work: tuple[float, float] = (0, 0),
) -> Tensor:
    """Statistics of one cast.

    Args:
        x: [rows, columns], high precision.
        scale: float32, scalar, [rows, 1] or [rows, columns].
        format: the format that `x * scale` is cast to.
        casts: of the rows that SQNR is computed on; None takes all.
        what_if: what `what_if_statistics` returned for `x`, if it was asked.
        work: FLOPs of the layer and of its padding; counted with one of its operands.

    Returns:
        float64 [len(STATISTICS)].
    """
    if x.numel() == 0:
        return torch.zeros(len(STATISTICS), dtype=wide_dtype(x.device), device=x.device)
    casts = casts_of(x, scale, format) if casts is None else casts
    x, scale = x.detach(), torch.nan_to_num(scale, nan=1.0)
    if _reading_is_free(x):
        sums, amax = _in_cache(x, scale, format)
    else:
        sums, amax = _at_once(x, scale, format), None
    counted = [torch.full_like(sums[:1], flops) for flops in work]
    what_if = sums.new_zeros(len(WHAT_IF)) if what_if is None else what_if
    squares = _squares(casts, format, amax)
    return torch.cat([sums, squares, _scales(casts.scale), *counted, what_if])


def _reading_is_free(x: Tensor) -> bool:
    """Reading a flag is free on the CPU alone, and what is compiled can be one pass instead."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _at_once(x: Tensor, scale: Tensor, format: FloatFormat) -> Tensor:
    """The columns from "amax" to "underflow": sums by row alone, which a compiler makes one pass.

    Args:
        x: [rows, columns], not empty.
        scale: float32, scalar, [rows, 1] or [rows, columns], finite.
        format: as `operand_statistics`.

    Returns:
        float64 [8].
    """
    size = x.abs()
    finite = size <= torch.finfo(x.dtype).max
    size = torch.where(finite, size.float(), 0.0)
    scaled = (size * scale).clamp(max=_LARGEST)
    over = _over(scaled, format)
    rows = (
        _count(~finite),
        _count(scaled > 0),
        _count(over),
        _sums(torch.where(over, scaled - format.max, 0.0)),
        _sums(scaled),
        _count(scaled <= format.underflow_point),
    )
    nonfinite, nonzero, clamped, excess, magnitude, small = torch.cat(rows, dim=-1).sum(0).unbind()
    amax = wide(size.amax(dim=-1).amax())
    numel = torch.full_like(amax, x.numel())
    underflow = small - (numel - nonzero)
    return torch.stack([amax, nonfinite, numel, nonzero, clamped, excess, magnitude, underflow])


def _in_cache(x: Tensor, scale: Tensor, format: FloatFormat) -> tuple[Tensor, float | None]:
    """The same where each operation is a pass over memory: over pieces that fit into a cache.

    Most tensors have nothing to clamp and nothing that is not finite; others are left to
    `_at_once`.

    Returns:
        The columns, and the largest scaled magnitude if there is nothing to clamp.
    """
    length = _PIECE if scale.numel() == 1 else max(1, _PIECE // x.shape[1]) * x.shape[1]
    parts = _pieces(x, length)
    if scale.numel() == 1:
        scales = [scale.reshape(())] * len(parts)
    else:
        scales = _pieces(scale.expand_as(x), length)
    room = torch.empty(2, max(part.numel() for part in parts), dtype=torch.float32).unbind()
    amaxes: list[Tensor] = []
    sums: list[Tensor] = []
    for part, by in zip(parts, scales, strict=True):
        size, large = (buffer[: part.numel()].view_as(part) for buffer in room)
        amaxes.append(size.copy_(part).abs_().amax())
        size.mul_(by)
        amaxes.append(size.amax() if by.dim() else amaxes[-1] * by)  # rounding keeps the order
        sums.append(size.sum(1))
        # Masks of floats: their sums are vectorised, those of bools are not.
        sums.append(torch.gt(size, format.underflow_point, out=large).sum(1))
        sums.append(size.gt_(0).sum(1))
    amax, scaled_amax = torch.stack(amaxes).view(-1, 2).amax(0).tolist()
    if not math.isfinite(amax) or _over(scaled_amax, format):
        return _at_once(x, scale, format), None
    by_kind = torch.cat([*sums[0::3], *sums[1::3], *sums[2::3]]).view(3, -1)
    magnitude, left, nonzero = by_kind.double().sum(1).tolist()
    columns = [amax, 0, x.numel(), nonzero, 0, 0, magnitude, nonzero - left]
    return torch.tensor(columns, dtype=torch.float64), scaled_amax


def _pieces(x: Tensor, length: int) -> list[Tensor]:
    """Its values in their order: some [pieces, length] together, and [1, rest]."""
    flat = x.reshape(-1)
    whole = flat.numel() // length
    parts = list(flat[: whole * length].view(whole, length).split(_TOGETHER)) if whole else []
    rest = flat[whole * length :]
    return [*parts, rest.unsqueeze(0)] if rest.numel() else parts


def _squares(casts: Casts, format: FloatFormat, amax: float | None) -> Tensor:
    """The columns "signal", "noise" and "clamp_noise"; float64 [3].

    Args:
        casts: of the rows to look at.
        format: as `operand_statistics`.
        amax: the largest scaled magnitude in them or beside them; None: not known, or not finite.
    """
    errors = [casts.scaled, casts.cast - casts.scaled]
    if amax is None or amax > format.max:
        errors.append(casts.clamped - casts.scaled)
    if amax is None or amax >= _LARGEST:
        finite = torch.isfinite(casts.values)
        errors = [torch.where(finite, error, 0.0) for error in errors]
    scale = wide(casts.scale)
    if scale.dim() and scale.shape[1] > 1:
        sums = torch.stack([(error / scale).square().sum() for error in errors])
    else:
        # Squares are summed before the scale is undone: scaled values cannot under- or overflow.
        norms = [torch.linalg.vector_norm(error, dim=-1, keepdim=True) for error in errors]
        sums = ((wide(torch.cat(norms, dim=-1)) / scale) ** 2).sum(0)
    return F.pad(sums, (0, 3 - len(errors)))


def _scales(scale: Tensor) -> Tensor:
    """The columns "scales", "log_scale" and "log_scale_squared"; float64 [3].

    Args:
        scale: scalar, for which they are 0, [rows, 1], or [rows, columns]: of the latter one value
            in 32, the length of the smallest blocks.
    """
    if not scale.dim():
        return torch.zeros(3, dtype=wide_dtype(scale.device), device=scale.device)
    bits = wide(scale[:, ::32]).log2()
    count = torch.full((), bits.numel(), dtype=bits.dtype, device=scale.device)
    return torch.stack([count, bits.sum(), bits.square().sum()])


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
    exact = exact.float()
    errors = [exact, cast.float() - exact, clamped.float() - exact]
    nonfinite = torch.zeros(1, dtype=torch.int64, device=exact.device)
    if not _reading_is_free(exact) or not torch.isfinite(exact.sum()):
        finite = torch.isfinite(exact)
        nonfinite = (~finite).sum().reshape(1)
        errors = [torch.where(finite, error, 0.0) for error in errors]
    seen = tensor_amax(errors[0]).reshape(1), nonfinite, torch.full_like(nonfinite, exact.numel())
    squares = _sums(torch.stack(errors).square()).sum(1).reshape(-1)
    between, after = COLUMN["signal"] - len(seen), len(STATISTICS) - COLUMN["clamp_noise"] - 1
    return torch.cat([*map(wide, seen), F.pad(squares, (between, after))])


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
        these; sqnr_db and clamp_sqnr_db, inf where nothing is lost, NaN where nothing was seen;
        scale_spread_bits, the standard deviation of log2(scale) over rows or blocks, NaN where all
        share one; padding_fraction (of all FLOPs, NaN where they were not counted).
    """
    column = dict(zip(COLUMN, sums.unbind(-1), strict=True))
    return {
        "clamped_fraction": ratio(column["clamped"], column["numel"]),
        "clamped_mass": ratio(column["excess"], column["magnitude"]),
        "underflow_fraction": ratio(column["underflow"], column["nonzero"]),
        "sqnr_db": _decibel(column["signal"], column["noise"]),
        "clamp_sqnr_db": _decibel(column["signal"], column["clamp_noise"]),
        "scale_spread_bits": _deviation(
            column["scales"], column["log_scale"], column["log_scale_squared"]
        ),
        "padding_fraction": column["padding"] / (column["padding"] + column["flops"]),
    }


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """A share; 0 where there is no whole."""
    return torch.where(whole > 0, part / whole, 0.0)


def _decibel(signal: Tensor, noise: Tensor) -> Tensor:
    return torch.where(signal > 0, 10 * torch.log10(signal / noise), torch.nan)


def _deviation(count: Tensor, sum: Tensor, squares: Tensor) -> Tensor:
    """The standard deviation of values of which there are these sums; NaN where there are none."""
    variance = (squares / count - (sum / count).square()).clamp(min=0)
    return torch.where(count > 0, variance.sqrt(), torch.nan)


def _over(scaled: Tensor | float, format: FloatFormat) -> Any:
    """bool, which magnitudes the clamp changes more than rounding would."""
    point = format.clamp_point
    return scaled >= point if format.clamp_point_clamps else scaled > point


def _sums(x: Tensor) -> Tensor:
    """By row: float64 [rows, 1]; float32 within a row, which makes no float64 copy of `x`."""
    return wide(x.sum(dim=-1, keepdim=True))


def _count(mask: Tensor) -> Tensor:
    """By row: float64 [rows, 1]. Sums of floats are vectorised, those of bools are not."""
    if mask.shape[-1] >= 2**24:  # float32 counts no further
        return _sums(mask)
    return _sums(torch.where(mask, 1.0, 0.0))
