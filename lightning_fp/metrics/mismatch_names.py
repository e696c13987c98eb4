"""What other RL frameworks call the quantities of `TrainingInferenceMismatch`."""

from __future__ import annotations

from typing import Literal

Aliases = Literal["verl", "trl", "nemo-rl", "slime"]

ALIASES: dict[Aliases, dict[str, str]] = {
    # `rollout_corr/` and `training/` less their prefix: the names used here
    "verl": {},
    # GRPOTrainer with vLLM, token-level truncation
    "trl": {
        "sampling/sampling_logp_difference/mean": "logprob_abs_diff_mean",
        "sampling/sampling_logp_difference/max": "logprob_abs_diff_max",
        "sampling/importance_sampling_ratio/min": "tis_weight_min",
        "sampling/importance_sampling_ratio/mean": "tis_weight_mean",
        "sampling/importance_sampling_ratio/max": "tis_weight_max",
    },
    # ClippedPGLossFn; a token_mult_prob_error above 1.05 is to be looked into, says its guide
    "nemo-rl": {
        "token_mult_prob_error": "mult_prob_error",
        "gen_kl_error": "k3_kl",
        "policy_kl_error": "reverse_k3_kl",
        "js_divergence_error": "js_divergence",
        "sampling_importance_ratio": "rollout_is_mean",
    },
    # vanilla_tis_function with tis_clip = threshold, tis_clip_low = 0; over tokens, where slime's
    # default is the mean over samples of their means
    "slime": {
        "train_rollout_logprob_abs_diff": "logprob_abs_diff_mean",
        "tis": "rollout_is_mean",
        "tis_abs": "rollout_is_abs_deviation",
        "tis_clipfrac": "tis_clip_fraction",
    },
}
"""By framework: its name, and the name here."""
