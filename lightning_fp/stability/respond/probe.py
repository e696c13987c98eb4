"""Probes: now and then, one step's gradients against high precision, without any suspicion.

A fault that clamps gradients or rounds them away makes no spike: the loss merely stops improving,
and nothing in the loss says so. Measured on a tiny GPT: 13% of the loss lost and no step unusual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from statistics import median
from typing import Any

from lightning_fp.argument_types import built
from lightning_fp.stability.respond.attribution import HEALTHY_ERROR

FIRST = 64
"""Steps from one probe to the next to begin with."""

OFTEN = 5
"""So many probes come at that distance, before it doubles up to the probe's interval: faults of a
format's own show early, and the first hundreds of steps are the cheapest to save."""

TIMES = 3.0
"""An error so many times the usual one is suspicious."""

LARGE = 0.5
"""An error that is suspicious where none is usual yet; cosine about 0.88."""

LARGEST = 0.75
"""An error that is suspicious in any case: gradients that are all lost have 1."""

_KEPT = 16


@dataclass(frozen=True, kw_only=True)
class ProbeState:
    """When the last probe was, and what they found."""

    last: int | None = None
    """Step of the last one."""
    healthy: int | None = None
    """Step of the last one that raised no suspicion."""
    count: int = 0
    wait: int = FIRST
    """Steps from the last one to the next."""
    errors: tuple[float, ...] = ()
    """Relative errors of the gradients, of probes that raised no suspicion."""
    suspicion: float = 0.0
    """The last error that was out of the usual."""
    alone: int = 0
    """Probes in a row, since the last that raised no suspicion, of which one batch alone did."""
    norm: float | None = None
    """Of the gradients in high precision, when a probe last raised no suspicion."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """When to look, and what is suspicious. Pure: old states stay usable."""

    every_n_steps: int = 1024
    """Steps from one probe to the next, in the long run. A probe costs one step or two."""

    def due(self, state: ProbeState, step: int) -> bool:
        """Whether it is time; the first time at once."""
        return state.last is None or step - state.last >= state.wait

    def usual(self, state: ProbeState) -> float:
        """The error that the formats make in a healthy run."""
        return max(HEALTHY_ERROR, median(state.errors) if state.errors else 0.0)

    def suspicious(self, state: ProbeState, error: float) -> bool:
        """Whether an error is out of the usual; inf and NaN are."""
        return not error <= (min(LARGEST, TIMES * self.usual(state)) if state.errors else LARGE)

    def seen(
        self, state: ProbeState, step: int, error: float | None, norm: float | None = None
    ) -> ProbeState:
        """Take in a probe.

        What is suspicious is not learned as usual, or the next one would pass.

        Args:
            state: where the probes stand.
            step: optimizer steps so far.
            error: what it found; None if it could not be done.
            norm: see `ProbeState.norm`.
        """
        wait = FIRST if state.count < OFTEN else 2 * state.wait
        wait = min(wait, self.every_n_steps)
        state = replace(state, last=step, count=state.count + 1, wait=wait)
        if error is None or self.suspicious(state, error):
            return state
        errors = (*state.errors, error)[-_KEPT:]
        return replace(state, healthy=step, errors=errors, norm=norm, alone=0)

    def state_dict(self, state: ProbeState) -> dict[str, Any]:
        """Plain numbers."""
        return {**asdict(state), "errors": list(state.errors)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> ProbeState:
        """See `state_dict`."""
        names = {item.name for item in fields(ProbeState)}  # earlier versions knew more
        values = {name: value for name, value in saved.items() if name in names}
        return built(ProbeState, values)
