"""torchmetrics for low-precision training."""

from typing import TYPE_CHECKING

from lightning_fp._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fp.metrics.casts import SQNR, ClampedMass, ClampFraction, UnderflowFraction
    from lightning_fp.metrics.loss_spike import LossSpikeScore
    from lightning_fp.metrics.training_inference_mismatch import TrainingInferenceMismatch
else:
    __getattr__, __dir__ = lazy_names(__name__)

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
