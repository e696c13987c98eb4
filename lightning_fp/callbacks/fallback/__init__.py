"""Noticing that precision harms a run, proving it, and saving the run."""

from lightning_fp.callbacks.fallback.fp16_monitor import FP16Monitor
from lightning_fp.callbacks.fallback.precision_fallback import PrecisionFallback

__all__ = ["FP16Monitor", "PrecisionFallback"]
