"""How long one matrix product takes.

Three things keep a product from its peak, and each has one term: a short summed dimension, whose
ends are not overlapped with anything; tiles that do not fill all multiprocessors; and memory. The
first is what small FP8 products suffer from: their arithmetic is over in half the time, and the
ends are as long as before. So the gain of a product grows with K, from nothing to almost two.
"""

from __future__ import annotations

import math
from typing import Literal

from lightning_fp.kernels.cost.data_sheets import MEMORY_EFFICIENCY, DataSheet

Operands = Literal["bf16", "fp8", "fp8-row", "fp8-block"]
"""What is multiplied: with a scale per tensor in "fp8", per row or per block in the others."""

LAUNCH_SECONDS = 2e-6
"""The least that any kernel takes on the device: torchao's roofline, measured on H100."""

ROW_SHARE = 0.90
"""Speed of FP8 products with a scale per row, beside those with one per tensor: 0.90 to 1 for most
shapes on H100, with a long tail down to 0.5 (pytorch/pytorch#147971)."""

BLOCK_SHARE = 0.90
"""Likewise with a scale per block, of which torch's kernels are CUTLASS's: DeepGEMM's own are 1.0
to 1.2 times as fast (its first README), and as fast as cuBLAS with one scale."""

_TILE = 128
_ENDS: dict[bool, int] = {False: 350, True: 700}
"""Elements of K that the two ends of a product are worth, bf16 and FP8: from DeepGEMM's table (see
`FP8_EFFICIENCY`); in bf16 the same time, and so half the elements."""


def product_seconds(card: DataSheet, m: int, k: int, n: int, operands: Operands) -> float:
    """How long a product [m, k] by [k, n] takes, with a result of 16 bits.

    Args:
        card: where.
        m: rows of the first operand.
        k: what is summed over.
        n: columns of the second.
        operands: what is multiplied.

    Returns:
        Seconds on the device.
    """
    low = operands != "bf16"
    if low and card.fp8 is None:
        raise ValueError(f"operands must be 'bf16' on the {card.name}, got {operands!r}")
    peak = card.fp8 * card.fp8_efficiency if low and card.fp8 else card.bf16 * card.bf16_efficiency
    share = {"fp8-row": ROW_SHARE, "fp8-block": BLOCK_SHARE}.get(operands, 1.0)
    rate = peak * share * k / (k + _ENDS[low]) * _filled(card, m, k, n)
    traffic = product_bytes(m, k, n, operands) / (card.bandwidth * MEMORY_EFFICIENCY)
    return max(2 * m * k * n / rate, traffic, LAUNCH_SECONDS)


def product_bytes(m: int, k: int, n: int, operands: Operands) -> int:
    """Bytes that a product reads and writes, each operand once; see `product_seconds`."""
    return (m * k + k * n) * (2 if operands == "bf16" else 1) + 2 * m * n


def _filled(card: DataSheet, m: int, k: int, n: int) -> float:
    """Share of the multiprocessors that have a tile, over all waves of tiles.

    Products of few tiles are split along K, into parts that are still long.
    """
    tiles = math.ceil(m / _TILE) * math.ceil(n / _TILE)
    if tiles < card.multiprocessors:
        tiles *= max(1, min(card.multiprocessors // tiles, k // 1024))
    waves = math.ceil(tiles / card.multiprocessors)
    return tiles / (waves * card.multiprocessors)
