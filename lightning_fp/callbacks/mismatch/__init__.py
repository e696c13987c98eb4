"""Training against inference, in reinforcement learning."""

from lightning_fp.callbacks.mismatch.mismatch_monitor import MismatchMonitor

__all__ = ["MismatchMonitor"]
