"""The formulas of importance weights in 60 decimal digits, each written out naively."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

from torch import Tensor

Row = list[Decimal | None]


def exact_weights(
    rollout: Tensor,
    train: Tensor,
    mask: Tensor | None,
    level: str,
    *,
    low: float,
    high: float,
    truncates: bool,
) -> list[Row]:
    """Weights by row; None where there is none."""
    with localcontext() as context:
        context.prec = 60
        raw = raw_weights(rollout, train, mask, level)
        return [[w if w is None else bounded(w, low, high, truncates) for w in row] for row in raw]


def bounded(w: Decimal, low: float, high: float, truncates: bool) -> Decimal:
    bottom, top = Decimal(low), Decimal("Infinity") if high == math.inf else Decimal(high)
    if truncates:
        return max(bottom, min(top, w))
    return w if bottom <= w <= top else Decimal(0)


def raw_weights(rollout: Tensor, train: Tensor, mask: Tensor | None, level: str) -> list[Row]:
    counts = [[True] * train.shape[1]] * len(train) if mask is None else (mask != 0).tolist()
    return [_row(*row, level) for row in zip(rollout.tolist(), train.tolist(), counts, strict=True)]


def _row(q: list[float], p: list[float], counts: list[bool], level: str) -> Row:
    finite = [math.isfinite(a) and math.isfinite(b) for a, b in zip(p, q, strict=True)]
    r = [Decimal(a) - Decimal(b) if ok else None for a, b, ok in zip(p, q, finite, strict=True)]
    inside = [x for x, counted in zip(r, counts, strict=True) if counted]
    if level == "token":
        return [x.exp() if c and x is not None else None for x, c in zip(r, counts, strict=True)]
    known = [x for x in inside if x is not None]
    if not known or len(known) < len(inside):
        return [None] * len(r)
    total = sum(known, Decimal(0))
    weight = (total / len(known) if level == "geometric" else total).exp()
    return [weight if counted else None for counted in counts]
