"""Looks at sampled steps: which layers are over their limits.

What a look has shown waits until its step is known to be sound: where one was left out, inf and NaN
are everywhere, and the layer that they are seen in need not be the one that made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from lightning_fp.layers import LinearFormat, PrecisionMap
from lightning_fp.layers.statistics_table import observable, over_ranks
from lightning_fp.stability.respond.limits import Excess, LayerLimit, LimitWatch
from lightning_fp.telemetry.casts.sampling import Listener, SampledSteps, StepSampler

STRIDE = 8
"""SQNR looks at every so many rows, as ClampMonitor does."""


class Monitor(Protocol):
    """Who samples steps already."""

    @property
    def listeners(self) -> list[Listener]:
        """Called with every sampled step."""
        ...

    def sample_next(self) -> None:
        """Sample the next step too, out of turn."""
        ...


class LayerWatch:
    """Looks at sampled steps, through a monitor if there is one: only one can observe.

    Args:
        monitor: who samples steps already; None where nobody does.
        table: whose layers are observed from here on.
        limit: the limits.
        every_n_steps: one in so many steps is looked at.
        seed: of the steps that are looked at.
    """

    def __init__(
        self,
        monitor: Monitor | None,
        table: PrecisionMap,
        limit: LayerLimit,
        *,
        every_n_steps: int,
        seed: int,
    ) -> None:
        self._steps = SampledSteps(every_n_steps, seed)
        self._limits = LimitWatch(limit, 0)  # it is the watch that counts
        self._looks: list[tuple[list[str], Tensor]] = []
        self._sampler: StepSampler | None = None
        self._monitor = monitor
        if monitor is not None:
            monitor.listeners.append(self._look)
            return
        layers = observable(table.layers)
        self._sampler = StepSampler(layers, STRIDE, self._steps, listeners=[self._look])

    def close(self) -> None:
        """Leave the layers as they were."""
        if self._sampler is not None:
            self._sampler.close()
        if self._monitor is not None and self._look in self._monitor.listeners:
            self._monitor.listeners.remove(self._look)
        self._sampler = self._monitor = None

    # -- sampled steps --------------------------------------------------------------------------

    def before_batch(self, step: int) -> None:
        """Begin to collect, if this step is sampled."""
        if self._sampler is not None:
            self._sampler.before_batch(step)

    def after_backward(self) -> None:
        """Take in what backward recorded."""
        if self._sampler is not None:
            self._sampler.after_backward()

    def after_step(self, step: int) -> None:
        """End a sampled step."""
        if self._sampler is not None:
            self._sampler.after_batch(step)

    def _look(
        self, step: int, table: Tensor, names: list[str], formats: Sequence[LinearFormat]
    ) -> None:
        """Keep one sampled step until it is known whether the step was sound."""
        low = [i for i, format in enumerate(formats) if not format.is_high_precision]
        self._looks.append(([names[i] for i in low], over_ranks(table[low])))

    def look_again(self) -> None:
        """The next step too, out of turn."""
        if self._monitor is not None:
            self._monitor.sample_next()
        else:
            self._steps.asked = True

    # -- between steps --------------------------------------------------------------------------

    def take(self) -> list[tuple[list[str], dict[str, Excess]]]:
        """The looks since the last time: which layers, and those of them over a limit."""
        looks, self._looks = self._looks, []
        return [(names, self._limits.excesses(table, names)) for names, table in looks]

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Which steps are sampled, and what was not taken yet."""
        return {
            "sampled_at": self._steps.last,
            "asked": self._steps.asked,
            "looks": [{"names": names, "table": table.cpu()} for names, table in self._looks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        self._steps.last, self._steps.asked = state["sampled_at"], state["asked"]
        self._looks = [(look["names"], look["table"]) for look in state["looks"]]
