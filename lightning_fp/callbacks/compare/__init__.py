"""The same batch, or the same evaluation, in the run's formats and in high precision."""

from lightning_fp.callbacks.compare.evaluation_gap import EvaluationGap
from lightning_fp.callbacks.compare.parity_probe import ParityProbe

__all__ = ["EvaluationGap", "ParityProbe"]
