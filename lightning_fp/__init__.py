"""Low-precision training for PyTorch Lightning that is safe to turn on."""

import importlib.metadata
from typing import TYPE_CHECKING

from lightning_fp._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fp.callbacks import (
        ClampMonitor,
        EvaluationGap,
        FP16Monitor,
        LossRecorder,
        MismatchMonitor,
        ParityProbe,
        PrecisionFallback,
        StabilityMonitor,
        StagedRollout,
    )
    from lightning_fp.layers import (
        ConversionReport,
        LinearFormat,
        PrecisionMap,
        convert,
        recommend_scaling,
        revert,
        unstore,
    )
    from lightning_fp.numerics import DelayedScaling
    from lightning_fp.plugins import (
        DynamicScaling,
        FP8Precision,
        FP16Precision,
        enable_precision_names,
        half_policy,
        precision_plugin,
    )
    from lightning_fp.recipes import Gate, RolloutRecipe, Stage
    from lightning_fp.stability import DivergenceDetector
    from lightning_fp.stability.loss_scaling import LossScaleError, LossScaling
    from lightning_fp.stability.respond.fallback_policy import FallbackPolicy
    from lightning_fp.stability.respond.limits import LayerLimit
else:
    __getattr__, __dir__ = lazy_names(__name__)

try:
    __version__ = importlib.metadata.version("lightning-fp")
except importlib.metadata.PackageNotFoundError:  # files that nobody has installed
    __version__ = "0+unknown"

__all__ = [
    # plugins
    "FP8Precision",
    "FP16Precision",
    "enable_precision_names",
    "precision_plugin",
    # callbacks
    "ClampMonitor",
    "EvaluationGap",
    "FP16Monitor",
    "LossRecorder",
    "MismatchMonitor",
    "ParityProbe",
    "PrecisionFallback",
    "StabilityMonitor",
    "StagedRollout",
    # objects
    "ConversionReport",
    "DelayedScaling",
    "DivergenceDetector",
    "DynamicScaling",
    "FallbackPolicy",
    "Gate",
    "LayerLimit",
    "LinearFormat",
    "LossScaleError",
    "LossScaling",
    "PrecisionMap",
    "RolloutRecipe",
    "Stage",
    # functions
    "convert",
    "half_policy",
    "recommend_scaling",
    "revert",
    "unstore",
]
