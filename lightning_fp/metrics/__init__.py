"""torchmetrics for low-precision training."""

from lightning_fp.metrics.casts import SQNR, ClampedMass, ClampFraction, UnderflowFraction
from lightning_fp.metrics.mismatch import TrainingInferenceMismatch

__all__ = ["SQNR", "ClampFraction", "ClampedMass", "UnderflowFraction", "TrainingInferenceMismatch"]
