"""torchmetrics for low-precision training."""

from lightning_fp.metrics.casts import SQNR, ClampedMass, ClampFraction, UnderflowFraction

__all__ = ["SQNR", "ClampFraction", "ClampedMass", "UnderflowFraction"]
