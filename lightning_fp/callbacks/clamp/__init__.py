"""What the casts of a step did to the numbers, layer by layer."""

from lightning_fp.callbacks.clamp.clamp_monitor import ClampMonitor

__all__ = ["ClampMonitor"]
