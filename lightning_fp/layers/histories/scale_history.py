"""The amax histories and scales of all layers under delayed scaling, updated in one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_fp.kernels import NativeKernel
from lightning_fp.kernels.memory import AMAX, NONFINITE, OperandMemory, fold_gradients
from lightning_fp.layers.histories.delayed_scales import (
    AmaxRecord,
    DelayedScales,
    StepScales,
    first_device,
)
from lightning_fp.layers.rank_layers import RankLayers
from lightning_fp.layers.switchable import SwitchableLayer
from lightning_fp.numerics import DelayedScaling, advance_history, history_scale
from lightning_fp.numerics.combining import wide, wide_dtype


class ScaleHistory(DelayedScales):
    """Keeps `[layers, operands, history_len]` in one tensor, and one scale per layer and operand.

    A layer's memory holds a view of its scales. Once per optimizer step all recorded amax are
    gathered, reduced over ranks in one collective, put into the histories, and turned into the
    next scales. These are a new tensor: a graph from before the step, as a GAN's generator has
    while its discriminator steps, goes backward with the scales of its forward. Where a CUDA graph
    was captured they stay in their place, since its replays read them there. Nothing waits for the
    device, except while a layer that has just entered delayed scaling still looks for its first
    scales.

    Args:
        config: how scales follow from a history.
        ranks: those that agree on scales; None: all.
    """

    def __init__(self, config: DelayedScaling, ranks: RankLayers | None = None) -> None:
        super().__init__(config, ranks)
        self._history = torch.zeros(0, 3, config.history_len)
        self._scales = torch.zeros(0, 3)
        self._grad_record = torch.zeros(0, 2)
        self._counts = torch.ones(0, 1, dtype=torch.bool)
        self._memory: list[OperandMemory] = []
        self._any_cold = False
        self._cold_steps = 0
        self._sharing = False

    # -- which layers ---------------------------------------------------------------------------

    def track(self, layers: Mapping[str, SwitchableLayer], amax_only: Collection[str] = ()) -> None:
        """See `DelayedScales.track`."""
        left = set(self._layers.values()) - set(layers.values())
        for layer in left:
            layer.record, layer.memory = False, None
        kept = {
            name: index
            for index, name in enumerate(self._layers)
            if layers.get(name) is self._layers[name] and name not in self._amax_only
        }
        # Where they were: under CPU offload weights are elsewhere between steps.
        device = self._history.device if self._layers else first_device(layers.values())
        history = torch.zeros(len(layers), 3, self.config.history_len, device=device)
        for index, name in enumerate(layers):
            if name in kept:
                history[index] = self._history[kept[name]]
        self._begin(layers, amax_only)
        self._use(history)

    def release(self, names: Collection[str]) -> None:
        """See `DelayedScales.release`."""
        rows = [row for row, name in enumerate(self._layers) if name not in names]
        if len(rows) < len(self._layers):
            remaining = {name: each for name, each in self._layers.items() if name not in names}
            self._begin(remaining, self._amax_only - set(names))
            self._use(self._history[rows])

    def _use(self, history: Tensor) -> None:
        """Take over a history: new scales, and memories that look at them."""
        self._history = history
        self._watch_from(history.device)
        self._scales = history_scale(history, self._limits, self.config)
        self._grad_record = wide(torch.zeros(len(self._layers), 2, device=history.device))
        for layer, scales in zip(self._layers.values(), self._scales.unbind(0), strict=True):
            layer.record, layer.memory = True, _kernel(layer).make_memory(layer, scales)
        self._memory = self._made()
        for name, memory in zip(self._layers, self._memory, strict=True):
            memory.amax_only = name in self._amax_only
        counts = [[name not in self._amax_only] for name in self._layers]
        self._counts = torch.tensor(counts, device=history.device).reshape(-1, 1)
        self._share(self._memory)
        self._cool_down()
        self._any_cold = any(_kernel(layer).cold for layer in self._layers.values())
        self._cold_steps = 0
        self._warm_up()

    # -- steps ----------------------------------------------------------------------------------

    @torch.no_grad()
    def fold(self) -> None:
        """After a backward: take in the records of grad_output."""
        memories = self._memories()
        if len(self._amax_only) < len(self._layers):  # of the others no gradient is recorded
            fold_gradients(memories, self._grad_record)

    @torch.no_grad()
    def step(self) -> None:
        """After an optimizer step: one reduction over ranks, one update for all layers."""
        if not self._layers:
            if self.ranks.differ:  # others have some
                self.ranks.largest(self.amax.new_zeros(0, 3), self._layers)
            return
        self.fold()
        memories = self._memories()
        recorded = [memory.recorded for memory in memories]
        here = _stacked(recorded, self._history.device)
        rows = torch.cat([here, self._grad_record.unsqueeze(1)], dim=1)
        amax = torch.nan_to_num(
            self._with_scalars(rows[..., AMAX].float(), memories), nan=torch.inf, posinf=torch.inf
        )
        self.amax = amax = self.ranks.largest(amax, self._layers)
        if len(self._amax_only) < len(self._layers):
            self._advance(amax, rows[..., NONFINITE])
        torch._foreach_zero_(recorded)  # pyright: ignore[reportPrivateImportUsage]
        self._grad_record.zero_()
        self._share(memories)
        self._warm_up()

    def _advance(self, amax: Tensor, nonfinite: Tensor) -> None:
        """The next step's scales, from this one's amax."""
        if self._amax_only:  # no scales follow from these
            amax = torch.where(self._counts, amax, 0.0)
        self._watch(amax, nonfinite, self._scales)
        self._history = advance_history(self._history, amax)
        self._hand_out(history_scale(self._history, self._limits, self.config))

    def _with_scalars(self, amax: Tensor, memories: Sequence[OperandMemory]) -> Tensor:
        """With what eager forwards have left of input and weight as scalars; it is taken."""
        left = [memory.amaxes for memory in memories]
        if not any(left):
            return amax
        none = (amax.new_zeros(()),) * 2
        seen = _stacked([each for pair in left for each in pair or none], amax.device)
        for memory in memories:
            memory.amaxes = ()
        first = torch.maximum(amax[:, :2], seen.view(-1, 2))
        return torch.cat([first, amax[:, 2:]], dim=1)

    def _hand_out(self, scales: Tensor) -> None:
        if any(memory.captured for memory in self._memory):
            self._scales.copy_(scales)
            for memory, row in zip(self._memory, scales.unbind(0), strict=True):
                memory.scales.copy_(row)  # no view of ours on another device, or where it has moved
            return
        self._scales = scales
        for memory, row in zip(self._memory, scales.unbind(0), strict=True):
            memory.scales = row.to(memory.recorded.device)  # layers may be on several devices

    def _share(self, memories: Iterable[OperandMemory]) -> None:
        """Drop the casts of the step's weights, and say whether the next step keeps its own."""
        if not (self.share_weight_casts or self._sharing):
            return
        self.drop_weight_casts()
        self._sharing = self.share_weight_casts
        for layer, memory in zip(self._layers.values(), memories, strict=True):
            memory.shares_weight_cast = self._sharing and _is_whole(layer)

    def drop_weight_casts(self) -> None:
        """See `DelayedScales.drop_weight_casts`."""
        for memory in self._memory if self._sharing else ():
            memory.weight_cast = None

    @torch.no_grad()
    def take_amax_record(self) -> AmaxRecord:
        """See `DelayedScales.take_amax_record`; each rank has counted its own inf and NaN."""
        record = super().take_amax_record()
        if record.values.numel() and self.ranks.many:
            nonfinite = record.values[..., 2].contiguous()
            dist.all_reduce(nonfinite, op=dist.ReduceOp.SUM, group=self.ranks.group)
            record.values[..., 2] = nonfinite
        return record

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

    def _made(self) -> list[OperandMemory]:
        memories = [layer.memory for layer in self._layers.values()]
        return [memory for memory in memories if isinstance(memory, OperandMemory)]

    @contextmanager
    def untouched(self) -> Generator[None, None, None]:
        """Whatever writes into histories and scales in the block leaves no trace."""
        history, scales = self._history.clone(), self._scales.clone()
        try:
            yield
        finally:
            self._history = history
            self._hand_out(scales)

    def in_force(self) -> StepScales | None:
        """See `DelayedScales.in_force`."""
        if not self._layers:
            return None
        written_into = any(memory.captured for memory in self._memory)
        scales = self._scales.clone() if written_into else self._scales
        return StepScales(tuple(self._layers), scales)

    @contextmanager
    def lent(
        self, layers: Mapping[str, SwitchableLayer], scales: StepScales
    ) -> Generator[None, None, None]:
        """See `DelayedScales.lent`; inside of `untouched`, and of formats that are put back."""
        kept: list[tuple[SwitchableLayer, Any]] = []
        own: list[tuple[OperandMemory, Tensor]] = []
        ready: list[bool] = (scales.values > 0).all(dim=1).tolist()
        rows = zip(scales.layers, scales.values.unbind(0), ready, strict=True)
        try:
            for name, row, warm in rows:
                layer = layers.get(name)
                kernel = None if layer is None else layer.kernel
                if layer is None or not isinstance(kernel, NativeKernel) or not kernel.delayed:
                    continue
                if kernel.cold is warm:
                    layer.switch(layer.format, dataclasses.replace(kernel, cold=not warm))
                memory = layer.memory
                if isinstance(memory, OperandMemory):
                    own.append((memory, memory.scales))
                    memory.scales = row.to(memory.scales.device)
                else:
                    kept.append((layer, memory))
                    layer.memory = kernel.make_memory(layer, row.to(layer.weight.device))
            yield
        finally:
            for layer, memory in kept:
                layer.memory = memory
            for memory, scales_now in own:
                memory.scales = scales_now

    def _memories(self) -> list[OperandMemory]:
        """The layers' memories; where the model has moved, everything here follows it."""
        first = next(iter(self._layers.values()), None)
        if (
            first is not None and first.memory is None
        ):  # a copy of table and model, which begin anew
            self._use(self._history)
        elif [layer.memory for layer in self._layers.values()] != self._memory:
            self._follow()
        return self._memory

    def _follow(self) -> None:
        """Move to where the layers' own memories already are, to the first one's device."""
        self._memory = self._made()
        device = self._memory[0].recorded.device
        self._history, self._limits = self._history.to(device), self._limits.to(device)
        self._grad_record = self._grad_record.to(device, wide_dtype(device))
        self._recorded, self._counts = self._recorded.to(device), self._counts.to(device)
        self._hand_out(self._scales.to(device))

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See `DelayedScales.state_dict`; scales follow from histories."""
        rows, names = self._in_full(), list(self._layers)
        return {
            "layers": [names[row] for row in rows],
            "history": self._history[rows].clone(),
            # for who reads a checkpoint without the run's options
            "config": dataclasses.asdict(self.config),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        rows = dict(zip(state["layers"], state["history"], strict=True))
        history = self._history.clone()
        for index, name in enumerate(self._layers):
            if name in rows:
                history[index] = rows[name]
        self._use(history)


def _stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """On one device; most are there, and a call of `to` for each would cost more than the rest."""
    here = all(each.device == device for each in tensors)
    return torch.stack(list(tensors) if here else [each.to(device) for each in tensors])


def _is_whole(layer: SwitchableLayer) -> bool:
    """Whether the weight is not sharded, as it shows between steps.

    Under FSDP a kept cast would hold as much memory as sharding is there to save.
    """
    weight = layer.weight
    whole = (layer.out_features, layer.in_features)
    return not isinstance(weight, DTensor) and tuple(weight.shape) == whole


def _kernel(layer: SwitchableLayer) -> NativeKernel:
    kernel = layer.kernel
    if not isinstance(kernel, NativeKernel):
        raise TypeError(f"layer {layer.fqn!r}: delayed scaling needs the native kernel")
    return kernel
