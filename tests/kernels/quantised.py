"""What each product of a layer should be: float64, of operands that numpy and ml_dtypes cast.

Nothing of the package's casts, products or kernels is in here; of scales only how they follow from
an amax, which `tests/numerics` holds against exact arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from lightning_fp.layers.format import LinearFormat
from lightning_fp.numerics import amax_to_e8m0, amax_to_scale
from tests.helper import UNIT

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None: all."""

TENSOR: Block = (None, None)
DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LIMITS = {"e4m3": 448.0, "e5m2": 57344.0}
ROUNDING = {torch.float32: UNIT, torch.bfloat16: 2.0**-8}
"""How far a value is from the nearest of a dtype, relatively."""


def rounded(
    x: Tensor, block: Block, scales: str = "any", number: str = "e4m3", scale: float | None = None
) -> Tensor:
    """A matrix cast block by block, the scales undone exactly.

    Args:
        x: [rows, columns].
        block: what shares a scale.
        scales: "any", "power_of_two" or "e8m0".
        number: the format that is cast to.
        scale: for all of it, instead of those that follow from the amax.

    Returns:
        float64, same shape.
    """
    values, limit = x.detach().float().numpy(), LIMITS[number]
    shape = values.shape
    rows, columns = block[0] or shape[0], block[1] or shape[1]
    whole = np.pad(values, ((0, -shape[0] % rows), (0, -shape[1] % columns)))
    blocks = whole.reshape(whole.shape[0] // rows, rows, whole.shape[1] // columns, columns)
    amax = torch.from_numpy(np.abs(blocks).max(axis=(1, 3), keepdims=True))
    factor = _scale(amax, limit, scales) if scale is None else np.float32(scale)
    cast = np.clip(blocks * factor, -limit, limit).astype(DTYPES[number])
    undone = cast.astype(np.float64) / factor.astype(np.float64)
    return torch.from_numpy(undone.reshape(whole.shape)[: shape[0], : shape[1]])


def _scale(amax: Tensor, limit: float, scales: str) -> np.ndarray:
    if scales == "e8m0":
        return amax_to_e8m0(amax, limit).numpy()
    return amax_to_scale(amax, limit, power_of_two=scales == "power_of_two").numpy()


@dataclass(frozen=True)
class Product:
    """One product of a layer."""

    a: Tensor
    """float64 [M, K]."""

    b: Tensor
    """float64 [K, N]."""

    @torch.no_grad()
    def excess(self, found: Tensor, dtype: torch.dtype, roundings: int) -> float:
        """How much of its bound an error takes; at most 1, if the product is right.

        The bound is that of a sum of K products in float32, in whatever order (Higham, Accuracy
        and Stability of Numerical Algorithms, 2002, 3.5). Scales that are undone before the sum or
        after it round each term a few times more.

        Args:
            found: [M, N].
            dtype: what it was rounded to on its way.
            roundings: how often.
        """
        exact, terms = self.a @ self.b, self.a.abs() @ self.b.abs()
        bound = (self.a.shape[1] + 6) * UNIT * terms
        grown = (1 + ROUNDING[dtype]) ** roundings
        bound = grown * bound + (grown - 1) * exact.abs()
        error = (found.double() - exact).abs()
        return float((error / (bound + 1e-30)).nan_to_num(nan=torch.inf).max())


@torch.no_grad()
def products(
    x: Tensor, w: Tensor, g: Tensor, format: LinearFormat, scales: list[float] | None = None
) -> list[Product]:
    """Output, gradient of the input, gradient of the weight.

    Args:
        x: [tokens, in_features].
        w: [out_features, in_features].
        g: [tokens, out_features], the output's gradient.
        format: the layer's.
        scales: of input, weight and grad_output under delayed scaling.
    """
    given = dict(zip((id(x), id(w), id(g)), scales or (None,) * 3, strict=True))
    numbers = {id(x): format.input, id(w): format.weight, id(g): format.grad_output}
    kind = "e8m0" if format.granularity == "mx" else "any"
    kind = "power_of_two" if format.power_of_two else kind

    def cast(each: Tensor, block: Block) -> Tensor:
        return rounded(each, block, kind, numbers[id(each)], given[id(each)])

    along = {"tensor": None, "row": None, "block": 128, "mx": 32}[format.granularity]
    if format.granularity == "tensor":
        rows, columns, weight, weight_again = (TENSOR,) * 4
    else:
        rows, columns = (1, along), (along, 1)
        square = format.granularity == "block"
        weight, weight_again = ((along, along),) * 2 if square else (rows, columns)
    high = format.grad_weight == "high"
    if high and format.granularity == "row":
        weight_again = TENSOR  # as torchao's rowwise_with_gw_hp has it
    of_weight = (g.double(), x.double()) if high else (cast(g, columns), cast(x, columns))
    return [
        Product(cast(x, rows), cast(w, weight).t()),
        Product(cast(g, rows), cast(w, weight_again)),
        Product(of_weight[0].t(), of_weight[1]),
    ]
