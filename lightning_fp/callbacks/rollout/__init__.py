"""FP8 in stages: a recipe played over a run."""

from lightning_fp.callbacks.rollout.staged_rollout import StagedRollout

__all__ = ["StagedRollout"]
