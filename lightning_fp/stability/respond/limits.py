"""Layer limits: a layer whose casts lose too much climbs one rung, without an incident.

The statistics of a cast show by themselves what a format does to a layer, and one rung is cheap. So
neither a replay nor a verdict is asked for, and nothing goes back. But then limits must never move
a healthy run: they stand where no healthy layer was seen to come, need several looks in a row, and
have a budget.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.layers.statistics_table import OPERANDS
from lightning_fp.numerics.combining import COLUMN
from lightning_fp.numerics.statistics import shares
from lightning_fp.statistic_names import called, measured

_CASTS = [OPERANDS.index(operand) for operand in ("input", "weight", "grad_output")]


@checked
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

    underflow: float | None = 0.25
    """Largest share of non-zero elements of input or weight that a cast makes zero. Channels with
    outliers, which an SQNR does not show since it weighs by power, have 0.69 to 0.99; healthy ones
    at most 0.053. Not of grad_output, where healthy runs have 0.41."""

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
        for field in ("clamped_mass", "underflow", "nonfinite", "budget"):
            value = getattr(self, field)
            if value is not None and not value >= 0:
                raise ValueError(f"{field} must be None or at least 0, got {value!r}")
        if self.sqnr_db is not None and math.isnan(self.sqnr_db):
            raise ValueError("sqnr_db must be None or a number, got nan")
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
        """E.g. "clamped mass of grad_output is 13% (limit 1%)"."""
        value, limit = (measured(self.statistic, of) for of in (self.value, self.limit))
        return f"{called(self.statistic)} of {self.operand} is {value} (limit {limit})"


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
        seen = set(looked)
        # A look that was not taken says nothing: those layers keep their count.
        over = {n: c for n, c in state.over.items() if n not in seen}
        resting = {n: c - 1 for n, c in state.resting.items() if c > 1}
        climbing: list[Excess] = []
        for name, excess in excesses.items():
            over[name] = state.over.get(name, 0) + 1
            left = self.budget - state.climbs - len(climbing)
            allowed = left > 0 and name not in state.resting
            if over[name] >= self.limit.patience and allowed:
                climbing.append(excess)
                resting[name] = self.limit.cooldown
                del over[name]
        climbs = state.climbs + len(climbing)
        return replace(state, over=over, resting=resting, climbs=climbs), climbing

    def forget(self, state: LimitState, layers: Collection[str]) -> LimitState:
        """Layers whose formats somebody else has changed begin anew.

        Args:
            state: what was seen before.
            layers: these layers.
        """
        return replace(state, over={n: c for n, c in state.over.items() if n not in layers})

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
            By layer, the first of nonfinite, clamped_mass, sqnr_db and underflow_fraction that is
            over its limit, of the operand that is furthest over it; nothing for the others. What is
            not finite in more than half of the layers is left to the incident: it spreads, and no
            layer can be blamed for what it was given.
        """
        values = table[:, _CASTS].cpu()
        nonfinite, lost = values[..., COLUMN["nonfinite"]], shares(values)
        underflow = lost["underflow_fraction"].clone()
        underflow[:, _CASTS.index(OPERANDS.index("grad_output"))] = 0.0
        found: dict[str, Excess] = {}
        for statistic, value, limit, sign in (
            ("nonfinite", nonfinite, self.limit.nonfinite, 1),
            ("clamped_mass", lost["clamped_mass"], self.limit.clamped_mass, 1),
            ("sqnr_db", lost["sqnr_db"], self.limit.sqnr_db, -1),
            ("underflow_fraction", underflow, self.limit.underflow, 1),
        ):
            if limit is None or not len(names):
                continue
            excess = sign * (value - limit)
            excess = torch.where(excess > 0, excess, 0.0)  # NaN where nothing was seen
            most, operand = excess.max(dim=-1)
            over: list[int] = most.nonzero().flatten().tolist()
            if statistic == "nonfinite" and len(over) > len(names) / 2:
                continue
            for layer in over:
                worst = int(operand[layer])
                seen = Excess(
                    layer=names[layer],
                    operand=OPERANDS[_CASTS[worst]],
                    statistic=statistic,
                    value=float(value[layer, worst]),
                    limit=limit,
                )
                found.setdefault(seen.layer, seen)
        return found

    def state_dict(self, state: LimitState) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {"over": dict(state.over), "resting": dict(state.resting), "climbs": state.climbs}

    def load_state_dict(self, saved: Mapping[str, Any]) -> LimitState:
        """See `state_dict`."""
        return LimitState(
            over=dict(saved["over"]), resting=dict(saved["resting"]), climbs=int(saved["climbs"])
        )
