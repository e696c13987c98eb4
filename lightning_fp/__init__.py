"""Low-precision training for PyTorch Lightning that is safe to turn on."""

from lightning_fp.callbacks import ClampMonitor, ParityProbe, PrecisionFallback
from lightning_fp.layers import (
    ConversionReport,
    LinearFormat,
    PrecisionMap,
    convert,
    recommend_scaling,
    revert,
)
from lightning_fp.numerics import DelayedScaling
from lightning_fp.plugins import DynamicScaling, FP8Precision, precision_plugin
from lightning_fp.stability import DivergenceDetector
from lightning_fp.stability.fallback import FallbackPolicy
from lightning_fp.stability.limits import LayerLimit

__version__ = "0.1.0.dev0"

__all__ = [
    # plugins
    "FP8Precision",
    "precision_plugin",
    # callbacks
    "ClampMonitor",
    "ParityProbe",
    "PrecisionFallback",
    # objects
    "ConversionReport",
    "DelayedScaling",
    "DivergenceDetector",
    "DynamicScaling",
    "FallbackPolicy",
    "LayerLimit",
    "LinearFormat",
    "PrecisionMap",
    # functions
    "convert",
    "recommend_scaling",
    "revert",
]
