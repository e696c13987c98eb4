"""Delayed scaling of all layers together: what every keeper of scales promises and records."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fp.layers.format import LinearFormat
from lightning_fp.layers.rank_layers import RankLayers
from lightning_fp.layers.switchable import SwitchableLayer
from lightning_fp.numerics import DelayedScaling, float_format

log = logging.getLogger(__name__)

_MOST_KEPT = 64
"""Changes of the tracked layers over which what was watched is kept, if nobody takes it."""


@dataclass(frozen=True)
class AmaxRecord:
    """What was seen at every step of layers whose amax history is kept.

    For a layer under another scaling, which `fp8-auto` follows, headroom is what delayed scaling
    would have left.
    """

    layers: list[str]
    """A layer that left delayed scaling and came back is in here twice."""

    formats: list[LinearFormat]

    values: Tensor
    """float32 [layers, operands, 4], on the device: largest finite amax, least headroom in bits
    (log2 of the format's max over the scaled amax: negative when clamping, inf where nothing was
    seen), number of inf and NaN elements, scale of the last step (0 where there was none)."""


@dataclass(frozen=True)
class StepScales:
    """What the layers under delayed scaling were scaled with in one step."""

    layers: tuple[str, ...]
    values: Tensor
    """float32 [layers, operands], on the device; 0 where there was none yet. Never written into."""


class DelayedScales(ABC):
    """Keeps the histories and scales of the layers under delayed scaling.

    Between steps `track` says which these are; within one `fold` follows each backward, and `step`
    the optimizer. Who multiplies decides where the tensors are; what was seen is recorded here.

    Args:
        config: how scales follow from a history.
        ranks: those that agree on scales; None: all.
    """

    def __init__(self, config: DelayedScaling, ranks: RankLayers | None = None) -> None:
        self.config = config
        self.ranks = RankLayers() if ranks is None else ranks
        """Those that agree on scales."""
        self.headroom = torch.zeros(0, 3)
        """float32 [layers, operands]: bits left in the last step; see `AmaxRecord.values`."""
        self.amax = torch.zeros(0, 3)
        """float32 [layers, operands]: the largest values of the last step, over ranks; inf where
        one was not finite. Never written into."""
        self.share_weight_casts = False
        """Whether the calls of one step share the cast of their layer's weight, as gradient
        accumulation wants it; from the next step on. It takes a byte per element of the weights.
        Without effect on Transformer Engine."""
        self._layers: dict[str, SwitchableLayer] = {}
        self._amax_only: frozenset[str] = frozenset()
        self._formats: list[LinearFormat] = []
        self._limits = torch.zeros(0, 3)
        self._recorded = torch.zeros(0, 3, 4)
        self._earlier_records: list[AmaxRecord] = []

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def names(self) -> list[str]:
        """The layers that are tracked, in the order of `amax`."""
        return list(self._layers)

    # -- the promise ----------------------------------------------------------------------------

    @abstractmethod
    def track(self, layers: Mapping[str, SwitchableLayer], amax_only: Collection[str] = ()) -> None:
        """Keep histories for exactly these layers; those already here keep theirs.

        Args:
            layers: the layers under delayed scaling now, and those that are followed.
            amax_only: those of them of which no more is wanted than `amax`, of input and weight.
                Neither records nor checkpoints have them, and what follows from a history does not
                follow from what was seen of them.

        Raises:
            ValueError: if they cannot be scaled together.
        """

    @abstractmethod
    def release(self, names: Collection[str]) -> None:
        """Forget layers that are not this table's any more, and leave them as they are.

        Args:
            names: whether tracked or not.
        """

    @abstractmethod
    def fold(self) -> None:
        """After a backward: take in what it recorded."""

    @abstractmethod
    def step(self) -> None:
        """After an optimizer step: the scales of the next one."""

    def drop_weight_casts(self) -> None:  # noqa: B027 - some keep none
        """Forget casts kept for the step, where weights may have changed within it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Histories by layer, as plain tensors."""

    @abstractmethod
    def _load(self, state: Mapping[str, Any]) -> None:
        """Restore the layers that are here and were there; their histories are as long as ours."""

    def context(self) -> AbstractContextManager[object]:
        """What must stand around a whole training forward."""
        return nullcontext()

    def untouched(self) -> AbstractContextManager[object]:
        """Within it forwards that record nothing leave no trace in histories and scales."""
        return nullcontext()

    def in_force(self) -> StepScales | None:
        """The scales of the step that is about to begin; None where they are not kept here."""
        return None

    def lent(
        self, layers: Mapping[str, SwitchableLayer], scales: StepScales
    ) -> AbstractContextManager[object]:
        """Within it layers under delayed scaling multiply with these scales.

        Args:
            layers: the table's, in their formats for this time.
            scales: of some step.
        """
        return nullcontext()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the histories of the layers that are here and were there."""
        length = state["history"].shape[-1]
        if length == self.config.history_len:
            self._load(state)
            return
        log.warning(
            "history_len changed from %d to %d: scales start anew", length, self.config.history_len
        )

    # -- what was seen --------------------------------------------------------------------------

    def _begin(
        self, layers: Mapping[str, SwitchableLayer], amax_only: Collection[str] = ()
    ) -> None:
        """Other layers; one leaves because of what was seen of it, so that is kept."""
        if self._layers:
            self._earlier_records = [*self._earlier_records[-_MOST_KEPT:], self._amax_record()]
        self._layers, self._amax_only = dict(layers), frozenset(amax_only)
        self._formats = [layer.format for layer in layers.values()]

    def _watch_from(self, device: torch.device | None) -> None:
        """Record anew, with the limits of the layers' formats."""
        limits = [
            [float_format(operand).max for operand in (f.input, f.weight, f.grad_output)]
            for f in self._formats
        ]
        self._limits = torch.tensor(limits, device=device).reshape(-1, 3)
        self._recorded = _nothing_recorded(self._limits)

    def _watch(self, amax: Tensor, nonfinite: Tensor, used: Tensor) -> None:
        """Keep what must be exact at every step: a single huge value may not be missed.

        Args:
            amax: [layers, operands] of the step.
            nonfinite: same shape: inf and NaN elements.
            used: same shape: the scales they were cast with, 0 where there were none.
        """
        left = self._limits.to(used.device) / (amax * used)
        known = torch.isfinite(left) & (amax > 0) & torch.isfinite(amax)
        self.headroom = torch.where(known, torch.log2(left), torch.inf)
        largest, least, count, scale = self._recorded.unbind(-1)
        torch.maximum(largest, torch.where(torch.isfinite(amax), amax, 0.0), out=largest)
        torch.minimum(least, self.headroom, out=least)
        count += nonfinite
        scale.copy_(used)

    @torch.no_grad()
    def take_amax_record(self) -> AmaxRecord:
        """All of it since the last time, over all ranks; then start anew. Call alike on all."""
        parts = [*self._earlier_records, self._amax_record()]
        self._earlier_records.clear()
        self._recorded = _nothing_recorded(self._limits)
        return AmaxRecord(
            layers=[layer for part in parts for layer in part.layers],
            formats=[format for part in parts for format in part.formats],
            values=torch.cat([part.values.to(self._limits.device) for part in parts]),
        )

    @property
    def recorded(self) -> Tensor:
        """See `AmaxRecord.values`; of the present layers, this rank's, since they were taken."""
        return self._recorded

    def _amax_record(self) -> AmaxRecord:
        rows, names = self._in_full(), list(self._layers)
        formats = [self._formats[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.int64, device=self._recorded.device)
        picked = self._recorded.index_select(0, index)
        return AmaxRecord([names[row] for row in rows], formats, picked)

    def _in_full(self) -> list[int]:
        """Rows of the layers of which all is recorded."""
        return [row for row, name in enumerate(self._layers) if name not in self._amax_only]


def _nothing_recorded(like: Tensor) -> Tensor:
    """[..., 4] for a tensor of shape [...]."""
    nothing = torch.zeros_like(like)
    return torch.stack([nothing, torch.full_like(like, torch.inf), nothing, nothing], dim=-1)


def first_device(layers: Iterable[SwitchableLayer]) -> torch.device:
    """Where the layers are; the CPU if there are none, or if they have no values yet.

    A model on the meta device gets its values later, and histories that a checkpoint had may be
    here before.
    """
    device = next((layer.weight.device for layer in layers), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
