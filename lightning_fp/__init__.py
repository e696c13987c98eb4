"""Low-precision training for PyTorch Lightning that is safe to turn on."""

from lightning_fp.layers import (
    ConversionReport,
    LinearFormat,
    PrecisionMap,
    convert,
    revert,
)
from lightning_fp.plugins import FP8Precision, precision_plugin

__version__ = "0.1.0.dev0"

__all__ = [
    # plugins
    "FP8Precision",
    "precision_plugin",
    # objects
    "ConversionReport",
    "LinearFormat",
    "PrecisionMap",
    # functions
    "convert",
    "revert",
]
