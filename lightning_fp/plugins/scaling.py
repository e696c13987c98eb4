"""The `scaling=` argument of the precision plugins."""

from __future__ import annotations

from typing import TypeAlias

from lightning_fp.layers.format import FormatLike, LinearFormat, linear_format

ScalingLike: TypeAlias = FormatLike

_SHORT = {
    "dynamic": "fp8-dynamic",
    "delayed": "fp8-delayed",
    "auto": "fp8-auto",
    "rowwise": "fp8-rowwise",
    "rowwise-gw-hp": "fp8-rowwise-gw-hp",
    "block": "fp8-block",
    "mx": "mxfp8",
}


def format_of_scaling(scaling: ScalingLike) -> LinearFormat:
    """The format of the layers that no rule names.

    Args:
        scaling: "dynamic", "rowwise", "rowwise-gw-hp", the same with "fp8-" before it, any other
            format name, a `LinearFormat`, a `DynamicScaling`, or a torchao config.

    Raises:
        ValueError: if there is no such scaling.
    """
    if isinstance(scaling, str):
        scaling = _SHORT.get(scaling, scaling)
    try:
        return linear_format(scaling)
    except ValueError as error:
        raise ValueError(f"scaling: {error}") from error
