"""AmaxHistories: which layers of a table keep a history of their amax, and what follows from it.

Layers under delayed scaling take their scales from it. Under `fp8-auto` dynamic layers keep one as
well, so that it is known what delayed scaling would have clamped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed import ProcessGroup

from lightning_fp.layers.backends import Backend
from lightning_fp.layers.format import NAMED_FORMATS
from lightning_fp.layers.histories.auto_scaling import AutoScaling, AutoScalingState, Move
from lightning_fp.layers.histories.delayed_scales import DelayedScales
from lightning_fp.layers.histories.scale_history import ScaleHistory
from lightning_fp.layers.switchable import SwitchableLayer
from lightning_fp.layers.transformer_engine.scales import EngineScales
from lightning_fp.numerics import DelayedScaling

_AUTO_FORMATS = (NAMED_FORMATS["fp8-dynamic"], NAMED_FORMATS["fp8-delayed"])
"""The formats between which `fp8-auto` moves a layer."""


class AmaxHistories:
    """The histories of a table's layers.

    Args:
        backend: Transformer Engine keeps histories of its own.
        delayed: how delayed scales follow from a history.
        auto: when layers move between dynamic and delayed scaling by themselves; None: never.
    """

    def __init__(self, backend: Backend, delayed: DelayedScaling, auto: AutoScaling | None) -> None:
        self._engine = backend == "transformer-engine"
        self.scales: DelayedScales = (EngineScales if self._engine else ScaleHistory)(delayed)
        self._auto = None if auto is None else AutoScalingState(auto)
        self._follow = self._watch_casts = False
        self._resumed: dict[str, Any] | None = None

    def meet(
        self,
        layers: Mapping[str, SwitchableLayer],
        group: ProcessGroup | None,
        device: torch.device,
    ) -> None:
        """Agree on scales with the ranks of a group; see `PrecisionMap.meet`."""
        ranks = self.scales.ranks
        ranks.group = group
        ranks.meet(layers, device)
        if ranks.differ and (self._engine or self._auto is not None):
            what = (
                'backend must not be "transformer-engine"'
                if self._engine
                else ('scaling must not be "auto"')
            )
            raise ValueError(
                f"{what} where ranks have layers of their own (here not: {ranks.others(layers)}),"
                ' as it acts on all layers together; take "dynamic" or "delayed" of this package'
            )

    def track(self, layers: Mapping[str, SwitchableLayer]) -> None:
        """Keep histories of those layers of a table that need one in their present formats."""
        needed = {name for name, each in layers.items() if self._needed(each)}
        watched = {name for name, each in layers.items() if self._watch_casts and _can_record(each)}
        tracked = {name: each for name, each in layers.items() if name in needed | watched}
        self.scales.track(tracked, watched - needed)

    def _needed(self, layer: SwitchableLayer) -> bool:
        if layer.format.scaling == "delayed":
            return True
        followed = self._follow or (self._auto is not None and layer.format in _AUTO_FORMATS)
        return followed and _can_record(layer)

    def follow(self, on: bool, layers: Mapping[str, SwitchableLayer]) -> None:
        """Keep a history of dynamic layers too; see `PrecisionMap.follow`."""
        if on == self._follow:
            return
        self._follow = on
        self.track(layers)
        if self._resumed is not None:  # the run went on before anybody followed
            self.scales.load_state_dict(self._resumed)

    def watch_casts(self, on: bool, layers: Mapping[str, SwitchableLayer]) -> None:
        """Know the amax of dynamic layers' inputs and weights; see `PrecisionMap.watch_casts`."""
        if on != self._watch_casts:
            self._watch_casts = on
            self.track(layers)

    def step(self, layers: Mapping[str, SwitchableLayer]) -> list[Move]:
        """After an optimizer step: the scales of the next one.

        Returns:
            The layers that `fp8-auto` moves.
        """
        self._resumed = None
        self.scales.step()
        if self._auto is None or not len(self.scales):
            return []
        names = self.scales.names
        delayed = [layers[name].format.scaling == "delayed" for name in names]
        return self._auto.step(names, delayed, self.scales.headroom)

    def state_dict(self) -> dict[str, Any]:
        """Histories, scales and counters, as plain tensors and numbers."""
        return {
            "scales": self.scales.state_dict(),
            "auto": None if self._auto is None else self._auto.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`; what is of layers that are not followed yet is kept for them."""
        self.scales.load_state_dict(state["scales"])
        self._resumed = state["scales"]
        if self._auto is not None and state["auto"] is not None:
            self._auto.load_state_dict(state["auto"])


def _can_record(layer: SwitchableLayer) -> bool:
    return layer.keeps_history and layer.kernel.records
