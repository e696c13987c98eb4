"""Rollout recipes: in which formats a run begins, how it comes to others, what may stop it."""

from typing import TYPE_CHECKING

from lightning_fp._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fp.recipes.builtin import (
        aggressive,
        balanced,
        bf16_cooldown,
        conservative,
        delayed_after_dynamic,
        first_last_bf16,
        fp16_rl,
        get,
        names,
        read,
    )
    from lightning_fp.recipes.format_evidence import FormatEvidence, check_evidence
    from lightning_fp.recipes.gate import Gate
    from lightning_fp.recipes.recipe import RolloutRecipe
    from lightning_fp.recipes.remarks import never_low, remarks_on, used_formats
    from lightning_fp.recipes.rollout import Rollout, RolloutDecision, RolloutSignals, RolloutState
    from lightning_fp.recipes.schema import json_schema
    from lightning_fp.recipes.stage import Stage
    from lightning_fp.recipes.stage_formats import StageFormats, formats_by_stage
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    # recipes
    "FormatEvidence",
    "Gate",
    "RolloutRecipe",
    "Stage",
    "json_schema",
    # built in
    "aggressive",
    "balanced",
    "bf16_cooldown",
    "conservative",
    "delayed_after_dynamic",
    "first_last_bf16",
    "fp16_rl",
    "get",
    "names",
    "read",
    # carrying them out
    "Rollout",
    "RolloutDecision",
    "RolloutSignals",
    "RolloutState",
    "StageFormats",
    "check_evidence",
    "formats_by_stage",
    "never_low",
    "remarks_on",
    "used_formats",
]
