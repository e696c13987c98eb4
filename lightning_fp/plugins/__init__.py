"""Precision plugins for the Lightning Trainer."""

from lightning_fp.layers.format import DynamicScaling
from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.plugins.fp8 import FP8Precision
from lightning_fp.plugins.fp16 import FP16Precision
from lightning_fp.plugins.names import precision_plugin
from lightning_fp.plugins.precision_names import enable_precision_names
from lightning_fp.stepping.half_checks import half_policy

__all__ = [
    "DynamicScaling",
    "FP8Precision",
    "FP16Precision",
    "LayerPrecision",
    "enable_precision_names",
    "half_policy",
    "precision_plugin",
]
