"""Precision plugins for the Lightning Trainer."""

from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.plugins.fp8 import FP8Precision
from lightning_fp.plugins.names import precision_plugin
from lightning_fp.plugins.scaling import DynamicScaling

__all__ = ["DynamicScaling", "FP8Precision", "LayerPrecision", "precision_plugin"]
