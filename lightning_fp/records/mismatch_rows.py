"""How far training was from the rollout engine, step by step: `mismatch.csv`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from lightning_fp.records.step_rows import StepRows, read_step_rows

FILE = "mismatch.csv"
"""Name of the file inside of a run's directory."""

COLUMNS = (
    "step",
    "kl",
    "k3_kl",
    "reverse_k3_kl",
    "js_divergence",
    "chi2_token",
    "chi2_seq",
    "mult_prob_error",
    "training_ppl",
    "training_log_ppl",
    "rollout_ppl",
    "rollout_log_ppl",
    "log_ppl_diff",
    "log_ppl_abs_diff",
    "log_ppl_diff_max",
    "log_ppl_diff_min",
    "ppl_ratio",
    "rollout_is_mean",
    "rollout_is_std",
    "rollout_is_max",
    "rollout_is_min",
    "rollout_is_ratio_fraction_high",
    "rollout_is_ratio_fraction_low",
    "rollout_is_eff_sample_size",
    "rollout_is_abs_deviation",
    "tis_weight_max",
    "tis_weight_min",
    "tis_weight_mean",
    "tis_clip_fraction",
    "mis_weight_mean",
    "mis_mask_fraction",
    "seq_tis_weight_mean",
    "seq_tis_clip_fraction",
    "seq_mis_weight_mean",
    "seq_mis_mask_fraction",
    "rollout_probs_diff_max",
    "rollout_probs_diff_mean",
    "rollout_probs_diff_std",
    "rollout_actor_probs_pearson_corr",
    "extreme_disagreement",
    "logprob_abs_diff_mean",
    "logprob_abs_diff_max",
    "logprob_abs_diff_p50",
    "logprob_abs_diff_p99",
    "logprob_abs_diff_p99.9",
    "seq_logprob_abs_diff_mean",
    "seq_logprob_abs_diff_max",
    "tokens",
    "sequences",
    "nonfinite",
)
"""Its columns: the number of optimizer steps done, 1 after the first, and what
`TrainingInferenceMismatch` found in that step over micro-batches and ranks, before the step's
update; docs/training-inference-mismatch.md defines every name."""


class MismatchWriter:
    """Appends rows to `<run_dir>/mismatch.csv`, as `StepRows` does.

    Args:
        run_dir: the run's directory; made if it is not there.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._rows = StepRows(Path(run_dir) / FILE, COLUMNS)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row; it is in the file when this returns.

        Args:
            step: optimizer steps done, 1 after the first.
            values: of `TrainingInferenceMismatch.compute()`; those that are no column are left
                out.
        """
        self._rows.append([(step, *(values.get(name) for name in COLUMNS[1:]))])


def read_mismatch(run_dir: str | Path) -> pa.Table:
    """The training-inference mismatch of a run's steps.

    Args:
        run_dir: the directory that MismatchMonitor wrote to.

    Returns:
        A table with the columns of `COLUMNS`, null where a value was not a number; empty if there
        was no monitor. Where a resumed run has repeated a step, the later row counts.

    Raises:
        ValueError: if the file is not one of these.
    """
    return read_step_rows(Path(run_dir) / FILE, COLUMNS)
