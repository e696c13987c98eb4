"""Passes over memory that the casts of a layer make, forward and backward, when compiled.

Counted, not estimated: `tests/kernels/cost/test_passes.py` compiles each kernel's hardware branch,
reads from Inductor's scheduler the bytes that its fused loops move, and solves for the bytes per
element of input, weight and grad_output. What Inductor does otherwise on a card is added by hand,
and said at the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Casting = Literal["tensor", "tensor-fused", "row", "row-gw-hp", "block", "mx"]
"""How operands of FP8 products are cast: with a scale per tensor; likewise by kernels that read
once and write both layouts; per row; per row with grad_weight in high precision; per block of 128;
per 32 values."""

COLUMNS_TWICE = 2
"""Bytes per element more than counted, for each cast along columns. A column of a bf16 operand is
as long as there are tokens and stays in no cache: on a card it is read for its amax, and again to
be cast. torchao's roofline has the same pass, as a transposed copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Bytes per element of bf16 operands, beside what the products read and write themselves."""

    input: float
    """Of [tokens, in_features]: the input, and the gradient that comes back."""

    weight: float
    """Of [out_features, in_features]."""

    grad_output: float
    """Of [tokens, out_features]."""

    weight_reads: int
    """How often the weight is read: a float32 weight costs two bytes more each time."""

    kernels: int
    """Kernels that are launched for it, beside the three products."""


PASSES: dict[Casting, Passes] = {
    "tensor": Passes(input=8, weight=8, grad_output=8, weight_reads=3, kernels=9),
    # One read, two layouts written, the amax on the way: Transformer Engine under delayed scaling.
    "tensor-fused": Passes(input=4, weight=4, grad_output=4, weight_reads=1, kernels=3),
    "row": Passes(
        input=10 + COLUMNS_TWICE,
        weight=10 + COLUMNS_TWICE,
        grad_output=6 + COLUMNS_TWICE,
        weight_reads=2,
        kernels=8,
    ),
    "row-gw-hp": Passes(input=7, weight=6, grad_output=3, weight_reads=2, kernels=5),
    # Each operand is read and cast twice, along its rows and along its columns: as torchao's
    # roofline has it for MX formats; blocks of 128 do the same.
    "block": Passes(input=6, weight=6, grad_output=6, weight_reads=2, kernels=6),
    "mx": Passes(input=6, weight=6, grad_output=6, weight_reads=2, kernels=6),
}
"""On FP8 tensor cores."""

EMULATED: dict[Casting, Passes] = {
    # Counted on a CPU, and with the pass over each product that a GPU's emulation makes.
    "tensor": Passes(input=10, weight=10, grad_output=12, weight_reads=2, kernels=9),
    "tensor-fused": Passes(input=10, weight=10, grad_output=12, weight_reads=2, kernels=9),
    "row": Passes(input=20, weight=22, grad_output=18, weight_reads=2, kernels=12),
    "row-gw-hp": Passes(input=20, weight=22, grad_output=18, weight_reads=2, kernels=12),
    "block": Passes(input=20, weight=14, grad_output=20, weight_reads=2, kernels=11),
    "mx": Passes(input=10.6, weight=10.6, grad_output=10.6, weight_reads=2, kernels=12),
}
"""Where the products are in bf16, on cards without a way to FP8 tensor cores."""
