"""Callbacks for the Lightning Trainer."""

from lightning_fp.callbacks.clamp_monitor import ClampMonitor
from lightning_fp.callbacks.evaluation_gap import EvaluationGap
from lightning_fp.callbacks.fp16_monitor import FP16Monitor
from lightning_fp.callbacks.loss_recorder import LossRecorder
from lightning_fp.callbacks.mismatch_monitor import MismatchMonitor
from lightning_fp.callbacks.parity_probe import ParityProbe
from lightning_fp.callbacks.precision_fallback import PrecisionFallback
from lightning_fp.callbacks.staged_rollout import StagedRollout

__all__ = [
    "ClampMonitor",
    "EvaluationGap",
    "FP16Monitor",
    "LossRecorder",
    "MismatchMonitor",
    "ParityProbe",
    "PrecisionFallback",
    "StagedRollout",
]
