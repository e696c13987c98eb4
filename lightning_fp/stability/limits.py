"""Layer limits: a layer whose casts lose too much climbs one rung, without an incident."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_fp.layers.statistics_table import OPERANDS
from lightning_fp.numerics.statistics import COLUMN

_CASTS = [OPERANDS.index(operand) for operand in ("input", "weight", "grad_output")]


@dataclass(frozen=True, kw_only=True)
class LayerLimit:
    """How much the casts of one layer may lose before it climbs a rung of the ladder.

    >>> LayerLimit(clamped_mass=0.02).patience
    3
    """

    clamped_mass: float | None = 1e-2
    """Largest clamped mass of any operand; None sets no limit."""

    sqnr_db: float | None = 15.0
    """Smallest SQNR of any operand, in dB. Healthy casts have 25 (e5m2) to 31 (e4m3)."""

    nonfinite: int | None = 0
    """Most inf and NaN elements of any operand in a step."""

    patience: int = 3
    """Looks in a row over the limit before the layer climbs. The first one asks for more: while
    any layer is over its limit every step is looked at."""

    cooldown: int = 50
    """Looks after a climb during which the layer does not climb again, so that the new format can
    show what it does."""

    budget: int | None = None
    """Climbs in a run, over all layers; None allows each layer one, rounded up to at least 8."""

    def __post_init__(self) -> None:
        for field, least in (("clamped_mass", 0), ("nonfinite", 0), ("budget", 0)):
            value = getattr(self, field)
            if value is not None and not value >= least:
                raise ValueError(f"{field} must be at least {least}, got {value!r}")
        for field in ("patience", "cooldown"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be an integer of at least 1, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Excess:
    """One layer over a limit, as seen in one step."""

    layer: str
    operand: str
    statistic: str
    value: float
    limit: float

    @property
    def sentence(self) -> str:
        """E.g. "clamped_mass of grad_output is 0.13, limit 0.01"."""
        return f"{self.statistic} of {self.operand} is {self.value:.3g}, limit {self.limit:.3g}"


@dataclass(frozen=True, kw_only=True)
class LimitState:
    """How often in a row each layer was over its limit."""

    over: Mapping[str, int]
    """Looks in a row, by layer; those at 0 are left out."""

    resting: Mapping[str, int]
    """Looks until a layer that has climbed may climb again."""

    climbs: int = 0
    """Climbs so far."""


class LimitWatch:
    """Counts looks; pure: old states stay usable.

    Args:
        limit: the limits.
        layers: how many layers there are, for the budget.
    """

    def __init__(self, limit: LayerLimit, layers: int) -> None:
        self.limit = limit
        self.budget = max(8, layers) if limit.budget is None else limit.budget

    def init(self) -> LimitState:
        """Nothing seen yet."""
        return LimitState(over={}, resting={})

    def step(
        self, state: LimitState, excesses: Mapping[str, Excess], looked: Sequence[str]
    ) -> tuple[LimitState, list[Excess]]:
        """Take in one look.

        Args:
            state: what was seen before.
            excesses: the layers over a limit in this step.
            looked: all layers that were looked at.

        Returns:
            The new state, and the layers that climb now, in the order given.
        """
        over = {n: c for n, c in state.over.items() if n not in looked}
        resting = {n: c - 1 for n, c in state.resting.items() if c > 1}
        climbing: list[Excess] = []
        for name, excess in excesses.items():
            over[name] = state.over.get(name, 0) + 1
            allowed = state.climbs + len(climbing) < self.budget and name not in resting
            if over[name] >= self.limit.patience and allowed:
                climbing.append(excess)
                resting[name] = self.limit.cooldown
                del over[name]
        climbs = state.climbs + len(climbing)
        return replace(state, over=over, resting=resting, climbs=climbs), climbing

    def watching(self, state: LimitState) -> bool:
        """Whether the next step should be looked at too."""
        exhausted = state.climbs >= self.budget
        return not exhausted and any(name not in state.resting for name in state.over)

    def excesses(self, table: Tensor, names: Sequence[str]) -> dict[str, Excess]:
        """The layers over a limit.

        Args:
            table: float64 [layers, operands, statistics] of one step, over all ranks.
            names: the layers.

        Returns:
            By layer, the statistic that is furthest over its limit; nothing else.
        """
        values = table[:, _CASTS].cpu()
        found: dict[str, Excess] = {}
        over = {
            "nonfinite": _over_nonfinite(values, self.limit.nonfinite),
            "clamped_mass": _over_mass(values, self.limit.clamped_mass),
            "sqnr_db": _under_sqnr(values, self.limit.sqnr_db),
        }
        for statistic, (value, limit, flags) in over.items():
            where: list[list[int]] = flags.nonzero().tolist()
            for layer, operand in where:
                name = str(names[layer])
                found.setdefault(
                    name,
                    Excess(
                        layer=name,
                        operand=OPERANDS[_CASTS[operand]],
                        statistic=statistic,
                        value=float(value[layer, operand]),
                        limit=limit,
                    ),
                )
        return found

    def state_dict(self, state: LimitState) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {"over": dict(state.over), "resting": dict(state.resting), "climbs": state.climbs}

    def load_state_dict(self, saved: Mapping[str, Any]) -> LimitState:
        """See `state_dict`."""
        return LimitState(
            over=dict(saved["over"]), resting=dict(saved["resting"]), climbs=int(saved["climbs"])
        )


def _over_nonfinite(values: Tensor, limit: int | None) -> tuple[Tensor, float, Tensor]:
    count = values[..., COLUMN["nonfinite"]]
    if limit is None:
        return count, math.inf, torch.zeros_like(count, dtype=torch.bool)
    return count, limit, count > limit


def _over_mass(values: Tensor, limit: float | None) -> tuple[Tensor, float, Tensor]:
    mass = values[..., COLUMN["excess"]] / values[..., COLUMN["magnitude"]]
    if limit is None:
        return mass, math.inf, torch.zeros_like(mass, dtype=torch.bool)
    return mass, limit, mass > limit


def _under_sqnr(values: Tensor, limit: float | None) -> tuple[Tensor, float, Tensor]:
    signal, noise = values[..., COLUMN["signal"]], values[..., COLUMN["noise"]]
    sqnr = 10 * torch.log10(signal / noise)
    if limit is None:
        return sqnr, -math.inf, torch.zeros_like(sqnr, dtype=torch.bool)
    return sqnr, limit, (sqnr < limit) & (signal > 0)
