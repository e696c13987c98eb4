"""Reinforcement learning with two sides that round differently: weights that correct for it."""

from typing import TYPE_CHECKING

from lightning_fp._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fp.rl.causes import Cause, Causes, mismatch_causes
    from lightning_fp.rl.corrections import CORRECTIONS, Correction, correction
    from lightning_fp.rl.engine.export import Exported, export_model
    from lightning_fp.rl.engine.quantised import quantised_state_dict
    from lightning_fp.rl.importance_weights import (
        masked_importance_weights,
        truncated_importance_weights,
    )
    from lightning_fp.rl.log_ratios import Level, check_tokens
    from lightning_fp.rl.origin import SampleOrigin
    from lightning_fp.rl.reports import CorrectionReport
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    # weights
    "masked_importance_weights",
    "truncated_importance_weights",
    # corrections by name
    "CORRECTIONS",
    "Correction",
    "CorrectionReport",
    "correction",
    # causes
    "Cause",
    "Causes",
    "SampleOrigin",
    "mismatch_causes",
    # to the engine
    "Exported",
    "export_model",
    "quantised_state_dict",
    # what goes in
    "Level",
    "check_tokens",
]
