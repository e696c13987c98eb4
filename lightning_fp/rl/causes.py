"""What a mismatch comes from: precision, stale weights, routing, or sampling parameters.

Tokens are told apart by what is known of them: those whose weights were stale, those of fresh
weights whose experts differ, and the rest, in which both sides differ by nothing but how they
compute. The rest's mean k3 is what precision alone does; what the others have above it is theirs.
Parameters that only one side's log-probabilities have gone through concern all tokens alike, so
they take the place of precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_fp.metrics.log_ratio import excess_over_linear
from lightning_fp.rl.log_ratios import log_ratios
from lightning_fp.rl.origin import SampleOrigin

Cause = Literal["precision", "sampling", "routing", "staleness"]

GROUPS = ("rest", "rerouted", "stale")
"""Tokens, each in one: stale before rerouted, since other weights also route otherwise."""

REMEDIES: Mapping[Cause, str] = {
    "precision": (
        "give both sides more mantissa bits (fp16 instead of bf16), or the same FP8 format end to"
        " end"
    ),
    "sampling": (
        "apply the same parameters to training's logits, or have the engine return"
        " log-probabilities from before them"
    ),
    "routing": (
        "replay the engine's expert ids in training's routers, and keep routers in fp32 on both"
        " sides"
    ),
    "staleness": (
        "synchronise the weights more often, or truncate the importance weights more; precision is"
        " not the reason"
    ),
}
"""What to do about each."""


@dataclass(frozen=True, kw_only=True)
class CauseSums:
    """Of one batch; they add up over micro-batches and ranks."""

    groups: Tensor
    """float64 [groups, 3]: tokens, sum of abs(r), sum of k3."""

    staleness: Tensor
    """float64 [3]: tokens whose staleness is known, its sum, its largest."""

    layers: Mapping[str, Tensor]
    """float64 [2] by layer: tokens whose experts differ, and all."""

    sampling: frozenset[str]
    """Sampling parameters that differ."""

    known: frozenset[str]
    """Of which causes something was given: "staleness", "routing", "sampling"."""

    def cpu(self) -> CauseSums:
        """The same in host memory; waits for the device."""
        return CauseSums(
            groups=self.groups.cpu(),
            staleness=self.staleness.cpu(),
            layers={layer: counts.cpu() for layer, counts in self.layers.items()},
            sampling=self.sampling,
            known=self.known,
        )


def cause_sums(
    rollout_logprobs: Tensor,
    train_logprobs: Tensor,
    mask: Tensor | None,
    origin: SampleOrigin | None = None,
) -> CauseSums:
    """Tell the tokens of a batch apart.

    Args:
        rollout_logprobs: [batch, tokens], as `truncated_importance_weights`.
        train_logprobs: as `truncated_importance_weights`.
        mask: as `truncated_importance_weights`.
        origin: what is known of the samples.

    Raises:
        ValueError: for shapes that differ, tokens that differ, or no log-probabilities.
    """
    origin = SampleOrigin() if origin is None else origin
    origin.check(mask)
    ratios = log_ratios(rollout_logprobs, train_logprobs, mask, "token")
    r, valid = ratios.r, ratios.valid
    shape = (r.shape[0], r.shape[1])
    staleness, rerouted = origin.staleness(shape), origin.rerouted(shape)

    nowhere = torch.zeros_like(valid)
    stale, behind = nowhere, torch.zeros(3, dtype=r.dtype, device=r.device)
    if staleness is not None:
        lag = torch.where(valid, staleness.to(r.device, r.dtype), 0.0)
        _check_order(lag)
        stale = lag > 0
        largest = lag.max() if lag.numel() else lag.new_zeros(())
        behind = torch.stack([valid.sum().to(r.dtype), lag.sum(), largest])
    moved, layers = nowhere, dict[str, Tensor]()
    for layer, differ in rerouted.items():
        differ = differ.to(r.device) & valid
        moved = moved | differ
        layers[layer] = torch.stack([differ.sum(), valid.sum()]).to(r.dtype)
    members = torch.stack([valid & ~stale & ~moved, valid & ~stale & moved, valid & stale])
    terms = torch.stack([torch.ones_like(r), r.abs(), excess_over_linear(r)])
    groups = torch.where(members.unsqueeze(1), terms, 0.0).sum(dim=(2, 3))
    given = {
        "staleness": staleness is not None,
        "routing": origin.rollout_experts is not None,
        "sampling": origin.rollout_sampling is not None or origin.train_sampling is not None,
    }
    return CauseSums(
        groups=groups.double() if r.device.type != "mps" else groups,
        staleness=behind,
        layers=layers,
        sampling=frozenset(origin.unequal_sampling),
        known=frozenset(name for name, is_known in given.items() if is_known),
    )


def _check_order(lag: Tensor) -> None:
    """Refuse weights that training does not have yet; on the CPU, where nothing has to wait."""
    if lag.device.type == "cpu" and bool((lag < 0).any()):
        raise ValueError(
            "rollout_version must be train_version or earlier, got one that is"
            f" {-lag.min().item():g} later; count both in synchronisations, or both in steps"
        )


def merged(parts: Sequence[CauseSums]) -> CauseSums:
    """The sums of all parts together; one part at least."""
    layers: dict[str, Tensor] = {}
    for part in parts:
        for layer, counts in part.layers.items():
            layers[layer] = layers[layer] + counts.to(layers[layer]) if layer in layers else counts
    first = parts[0].groups
    behind = torch.stack([part.staleness.to(first.device) for part in parts])
    return CauseSums(
        groups=torch.stack([part.groups.to(first.device) for part in parts]).sum(dim=0),
        staleness=torch.stack([behind[:, 0].sum(), behind[:, 1].sum(), behind[:, 2].max()]),
        layers=layers,
        sampling=frozenset().union(*(part.sampling for part in parts)),
        known=frozenset().union(*(part.known for part in parts)),
    )


@dataclass(frozen=True, kw_only=True)
class Causes:
    """What the mismatch of a step comes from; plain numbers."""

    share: Mapping[Cause, float]
    """Of the sum of k3, by cause; they add up to 1. A cause of which nothing was given is left out,
    and its part is precision's. NaN without any mismatch."""

    k3: Mapping[str, float]
    """Mean k3 of each of `GROUPS`, NaN where it is empty."""

    abs_diff: Mapping[str, float]
    """Mean abs(r), likewise."""

    stale_tokens: float
    """Share of tokens whose weights were stale, of those that are known; NaN without any."""

    staleness_mean: float
    """Versions that weights were behind, mean over tokens."""

    staleness_max: float
    """The most versions that any were behind."""

    rerouted_tokens: Mapping[str, float]
    """Share of tokens whose experts differ, by layer."""

    sampling: tuple[str, ...]
    """Sampling parameters that only one side has."""

    unknown: tuple[str, ...]
    """The causes of which nothing was given."""

    @property
    def main(self) -> Cause | None:
        """The cause with the largest share; None without a mismatch."""
        known: list[Cause] = [name for name, share in self.share.items() if not math.isnan(share)]
        shares = [self.share[name] for name in known]
        return known[shares.index(max(shares))] if known else None

    @property
    def sentence(self) -> str:
        """The main cause with its share, and what to do about it."""
        main = self.main
        if main is None:
            return "training and rollout agree"
        what = main
        if main == "sampling":
            what += f" ({', '.join(self.sampling)})"
        elif main == "staleness":
            what += f" ({self.staleness_mean:.1f} versions behind)"
        text = f"{self.share[main]:.0%} of k3 from {what}: {REMEDIES[main]}"
        asked = " and ".join(name for name in self.unknown if name != "sampling")
        if main == "precision" and asked:
            text += f" ({asked} not given, so not told apart)"
        elif main in ("staleness", "routing") and math.isnan(self.k3["rest"]):
            text += " (no other samples to tell precision apart by)"
        return text

    def numbers(self) -> dict[str, float]:
        """The numbers by the names they are logged under, less "mismatch/"."""
        layers = self.rerouted_tokens
        values: dict[str, float] = {
            **{f"cause/{cause}": share for cause, share in self.share.items()},
            "cause/stale_tokens": self.stale_tokens,
            "cause/staleness_mean": self.staleness_mean,
            "cause/staleness_max": self.staleness_max,
            "cause/k3_rest": self.k3["rest"],
            "cause/rerouted_tokens_max": max(layers.values(), default=math.nan),
        }
        return {name: value for name, value in values.items() if not math.isnan(value)}


def causes_of(sums: CauseSums) -> Causes:
    """See `Causes`; waits for the device."""
    groups: dict[str, list[float]] = dict(zip(GROUPS, sums.groups.tolist(), strict=True))
    known, behind, furthest = sums.staleness.tolist()
    total = sum(k3 for _, _, k3 in groups.values())
    tokens, _, rest = groups["rest"]
    usual = rest / tokens if tokens else 0.0
    above = {name: max(0.0, k3 - n * usual) for name, (n, _, k3) in groups.items()}
    base: Cause = "sampling" if sums.sampling else "precision"
    names: dict[Cause, str] = {}
    if "routing" in sums.known:
        names["routing"] = "rerouted"
    if "staleness" in sums.known:
        names["staleness"] = "stale"
    # inf / inf is NaN, and so is 0 / 0: there is nothing to divide
    divide = 0 < total < math.inf
    share: dict[Cause, float] = {
        cause: above[group] / total if divide else math.nan for cause, group in names.items()
    }
    share = {base: 1 - sum(share.values()) if divide else math.nan, **share}
    means = {name: [x / n if n else math.nan for x in rest] for name, (n, *rest) in groups.items()}
    layers = {name: counts.tolist() for name, counts in sums.layers.items()}
    return Causes(
        share=share,
        k3={name: k3 for name, (_, k3) in means.items()},
        abs_diff={name: size for name, (size, _) in means.items()},
        stale_tokens=groups["stale"][0] / known if known else math.nan,
        staleness_mean=behind / known if known else math.nan,
        staleness_max=furthest if known else math.nan,
        rerouted_tokens={name: n / all if all else math.nan for name, (n, all) in layers.items()},
        sampling=tuple(sorted(sums.sampling)),
        unknown=tuple(x for x in ("staleness", "routing", "sampling") if x not in sums.known),
    )


def mismatch_causes(
    rollout_logprobs: Tensor,
    train_logprobs: Tensor,
    mask: Tensor | None,
    origin: SampleOrigin,
) -> Causes:
    """What the mismatch of one batch comes from, see `Causes`; waits for the device.

    >>> rollout = torch.full((2, 4), -1.0)
    >>> train = rollout + torch.tensor([[1e-3], [-0.5]])  # the second sequence is old
    >>> origin = SampleOrigin(rollout_version=torch.tensor([7, 5]), train_version=7)
    >>> mismatch_causes(rollout, train, None, origin).main
    'staleness'

    Args:
        rollout_logprobs: as `truncated_importance_weights`.
        train_logprobs: as `truncated_importance_weights`.
        mask: as `truncated_importance_weights`.
        origin: what is known of the samples.

    Raises:
        ValueError: for shapes that differ, tokens that differ, or no log-probabilities.
    """
    return causes_of(cause_sums(rollout_logprobs, train_logprobs, mask, origin))
