"""Callbacks for the Lightning Trainer."""

from lightning_fp.callbacks.clamp_monitor import ClampMonitor
from lightning_fp.callbacks.parity_probe import ParityProbe
from lightning_fp.callbacks.precision_fallback import PrecisionFallback

__all__ = ["ClampMonitor", "ParityProbe", "PrecisionFallback"]
