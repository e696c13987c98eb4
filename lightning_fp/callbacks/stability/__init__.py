"""Signals of every step that may tell of a divergence before the loss does."""

from lightning_fp.callbacks.stability.stability_monitor import StabilityMonitor

__all__ = ["StabilityMonitor"]
