"""Callbacks for the Lightning Trainer."""

from lightning_fp.callbacks.clamp import ClampMonitor
from lightning_fp.callbacks.compare import EvaluationGap, ParityProbe
from lightning_fp.callbacks.fallback import FP16Monitor, PrecisionFallback
from lightning_fp.callbacks.mismatch import MismatchMonitor
from lightning_fp.callbacks.rollout import StagedRollout
from lightning_fp.callbacks.run import LossRecorder
from lightning_fp.callbacks.stability import StabilityMonitor

__all__ = [
    "ClampMonitor",
    "EvaluationGap",
    "FP16Monitor",
    "LossRecorder",
    "MismatchMonitor",
    "ParityProbe",
    "PrecisionFallback",
    "StabilityMonitor",
    "StagedRollout",
]
