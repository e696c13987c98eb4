"""The FP8 cast of a weight that a training step multiplies with, as codes and a scale.

The same arithmetic as the kernels', operation by operation, so that codes and scales are theirs bit
for bit. Only forward products count: an engine has no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_fp.kernels.block import BLOCK
from lightning_fp.layers import LinearFormat
from lightning_fp.numerics import (
    amax_to_scale,
    block_amax,
    float_format,
    row_amax,
    scaled_cast,
    spread_blocks,
    tensor_amax,
    through_bf16,
    times_blocks,
)

Scaled = Literal["tensor", "row", "block"]
"""What shares a scale: the weight, each of its rows, or each block of 128x128."""

SQUARE = BLOCK, BLOCK


@dataclass(frozen=True, kw_only=True)
class WeightCast:
    """A weight in FP8."""

    tensor: Tensor
    """FP8 [out_features, in_features]."""

    scale: Tensor
    """float32, what a code is multiplied by to be a value again: a scalar; [out_features, 1]; or
    [row blocks, column blocks]. NaN where the weight is not finite."""

    scaled: Scaled

    def dequantised(self) -> Tensor:
        """The values that it stands for, float32 [out_features, in_features]."""
        if self.scaled == "block":
            return times_blocks(self.tensor.float(), self.scale, SQUARE)
        return self.tensor.float() * self.scale

    def in_blocks(self) -> WeightCast:
        """The same values with a scale for each block of 128x128, equal ones.

        Raises:
            ValueError: if it has a scale for each row.
        """
        if self.scaled == "row":
            raise ValueError("scaled must be 'tensor' or 'block', got 'row'")
        if self.scaled == "block":
            return self
        grid = [-(-size // BLOCK) for size in self.tensor.shape]
        scale = self.scale.expand(grid).contiguous()
        return WeightCast(tensor=self.tensor, scale=scale, scaled="block")


def scaled_by(format: LinearFormat) -> Scaled | None:
    """What shares a scale of the weight in a format; None if no single scale is the weight's."""
    if not format.is_fp8 or float_format(format.weight).bits != 8 or format.recipe is not None:
        return None
    if format.granularity in ("tensor", "row", "block"):
        return format.granularity  # pyright: ignore[reportReturnType]
    return None


def why_none(format: LinearFormat) -> str:
    """Why a format's weights have no cast that a checkpoint could hold."""
    if format.scaling == "none":
        return "it is simulated, without scales"
    if format.recipe is not None:
        return "Transformer Engine casts the weight by a recipe of its own"
    return "its scales are those of blocks of 32 or 16 values, along one dimension at a time"


@torch.no_grad()
def weight_cast(
    weight: Tensor, format: LinearFormat, delayed_scale: Tensor | None = None
) -> WeightCast:
    """Cast a weight as the forward product of a layer does.

    Args:
        weight: [out_features, in_features], float32, bf16 or fp16.
        format: the layer's, one that `scaled_by` has an answer for.
        delayed_scale: float32 scalar, what delayed scaling multiplies the weight by; 0 or None: the
            weight's own, as of a layer without a history.

    Raises:
        ValueError: for another format.
    """
    scaled = scaled_by(format)
    if scaled is None:
        raise ValueError(f"format {format.name!r} has no cast of the weight: {why_none(format)}")
    number = float_format(format.weight)
    dtype = number.dtype or torch.float8_e4m3fn  # all formats of 8 bits have one
    source = through_bf16(weight) if format.quantise_like == "bf16-export" else weight
    if scaled == "block":
        amax = block_amax(source, SQUARE)
    else:
        amax = row_amax(source) if scaled == "row" else tensor_amax(source)
    scale = amax_to_scale(amax, number.max, power_of_two=format.power_of_two)
    if format.scaling == "delayed" and delayed_scale is not None:
        given = delayed_scale.to(scale.device)
        scale = torch.where(given > 0, given, scale)
    factors = spread_blocks(scale, SQUARE, source.shape) if scaled == "block" else scale
    cast = scaled_cast(source, factors, dtype)
    undone = torch.where(amax.isfinite(), scale.reciprocal(), torch.nan)
    return WeightCast(tensor=cast, scale=undone, scaled=scaled)
