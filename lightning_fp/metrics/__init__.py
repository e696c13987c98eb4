"""torchmetrics for low-precision training."""

from lightning_fp.metrics.casts import SQNR, ClampedMass, ClampFraction, UnderflowFraction
from lightning_fp.metrics.loss_spike import LossSpikeScore
from lightning_fp.metrics.training_inference_mismatch import TrainingInferenceMismatch

__all__ = [
    # casts
    "SQNR",
    "ClampFraction",
    "ClampedMass",
    "UnderflowFraction",
    # runs
    "LossSpikeScore",
    "TrainingInferenceMismatch",
]
