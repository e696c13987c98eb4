"""The amax histories and scales of all layers under delayed scaling, updated in one batch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_fp.kernels import NativeKernel
from lightning_fp.kernels.memory import AMAX, NONFINITE, OperandMemory, fold_gradients
from lightning_fp.layers.format import LinearFormat
from lightning_fp.layers.linear import FPLinear
from lightning_fp.numerics import DelayedScaling, advance_history, float_format, history_scale

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


class ScaleHistory:
    """Keeps `[layers, operands, history_len]` in one tensor, and one scale per layer and operand.

    A layer's memory holds a view of its scales. Once per optimizer step all recorded amax are
    gathered, reduced over ranks in one collective, put into the histories, and turned into the
    next scales. Nothing waits for the device, except while a layer that has just entered delayed
    scaling still looks for its first scales.

    Args:
        config: how scales follow from a history.
    """

    def __init__(self, config: DelayedScaling) -> None:
        self.config = config
        self._layers: dict[str, FPLinear] = {}
        self._formats: list[LinearFormat] = []
        self._history = torch.zeros(0, 3, config.history_len)
        self._scales = torch.zeros(0, 3)
        self._limits = torch.zeros(0, 3)
        self._grad_record = torch.zeros(0, 2, dtype=torch.float64)
        self._recorded = torch.zeros(0, 3, 4)
        self._earlier_records: list[AmaxRecord] = []
        self._memory: list[OperandMemory] = []
        self._any_cold = False
        self.headroom = torch.zeros(0, 3)
        """float32 [layers, operands]: bits left in the last step; see `AmaxRecord.values`."""
        self._cold_steps = 0
        self._sharing = False
        self.share_weight_casts = False
        """Whether the calls of one step share the cast of their layer's weight, as gradient
        accumulation wants it; from the next step on. It takes a byte per element of the weights."""

    def __len__(self) -> int:
        return len(self._layers)

    # -- which layers ---------------------------------------------------------------------------

    def track(self, layers: Mapping[str, FPLinear]) -> None:
        """Keep histories for exactly these layers; those already here keep theirs.

        Args:
            layers: the layers under delayed scaling now, and those that `fp8-auto` follows.
        """
        left = set(self._layers.values()) - set(layers.values())
        for layer in left:
            layer.record, layer.memory = False, None
        kept = {
            name: index
            for index, name in enumerate(self._layers)
            if layers.get(name) is self._layers[name]
        }
        device = next((layer.weight.device for layer in layers.values()), torch.device("cpu"))
        history = torch.zeros(len(layers), 3, self.config.history_len, device=device)
        for index, name in enumerate(layers):
            if name in kept:
                history[index] = self._history[kept[name]]
        if self._layers:  # a layer leaves because of what was seen of it: keep that
            self._earlier_records = [*self._earlier_records[-_MOST_KEPT:], self._amax_record()]
        self._layers = dict(layers)
        self._formats = [layer.format for layer in layers.values()]
        self._use(history)

    def _use(self, history: Tensor) -> None:
        """Take over a history: new scales, and memories that look at them."""
        self._history = history
        self._limits = torch.tensor(
            [
                [float_format(operand).max for operand in (f.input, f.weight, f.grad_output)]
                for f in self._formats
            ],
            device=history.device,
        ).reshape(-1, 3)
        self._scales = history_scale(history, self._limits, self.config)
        self._grad_record = torch.zeros(
            len(self._layers), 2, dtype=torch.float64, device=history.device
        )
        self._memory = [OperandMemory(scales) for scales in self._scales.unbind(0)]
        for layer, memory in zip(self._layers.values(), self._memory, strict=True):
            layer.record, layer.memory = True, memory
        self._share(self._memory)
        self._recorded = _nothing_recorded(self._scales)
        if not history.is_meta:  # a model without values, as plans are made for
            self._cool_down()
        self._any_cold = any(_kernel(layer).cold for layer in self._layers.values())
        self._cold_steps = 0
        if not history.is_meta:
            self._warm_up()

    # -- steps ----------------------------------------------------------------------------------

    @torch.no_grad()
    def fold(self) -> None:
        """After a backward: take in the records of grad_output."""
        fold_gradients(self._memories(), self._grad_record)

    @torch.no_grad()
    def step(self) -> None:
        """After an optimizer step: one reduction over ranks, one update for all layers."""
        if not self._layers:
            return
        self.fold()
        memories = self._memories()
        recorded = [memory.recorded for memory in memories]
        rows = torch.cat([torch.stack(recorded), self._grad_record.unsqueeze(1)], dim=1)
        amax = torch.nan_to_num(rows[..., AMAX].float(), nan=torch.inf, posinf=torch.inf)
        if _many_ranks():
            dist.all_reduce(amax, op=dist.ReduceOp.MAX)
        self._watch(amax, rows[..., NONFINITE])
        self._history = advance_history(self._history, amax)
        self._scales.copy_(history_scale(self._history, self._limits, self.config))
        torch._foreach_zero_(recorded)  # pyright: ignore[reportPrivateImportUsage]
        self._grad_record.zero_()
        self._share(memories)
        self._warm_up()

    def _share(self, memories: Iterable[OperandMemory]) -> None:
        """Drop the casts of the step's weights, and say whether the next step keeps its own."""
        if not (self.share_weight_casts or self._sharing):
            return
        self._sharing = self.share_weight_casts
        for layer, memory in zip(self._layers.values(), memories, strict=True):
            memory.weight_cast = None
            memory.shares_weight_cast = self._sharing and _is_whole(layer)

    def _watch(self, amax: Tensor, nonfinite: Tensor) -> None:
        """Keep what must be exact at every step: a single huge value may not be missed."""
        self.headroom = headroom = self._headroom(amax)
        largest, least, count, scale = self._recorded.unbind(-1)
        torch.maximum(largest, torch.where(torch.isfinite(amax), amax, 0.0), out=largest)
        torch.minimum(least, headroom, out=least)
        count += nonfinite
        scale.copy_(self._scales)

    def _headroom(self, amax: Tensor) -> Tensor:
        left = self._limits / (amax * self._scales)
        known = torch.isfinite(left) & (amax > 0) & torch.isfinite(amax)
        return torch.where(known, torch.log2(left), torch.inf)

    @torch.no_grad()
    def take_amax_record(self) -> AmaxRecord:
        """All of it since the last time, over all ranks; then start anew. Call alike on all."""
        parts = [*self._earlier_records, self._amax_record()]
        self._earlier_records.clear()
        self._recorded = _nothing_recorded(self._scales)
        values = torch.cat([part.values.to(self._scales.device) for part in parts])
        if values.numel() and _many_ranks():
            nonfinite = values[..., 2].contiguous()
            dist.all_reduce(nonfinite, op=dist.ReduceOp.SUM)
            values[..., 2] = nonfinite
        return AmaxRecord(
            layers=[layer for part in parts for layer in part.layers],
            formats=[format for part in parts for format in part.formats],
            values=values,
        )

    def _amax_record(self) -> AmaxRecord:
        return AmaxRecord(list(self._layers), self._formats, self._recorded)

    @property
    def names(self) -> list[str]:
        """The layers under delayed scaling."""
        return list(self._layers)

    def _cool_down(self) -> None:
        """Where a history has been taken back to before its first entry, look for scales again."""
        without: list[bool] = (self._scales == 0).any(dim=1).tolist()
        for layer, cold in zip(self._layers.values(), without, strict=True):
            kernel = _kernel(layer)
            if cold and kernel.delayed and not kernel.cold:
                layer.switch(layer.format, dataclasses.replace(kernel, cold=True))

    def _warm_up(self) -> None:
        """Give layers whose operands all have a scale the kernel that relies on it.

        This reads flags from the device. It is done at steps 0, 1, 3, 7, 15, ... after layers
        came in, and not at all once they are warm.
        """
        if not self._any_cold:
            return
        if (self._cold_steps & (self._cold_steps + 1)) == 0:
            ready: list[bool] = (self._scales > 0).all(dim=1).tolist()
            for layer, layer_ready in zip(self._layers.values(), ready, strict=True):
                if layer_ready and _kernel(layer).cold:
                    layer.switch(layer.format, dataclasses.replace(_kernel(layer), cold=False))
            self._any_cold = not all(ready)
        self._cold_steps += 1

    def _memories(self) -> list[OperandMemory]:
        """The layers' memories; where the model has moved, everything here follows it."""
        first = next(iter(self._layers.values()), None)
        if first is not None and first.memory is not self._memory[0]:
            self._follow(first.weight.device)
        return self._memory

    def _follow(self, device: torch.device) -> None:
        """Move to the device where the layers' own memories already are."""
        self._history, self._limits = self._history.to(device), self._limits.to(device)
        self._grad_record, self._recorded = self._grad_record.to(device), self._recorded.to(device)
        self._scales = self._scales.to(device)
        self._memory = [layer.memory for layer in self._layers.values() if layer.memory is not None]
        for memory, scales in zip(self._memory, self._scales.unbind(0), strict=True):
            memory.scales = scales

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Histories by layer; scales follow from them."""
        return {"layers": list(self._layers), "history": self._history.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the histories of the layers that are here and were there."""
        saved: Tensor = state["history"]
        if saved.shape[-1] != self.config.history_len:
            log.warning(
                "history_len changed from %d to %d: scales start anew",
                saved.shape[-1],
                self.config.history_len,
            )
            return
        rows = {name: row for name, row in zip(state["layers"], saved, strict=True)}
        history = self._history.clone()
        for index, name in enumerate(self._layers):
            if name in rows:
                history[index] = rows[name]
        self._use(history)


def _many_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _nothing_recorded(scales: Tensor) -> Tensor:
    """[..., 4] for scales of shape [...]."""
    nothing = torch.zeros_like(scales)
    return torch.stack([nothing, torch.full_like(scales, torch.inf), nothing, nothing], dim=-1)


def _is_whole(layer: FPLinear) -> bool:
    """Whether the weight is not sharded, as it shows between steps.

    Under FSDP a kept cast would hold as much memory as sharding is there to save.
    """
    weight = layer.weight
    whole = (layer.out_features, layer.in_features)
    return not isinstance(weight, DTensor) and tuple(weight.shape) == whole


def _kernel(layer: FPLinear) -> NativeKernel:
    kernel = layer.kernel
    if not isinstance(kernel, NativeKernel):
        raise TypeError(f"layer {layer.fqn!r}: delayed scaling needs the native kernel")
    return kernel
