"""From a format's name to the plugin that trains in it."""

from __future__ import annotations

from typing import Any

from lightning_fp.argument_types import checked
from lightning_fp.layers.scaling import ScalingLike, read_scaling
from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.plugins.fp8 import FP8Precision
from lightning_fp.plugins.fp16 import FP16Precision


@checked
def precision_plugin(name: ScalingLike, **options: Any) -> LayerPrecision:
    """The precision plugin for a format.

    >>> precision_plugin("fp8-rowwise").precision
    'bf16-mixed'

    Args:
        name: any format name, e.g. "fp8-dynamic", "rowwise", "bf16", "fp16", "e8m3", or what else
            `FP8Precision` takes as `scaling`.
        options: passed on to the plugin.

    Raises:
        ValueError: if there is no such format.
    """
    format = read_scaling(name).format
    if format.is_high_precision and format.input == "fp32":
        options.setdefault("base", "32-true")
    if format.is_high_precision and format.input == "fp16":
        return FP16Precision(**options)
    return FP8Precision(name, **options)
