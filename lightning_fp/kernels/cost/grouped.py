"""What the experts of a mixture cost forward and backward, in bf16 and with FP8 operands.

A prediction, like that of one linear layer: the same products and casts, of groups of rows that
each meet a matrix of their own. Every expert is taken to see as many tokens as the others.
"""

from __future__ import annotations

import math

from lightning_fp.kernels.cost.data_sheets import MEMORY_EFFICIENCY, DataSheet
from lightning_fp.kernels.cost.linear import LinearCost, linear_cost, smallest_that_gains
from lightning_fp.kernels.cost.passes import EMULATED, PASSES, Casting
from lightning_fp.kernels.cost.products import LAUNCH_SECONDS, Operands, product_seconds

GROUPED_SHARE = 0.70
"""Speed of a grouped product beside a single one of as many rows, bf16 and FP8 alike. On an H100
8192 rows of 16 experts, 5120 by 8192, take 1.31 ms in bf16 and 0.885 ms with FP8 scales per row
(pytorch/ao#2490): 0.71 and 0.70 of what a single product is predicted to reach."""

FEWEST_ROWS = 512
"""Tokens of an expert below which no public table shows a gain: the fewest of those that do are
8192 rows over 16 experts (pytorch/ao#2490)."""

GROUPED: dict[Casting, Operands] = {"row": "fp8-row", "mx": "fp8"}
"""The castings that torch has a grouped product for; others multiply one expert after the other."""

_TILE = 128


def grouped_cost(
    card: DataSheet,
    casting: Casting | None,
    rows: int,
    experts: int,
    in_features: int,
    out_features: int,
    *,
    weight_bytes: int = 2,
) -> LinearCost:
    """What one matrix per expert costs on a card, forward and backward.

    Args:
        card: where.
        casting: how operands are cast; None: bf16.
        rows: of tokens, over all experts.
        experts: how many share the rows.
        in_features: of each.
        out_features: likewise.
        weight_bytes: of a weight's element.

    Returns:
        Never less in FP8 than in bf16 where no grouped product takes the casts: the host then
        waits for each expert's number of tokens.
    """
    each, size = max(math.ceil(rows / experts), 1), (in_features, out_features)
    flops = 6 * rows * in_features * out_features
    takes = casting is not None and casting in GROUPED and card.multiplies_groups(casting)
    if casting is not None and not takes and card.fp8 is not None:
        high = grouped_cost(card, None, rows, experts, *size, weight_bytes=weight_bytes)
        one = linear_cost(card, casting, each, *size, weight_bytes=weight_bytes)
        return LinearCost(
            seconds=max(experts * one.seconds, high.seconds),
            products=experts * one.products,
            flops=flops,
            bytes=experts * one.bytes,
        )
    k, n = size
    low: Operands = GROUPED[casting] if takes and casting is not None else "bf16"
    whole = experts * math.ceil(each / _TILE) * _TILE
    shapes = ((whole, k, n), (whole, n, k), (experts * n, each, k))
    moved = 2.0 * (rows * (k + n) * 3 + experts * k * n * 3) * (0.75 if low != "bf16" else 1.0)
    products = sum(product_seconds(card, *shape, low) for shape in shapes) / GROUPED_SHARE
    bandwidth = card.bandwidth * MEMORY_EFFICIENCY
    seconds = products = max(products, moved / bandwidth)
    if casting is None:
        copies = (weight_bytes - 2) * 6.0 * experts * n * k
        return LinearCost(
            seconds=seconds + copies / bandwidth,
            products=products,
            flops=flops,
            bytes=moved + copies,
        )
    passes = (EMULATED if card.fp8 is None else PASSES)[casting]
    cast = (passes.weight + passes.weight_reads * (weight_bytes - 2)) * experts * n * k
    cast += (passes.input * k + passes.grad_output * n) * rows
    seconds += max(cast / bandwidth, passes.kernels * LAUNCH_SECONDS)
    return LinearCost(seconds=seconds, products=products, flops=flops, bytes=moved + cast)


def predicted_grouped_speedup(
    card: DataSheet,
    casting: Casting,
    rows: int,
    experts: int,
    in_features: int,
    out_features: int,
    *,
    weight_bytes: int = 2,
) -> float:
    """How much faster than in bf16 the experts are, by themselves.

    Args:
        card: as `grouped_cost`, as the others.
        casting: how operands are cast.
        rows: of tokens, over all experts.
        experts: how many share the rows.
        in_features: of each.
        out_features: likewise.
        weight_bytes: of a weight's element.

    Returns:
        A factor; at most 1 for matrices, or numbers of tokens, below those of public tables.
    """
    size = rows, experts, in_features, out_features
    high = grouped_cost(card, None, *size, weight_bytes=weight_bytes)
    low = grouped_cost(card, casting, *size, weight_bytes=weight_bytes)
    factor = high.seconds / low.seconds
    shown = smallest_that_gains(casting, in_features, out_features)
    return factor if shown and rows >= FEWEST_ROWS * experts else min(factor, 1.0)
