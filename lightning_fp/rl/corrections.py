"""Corrections by name: the bounds on importance weights that frameworks ship with.

Sources as of 2026, each the framework's own code; names are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.choices import check_choice, unknown
from lightning_fp.rl.importance_weights import (
    masked_importance_weights,
    truncated_importance_weights,
)
from lightning_fp.rl.log_ratios import Level, log_ratios
from lightning_fp.rl.reports import CorrectionReport, report_of

Kind = Literal["truncated", "masked"]


@checked
@dataclass(frozen=True, kw_only=True)
class Correction:
    """Bounds on importance weights, and what becomes of those beyond.

    >>> import torch
    >>> rollout, train = torch.tensor([[-1.0, -4.0]]), torch.tensor([[-1.0, -1.0]])
    >>> correction("verl").weights(rollout, train)
    tensor([[1., 2.]])
    >>> correction("icepop").weights(rollout, train)
    tensor([[1., 0.]])

    Raises:
        ValueError: for bounds out of order, or an unknown kind or level.
    """

    kind: Kind
    """"truncated" brings weights beyond a bound to it, "masked" to 0."""

    high: float = math.inf
    """The largest weight; inf: open, where the kind is "masked"."""

    low: float = 0.0
    """The smallest weight; 0: open."""

    level: Level = "token"
    """What shares a weight."""

    source: str = ""
    """Where the bounds are from."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))
        check_choice("level", self.level, get_args(Level))
        ends = self.high < math.inf or self.kind == "masked"
        if not 0 <= self.low <= self.high or not self.high > 0 or not ends:
            raise ValueError(
                "low and high must be 0 <= low <= high, high above 0, and finite to truncate by,"
                f" got low={self.low} and high={self.high}"
            )

    @property
    def words(self) -> str:
        """Kind, level and band, e.g. "truncated token weights in [0, 2]"."""
        return f"{self.kind} {self.level} weights in [{self.low:.3g}, {self.high:.3g}]"

    def tightened(self) -> Correction:
        """The same with bounds half as far from 1, as logarithms; open sides stay open.

        >>> correction("icepop").tightened().words
        'masked token weights in [0.707, 2.24]'
        """
        source = f"{self.source.removesuffix(', tightened')}, tightened"
        return replace(self, low=self.low**0.5, high=self.high**0.5, source=source)

    def weights(
        self,
        rollout_logprobs: Tensor,
        train_logprobs: Tensor,
        mask: Tensor | None = None,
        *,
        detach: bool = True,
    ) -> Tensor:
        """See `truncated_importance_weights` and `masked_importance_weights`."""
        batch = rollout_logprobs, train_logprobs, mask
        level, low, high = self.level, self.low, self.high
        if self.kind == "truncated":
            return truncated_importance_weights(
                *batch, cap=high, floor=low, level=level, detach=detach
            )
        return masked_importance_weights(*batch, low=low, high=high, level=level, detach=detach)

    def report(
        self,
        rollout_logprobs: Tensor,
        train_logprobs: Tensor,
        mask: Tensor | None = None,
        *,
        advantages: Tensor | None = None,
    ) -> CorrectionReport:
        """What the bounds cut off in a batch, and what that costs.

        Args:
            rollout_logprobs: as `truncated_importance_weights`.
            train_logprobs: as `truncated_importance_weights`.
            mask: as `truncated_importance_weights`.
            advantages: [batch, tokens], or [batch, 1] for one per sequence; None leaves
                `advantage_bias` out.

        Raises:
            ValueError: as `truncated_importance_weights`.
        """
        ratios = log_ratios(rollout_logprobs, train_logprobs, mask, self.level)
        truncates = self.kind == "truncated"
        bounds = self.low, self.high
        return report_of(ratios, *bounds, truncates=truncates, advantages=advantages)


_VERL = "verl 20c30bf, trainer/ppo/rollout_corr_helper.py"

CORRECTIONS: Mapping[str, Correction] = {
    "verl": Correction(
        kind="truncated",
        high=2.0,
        source=f"{_VERL}: rollout_is='token', rollout_is_threshold=2.0",
    ),
    "verl-sequence": Correction(
        kind="truncated",
        high=2.0,
        level="sequence",
        source=f"{_VERL}: rollout_is='sequence', rollout_is_threshold=2.0",
    ),
    "verl-geometric": Correction(
        kind="masked",
        low=0.999,
        high=1.001,
        level="geometric",
        # verl keeps the token's own weight, or none, where the mean is inside of the band
        source="verl, trainer/config/algorithm.py: rollout_rs='seq_mean_k1', '0.999_1.001'",
    ),
    "trl": Correction(
        kind="masked",
        high=3.0,
        level="sequence",
        source=(
            "TRL 1.14, trainer/grpo_config.py: vllm_importance_sampling_mode='sequence_mask',"
            " vllm_importance_sampling_clip_max=3.0"
        ),
    ),
    "prime-rl": Correction(
        kind="masked",
        low=0.125,
        high=8.0,
        source=(
            "prime-rl, src/prime_rl/trainer/rl/config.py: ratio_type='token', mask_ratio_low=0.125,"
            " mask_ratio_high=8.0 (token_mask_low and token_mask_high later)"
        ),
    ),
    "slime": Correction(
        kind="truncated",
        high=2.0,
        source="slime, utils/arguments.py: --tis-clip 2.0, --tis-clip-low 0 (vanilla_tis_function)",
    ),
    "openrlhf": Correction(
        kind="truncated",
        low=0.5,
        high=5.0,
        source="OpenRLHF, models/loss.py: type 'tis', vllm_is_truncated_threshold=[0.5, 5.0]",
    ),
    "icepop": Correction(
        kind="masked",
        low=0.5,
        high=5.0,
        source="IcePop (arXiv 2510.18855); the band as in rllm#741 and OpenRLHF",
    ),
}
"""By framework, its default, and variants by name."""


@checked
def correction(name: str) -> Correction:
    """The correction called `name`, see `CORRECTIONS`.

    Raises:
        ValueError: if there is none.
    """
    if name not in CORRECTIONS:
        raise unknown("correction", name, CORRECTIONS)
    return CORRECTIONS[name]
