"""The amax histories and scales of all layers under delayed scaling, updated in one batch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fp.kernels import NativeKernel
from lightning_fp.kernels.memory import AMAX, NONFINITE, OperandMemory, fold_gradients
from lightning_fp.layers.linear import FPLinear
from lightning_fp.numerics import DelayedScaling, advance_history, float_format, history_scale

log = logging.getLogger(__name__)


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
        self._history = torch.zeros(0, 3, config.history_len)
        self._scales = torch.zeros(0, 3)
        self._limits = torch.zeros(0, 3)
        self._grad_record = torch.zeros(0, 2, dtype=torch.float64)
        self._watched = torch.zeros(0, 3, 3)
        self._cold_steps = 0

    def __len__(self) -> int:
        return len(self._layers)

    # -- which layers ---------------------------------------------------------------------------

    def track(self, layers: Mapping[str, FPLinear]) -> None:
        """Keep histories for exactly these layers; those already here keep theirs.

        Args:
            layers: the layers under delayed scaling now, by name.
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
        self._layers = dict(layers)
        self._use(history)

    def _use(self, history: Tensor) -> None:
        """Take over a history: new scales, and memories that look at them."""
        self._history = history
        self._limits = torch.tensor(
            [
                [float_format(operand).max for operand in (f.input, f.weight, f.grad_output)]
                for f in (layer.format for layer in self._layers.values())
            ],
            device=history.device,
        ).reshape(-1, 3)
        self._scales = history_scale(history, self._limits, self.config)
        self._grad_record = torch.zeros(
            len(self._layers), 2, dtype=torch.float64, device=history.device
        )
        for layer, scales in zip(self._layers.values(), self._scales.unbind(0), strict=True):
            layer.record, layer.memory = True, OperandMemory(scales)
        self._watched = _nothing_watched(
            torch.zeros(len(self._layers), 3, 3, device=history.device)
        )
        self._cold_steps = 0
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
        self._warm_up()

    def _watch(self, amax: Tensor, nonfinite: Tensor) -> None:
        """Keep what must be exact at every step: a single huge value may not be missed."""
        used = self._limits / (amax * self._scales)
        known = torch.isfinite(used) & (amax > 0) & torch.isfinite(amax)
        headroom = torch.where(known, torch.log2(used), torch.inf)
        largest, least, count = self._watched.unbind(-1)
        torch.maximum(largest, torch.where(torch.isfinite(amax), amax, 0.0), out=largest)
        torch.minimum(least, headroom, out=least)
        count += nonfinite

    @torch.no_grad()
    def take_watched(self) -> Tensor:
        """Extremes of all steps since the last time, over all ranks; then start anew.

        Returns:
            float32 [layers, operands, 3], on the device: largest finite amax, least headroom in
            bits (log2 of the format's max over the scaled amax: negative when clamping, inf
            where nothing was seen), and the number of inf and NaN elements.
        """
        watched = self._watched.clone()
        if watched.numel() and _many_ranks():
            nonfinite = watched[..., 2].contiguous()
            dist.all_reduce(nonfinite, op=dist.ReduceOp.SUM)
            watched[..., 2] = nonfinite
        self._watched.copy_(_nothing_watched(self._watched))
        return watched

    @property
    def names(self) -> list[str]:
        """The layers under delayed scaling, in the order of `take_watched`."""
        return list(self._layers)

    def _warm_up(self) -> None:
        """Give layers whose operands all have a scale the kernel that relies on it.

        This reads flags from the device. It is done at steps 0, 1, 3, 7, 15, ... after layers
        came in, and not at all once they are warm.
        """
        cold = [i for i, layer in enumerate(self._layers.values()) if _kernel(layer).cold]
        if cold and (self._cold_steps & (self._cold_steps + 1)) == 0:
            ready = (self._scales > 0).all(dim=1).tolist()
            layers = list(self._layers.values())
            for i in cold:
                if ready[i]:
                    kernel = dataclasses.replace(_kernel(layers[i]), cold=False)
                    layers[i].switch(layers[i].format, kernel)
        self._cold_steps += 1

    def _memories(self) -> list[OperandMemory]:
        """The layers' memories; made anew where a layer has moved to another device."""
        layers = self._layers.values()
        device = next((layer.weight.device for layer in layers), self._history.device)
        if device != self._history.device:
            self._use(self._history.to(device))
        return [layer.memory for layer in layers if layer.memory is not None]

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


def _nothing_watched(like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_fill_(-1, torch.tensor([1], device=like.device), torch.inf)


def _kernel(layer: FPLinear) -> NativeKernel:
    kernel = layer.kernel
    if not isinstance(kernel, NativeKernel):
        raise TypeError(f"layer {layer.fqn!r}: delayed scaling needs the native kernel")
    return kernel
