"""What belongs to a run and not to one callback: directory, events, steps, board, settings."""

from lightning_fp.callbacks.run.loss_recorder import LossRecorder

__all__ = ["LossRecorder"]
