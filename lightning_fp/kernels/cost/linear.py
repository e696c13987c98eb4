"""What one linear layer costs forward and backward, in bf16 and with FP8 operands.

A prediction, of compiled code: three products and the passes of the casts, each against the card's
arithmetic or its memory, whichever takes longer. Never a gain for a layer smaller than those that
public tables show to gain: what keeps small layers back is only half understood (launches, caches,
heuristics of the libraries), and there a measurement counts for more than a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fp.kernels.cost.data_sheets import DATA_SHEETS, MEMORY_EFFICIENCY, DataSheet
from lightning_fp.kernels.cost.passes import EMULATED, PASSES, Casting
from lightning_fp.kernels.cost.products import (
    LAUNCH_SECONDS,
    Operands,
    product_bytes,
    product_seconds,
)

TOKENS = 8192
"""Tokens of a micro-batch where none are known: one sequence of Llama 3's length, which is also the
batch of torchao's and torchtitan's public figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearCost:
    """Of one layer, for one micro-batch."""

    seconds: float
    """On the device, forward and backward."""

    products: float
    """Seconds of that in the three products."""

    flops: int
    """Floating-point operations of the products."""

    bytes: float
    """Read and written, by products and casts."""


def linear_cost(
    card: DataSheet,
    casting: Casting | None,
    tokens: int,
    in_features: int,
    out_features: int,
    *,
    weight_bytes: int = 2,
    input_is_cast: bool = False,
    weight_is_cast: bool = False,
) -> LinearCost:
    """What a layer costs on a card, forward and backward.

    Args:
        card: where; without FP8 tensor cores the casts are emulated.
        casting: how its operands are cast; None: nn.Linear in bf16.
        tokens: product of the input's leading dimensions.
        in_features: columns of the weight.
        out_features: rows of the weight.
        weight_bytes: of a weight's element: 4 for float32 weights under autocast, else 2.
        input_is_cast: whether another layer of the same input has cast it already: compiled code
            casts it once.
        weight_is_cast: whether the weight arrives in FP8, as after an all-gather in FP8.
    """
    m, k, n = tokens, in_features, out_features
    shapes = ((m, k, n), (m, n, k), (n, m, k))
    kinds = _operands(card, casting)
    products = sum(product_seconds(card, *s, kind) for s, kind in zip(shapes, kinds, strict=True))
    moved = float(sum(product_bytes(*s, kind) for s, kind in zip(shapes, kinds, strict=True)))
    seconds = products
    bandwidth = card.bandwidth * MEMORY_EFFICIENCY
    if casting is None:
        # autocast makes a bf16 copy of a float32 weight, and a float32 one of its gradient
        copies = (weight_bytes - 2) * 6.0 * n * k
        moved += copies
        seconds += copies / bandwidth
    else:
        passes = (EMULATED if card.fp8 is None else PASSES)[casting]
        weight = passes.weight + passes.weight_reads * (weight_bytes - 2)
        cast = passes.grad_output * m * n
        cast += 0 if weight_is_cast else weight * n * k
        cast += 0 if input_is_cast else passes.input * m * k
        moved += cast
        seconds += max(cast / bandwidth, passes.kernels * LAUNCH_SECONDS)
    return LinearCost(seconds=seconds, products=products, flops=6 * m * k * n, bytes=moved)


def predicted_speedup(
    card: DataSheet,
    casting: Casting,
    tokens: int,
    in_features: int,
    out_features: int,
    *,
    weight_bytes: int = 2,
) -> float:
    """How much faster than in bf16 a layer is, by itself: forward and backward, compiled.

    Args:
        card: as `linear_cost`, as the others.
        casting: how its operands are cast.
        tokens: product of the input's leading dimensions.
        in_features: columns of the weight.
        out_features: rows of the weight.
        weight_bytes: of a weight's element.

    Returns:
        A factor; at most 1 for layers no larger than `smallest_that_gains`.
    """
    size = tokens, in_features, out_features
    high = linear_cost(card, None, *size, weight_bytes=weight_bytes)
    low = linear_cost(card, casting, *size, weight_bytes=weight_bytes)
    factor = high.seconds / low.seconds
    return factor if smallest_that_gains(casting, in_features, out_features) else min(factor, 1.0)


def smallest_that_gains(casting: Casting, in_features: int, out_features: int) -> bool:
    """Whether public tables show a gain for layers of this size, with any number of tokens.

    The bounds are those of torchao's tables of whole layers on H100, as its own filter reads them
    (torchao.float8, `_auto_filter_for_recipe`); layers below slowed whole models by 40%
    (pytorch/ao#2410). What has more scales than a row is held to the bounds of rows.
    """
    if casting in ("tensor", "tensor-fused"):
        return in_features > 4096 or out_features > 1024
    if out_features <= 2048 or in_features <= 1024:
        return False
    return out_features > 4096 or in_features > 2048


def gains(
    casting: Casting,
    in_features: int,
    out_features: int,
    *,
    card: DataSheet | None = None,
    tokens: int = TOKENS,
) -> bool:
    """Whether FP8 tensor cores are predicted to be faster than bf16 for a layer.

    Args:
        casting: how its operands are cast.
        in_features: columns of the weight.
        out_features: rows of the weight.
        card: where; H100 by default, for which most is known.
        tokens: of a micro-batch.
    """
    card = card or DATA_SHEETS["h100"]
    return predicted_speedup(card, casting, tokens, in_features, out_features) > 1


def _operands(card: DataSheet, casting: Casting | None) -> tuple[Operands, Operands, Operands]:
    """What the products of output, grad_input and grad_weight multiply."""
    if casting is None or card.fp8 is None:
        return "bf16", "bf16", "bf16"
    if casting == "row":
        # In backward torchao takes the product with one scale and scales its result: counted as
        # passes (torchao/float8/float8_ops.py, addmm_float8_unwrapped).
        return "fp8-row", "fp8", "fp8"
    if casting == "row-gw-hp":
        return "fp8-row", "fp8", "bf16"
    if casting == "block":
        return "fp8-block", "fp8-block", "fp8-block"
    return "fp8", "fp8", "fp8"
