"""The A/B that settles whether clamping harms: the same run with and without it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_fp.argument_types import checked
from lightning_fp.choices import check_at_least
from lightning_fp.layers import FormatLike
from lightning_fp.layers.scaling import ScalingLike
from lightning_fp.records.jsonl import json_text, plain
from lightning_fp.study.arms import Arm, Factory, run_arm, tail
from lightning_fp.study.series import CLAMPS_FROM
from lightning_fp.study.spikes import MAD_TO_SIGMA, SpikeRule

log = logging.getLogger(__name__)

FILE = "clamp_ab.json"

_CLEAR = 0.005
"""Losses that differ by less than this share are the same: so far apart end runs that differ in
rounding alone."""


@dataclass(frozen=True, kw_only=True)
class ClampAB:
    """Two runs that differ in the format of the suspected layers only."""

    layers: tuple[str, ...]
    """The suspected layers."""

    steps: int
    seed: int
    a: Arm
    """As configured, under delayed scaling."""

    b: Arm
    """With the suspected layers on the other format."""

    loss_noise: float
    """Of the difference of the losses, step by step, over the last fifth of the steps: a robust
    standard deviation."""

    @property
    def loss_difference(self) -> float:
        """Final loss of B less that of A; negative if the other format helps."""
        return self.b.final_loss - self.a.final_loss

    @property
    def outcome(self) -> str:
        """One of "harmful", "harmless", "worse" (B is) and "no clamping".

        Clamping is harmful if without it the loss ends clearly lower (by more than the noise, and
        by half a percent), fewer steps are not finite, or at most half as many spikes are left of
        two or more, at a loss that is not clearly higher.
        """
        a, b = self.a, self.b
        if a.clamped_mass_max <= 0 and a.overflow_bits <= CLAMPS_FROM:
            return "no clamping"
        if a.nonfinite_steps != b.nonfinite_steps:
            return "harmful" if b.nonfinite_steps < a.nonfinite_steps else "worse"
        clear = max(self.loss_noise, _CLEAR * abs(a.final_loss))
        if self.loss_difference > clear:
            return "worse"
        fewer = a.spikes >= 2 and b.spikes <= a.spikes / 2
        return "harmful" if fewer or self.loss_difference < -clear else "harmless"

    @property
    def verdict(self) -> str:
        """The outcome in a sentence with its numbers."""
        a, b, many = self.a, self.b, len(self.layers)
        which = self.layers[0] if many == 1 else f"{self.layers[0]} and {many - 1} more layers"
        opening = {
            "harmful": f"Clamping in {which} harms this run",
            "harmless": f"Clamping in {which} does not measurably harm this run",
            "worse": f"Clamping in {which} is not what harms this run, the other format is worse",
            "no clamping": f"Nothing clamped in {which}, so that this run settles nothing",
        }[self.outcome]
        return (
            f"{opening}: with {b.format} instead of {a.format} the final loss is"
            f" {b.final_loss:.4g} instead of {a.final_loss:.4g} (noise of the difference"
            f" {self.loss_noise:.2g}), loss spikes {b.spikes} instead of {a.spikes}, clamped mass"
            f" {b.clamped_mass:.2%} instead of {a.clamped_mass:.2%}, gradient norm (median)"
            f" {b.grad_norm:.3g} instead of {a.grad_norm:.3g}; {self.steps} steps, seed"
            f" {self.seed}."
        )

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON: null for what is not finite."""
        derived = {"outcome": self.outcome, "verdict": self.verdict}
        return plain({**derived, "loss_difference": self.loss_difference, **asdict(self)})


@checked
def clamp_ab(
    factory: Factory,
    layers: str | Sequence[str],
    *,
    steps: int = 200,
    seed: int = 0,
    switch_to: FormatLike = "fp8-dynamic",
    scaling: ScalingLike = "delayed",
    rules: Mapping[str, FormatLike] | None = None,
    every_n_steps: int = 1,
    spike_rule: SpikeRule = SpikeRule(),  # noqa: B008 (frozen)
    output: str | Path = "runs/clamp_ab",
) -> ClampAB:
    """Train the same run twice, with the suspected layers clamping and not clamping.

    Both runs have the same seed, weights, batches and formats, up to the suspected layers'. What
    they record is in `<output>/a` and `<output>/b`, the comparison in `<output>/clamp_ab.json`.
    One pair of runs is one observation: repeat it with other seeds before building on it.

    Args:
        factory: takes nothing; returns a LightningModule, its dataloader and, if wanted, a mapping
            of Trainer options. It is called once for each run, under the same seed.
        layers: pattern or patterns of the suspected layers, as in `FP8Precision(layers=...)`; all
            that match must be under delayed scaling.
        steps: optimizer steps of each run.
        seed: of both runs.
        switch_to: the suspected layers' format in the second run.
        scaling: format of the layers that no rule names.
        rules: `{pattern: format}`, as `FP8Precision(layers=...)`.
        every_n_steps: one step in so many is sampled; more than 1 is cheaper.
        spike_rule: what counts as a loss spike.
        output: directory for the records; an earlier study in it is replaced.

    Raises:
        ValueError: for an option out of range, a factory that returns something else, or a pattern
            that matches nothing or a layer without delayed scaling.
    """
    check_at_least(1, steps=steps, every_n_steps=every_n_steps)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise ValueError("layers must name the suspected layers, got none")
    output = Path(output)
    arms: list[Arm] = []
    names: list[str] = []
    for letter, to in (("a", None), ("b", switch_to)):
        log.info("arm %s: %d steps", letter, steps)
        arm, names = run_arm(
            factory,
            output / letter,
            layers=patterns,
            switch_to=to,
            steps=steps,
            seed=seed,
            scaling=scaling,
            rules=rules,
            every_n_steps=every_n_steps,
            spike_rule=spike_rule,
        )
        arms.append(arm)
    result = ClampAB(
        layers=tuple(names),
        steps=len(arms[0].losses),
        seed=seed,
        a=arms[0],
        b=arms[1],
        loss_noise=_noise(*arms),
    )
    (output / FILE).write_text(json_text(result.to_dict()) + "\n", encoding="utf-8")
    return result


def _noise(a: Arm, b: Arm) -> float:
    """Of the step-by-step difference of the losses at the end; 0 where none is finite."""
    one, other = (torch.tensor(arm.losses, dtype=torch.float64) for arm in (a, b))
    steps = min(len(one), len(other))
    difference = (other[:steps] - one[:steps])[-tail(steps) :]
    difference = difference[torch.isfinite(difference)]
    if not len(difference):
        return 0.0
    return MAD_TO_SIGMA * float((difference - difference.median()).abs().median())
