"""The `scaling=` argument of the precision plugins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_fp.layers.format import FormatLike, LinearFormat, linear_format
from lightning_fp.numerics import DelayedScaling


@dataclass(frozen=True)
class DynamicScaling:
    """Scales taken from the tensor that is cast."""

    granularity: Literal["tensor", "row", "block"] = "tensor"
    """What shares one scale."""

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "row", "block"):
            raise ValueError(
                f"granularity must be 'tensor', 'row' or 'block', got {self.granularity!r}"
            )


ScalingLike: TypeAlias = "FormatLike | DynamicScaling | DelayedScaling"

_BY_GRANULARITY = {"tensor": "fp8-dynamic", "row": "fp8-rowwise", "block": "fp8-block"}

_SHORT = {
    "dynamic": "fp8-dynamic",
    "delayed": "fp8-delayed",
    "auto": "fp8-dynamic",  # where it begins
    "fp8-auto": "fp8-dynamic",
    "rowwise": "fp8-rowwise",
    "rowwise-gw-hp": "fp8-rowwise-gw-hp",
    "block": "fp8-block",
    "mx": "mxfp8",
}


def format_of_scaling(scaling: ScalingLike) -> LinearFormat:
    """The format of the layers that no rule names.

    Args:
        scaling: "dynamic", "delayed", "rowwise", "rowwise-gw-hp", the same with "fp8-" before
            it, any other format name, a `LinearFormat`, a `DynamicScaling`, a `DelayedScaling`,
            or a torchao config.

    Raises:
        ValueError: if there is no such scaling.
    """
    if isinstance(scaling, DelayedScaling):
        scaling = "fp8-delayed"
    elif isinstance(scaling, DynamicScaling):
        scaling = _BY_GRANULARITY[scaling.granularity]
    elif isinstance(scaling, str):
        scaling = _SHORT.get(scaling, scaling)
    try:
        return linear_format(scaling)
    except ValueError as error:
        raise ValueError(f"scaling: {error}") from error
