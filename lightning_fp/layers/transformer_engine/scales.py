"""Delayed scaling as Transformer Engine keeps it: opened, watched, saved and put back."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fp.kernels.transformer_engine.kernel import (
    EngineMemory,
    TransformerEngineKernel,
    states,
)
from lightning_fp.kernels.transformer_engine.library import library
from lightning_fp.kernels.transformer_engine.recipe import RecipeSettings, delayed_of, make_recipe
from lightning_fp.layers.format import LinearFormat
from lightning_fp.layers.linear import FPLinear
from lightning_fp.layers.scale_history import AmaxRecord
from lightning_fp.numerics import DelayedScaling, float_format, history_scale

log = logging.getLogger(__name__)

_MOST_KEPT = 64
"""As in `scale_history`."""


class EngineScales:
    """What `ScaleHistory` is for our own kernel, where Transformer Engine updates the scales.

    Histories and scales are its own tensors, updated by itself at the end of a forward (input and
    weight, all ranks together) and of a backward (grad_output). Here they are read and written, as
    plain tensors and in the order of `ScaleHistory`, so that a checkpoint of one continues in the
    other. A layer that comes to delayed scaling runs its first step in high precision, where its
    scales are found: Transformer Engine would begin, or go on after a pause, with useless ones.

    Args:
        config: how scales follow from a history.
    """

    def __init__(self, config: DelayedScaling) -> None:
        self.config = config
        self.share_weight_casts = False
        """Without effect here."""
        self.headroom = torch.zeros(0, 3)
        """float32 [layers, operands]: bits left in the last backward; see `AmaxRecord.values`."""
        self._layers: dict[str, FPLinear] = {}
        self._formats: list[LinearFormat] = []
        self._limits = torch.zeros(0, 3)
        self._recorded = torch.zeros(0, 3, 4)
        self._earlier_records: list[AmaxRecord] = []
        self._used: Tensor | None = None
        self._settings: RecipeSettings | None = None
        self._recipes: dict[RecipeSettings, Any] = {}

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def names(self) -> list[str]:
        """The layers under delayed scaling."""
        return list(self._layers)

    # -- which layers ---------------------------------------------------------------------------

    def track(self, layers: Mapping[str, FPLinear]) -> None:
        """Delayed scaling for exactly these layers; those already here keep their histories.

        Args:
            layers: the layers under delayed scaling now.

        Raises:
            ValueError: if they have more than one recipe.
        """
        settings = {_kernel(layer).settings for layer in layers.values()}
        if len(settings) > 1:
            raise ValueError(
                "layers under delayed scaling must share one recipe with Transformer Engine, which"
                f" reduces their amaxes together; got {len(settings)}:"
                f" {', '.join(sorted({layer.format.name for layer in layers.values()}))}"
            )
        for layer in set(self._layers.values()) - set(layers.values()):
            if layer.engine is not None:
                layer.engine.memory = None
        for layer in layers.values():
            if layer.engine is not None and layer.engine.memory is None:
                layer.engine.memory = EngineMemory()
        if self._layers:
            self._earlier_records = [*self._earlier_records[-_MOST_KEPT:], self._amax_record()]
        self._settings = next(iter(settings), None)
        given = None if self._settings is None else self._settings.given
        if given is not None:
            self.config = delayed_of(given.recipe)
        self._layers = dict(layers)
        self._formats = [layer.format for layer in layers.values()]
        device = next((layer.weight.device for layer in layers.values()), torch.device("cpu"))
        self._limits = torch.tensor(
            [
                [float_format(operand).max for operand in (f.input, f.weight, f.grad_output)]
                for f in self._formats
            ],
            device=None if device.type == "meta" else device,
        ).reshape(-1, 3)
        self._recorded = _nothing_recorded(self._limits)
        self._used = None

    # -- steps ----------------------------------------------------------------------------------

    def context(self) -> AbstractContextManager[object]:
        """Around a whole training forward: the one region whose end updates the scales."""
        return nullcontext() if self._settings is None else self._region(self._settings)

    @contextmanager
    def _region(self, settings: RecipeSettings) -> Generator[None, None, None]:
        engine = library()
        if settings not in self._recipes:
            self._recipes[settings] = make_recipe(settings, self.config, engine)
        self._used = self._scales()
        # No group: all ranks hold shards or replicas of the same layers, under DDP and FSDP alike.
        with engine.autocast(enabled=True, recipe=self._recipes[settings], group=None):
            yield

    @torch.no_grad()
    def fold(self) -> None:
        """After a backward: what Transformer Engine saw in it, before it is pushed on."""
        used, self._used = self._used, None
        if used is None or not self._layers:
            return
        newest = torch.zeros_like(used)
        for row, memory in enumerate(self._memories()):
            if _lives(memory):
                newest[row] = torch.cat([history[-1] for _, history in states(memory.module)])
        self._watch(newest, used)

    def _watch(self, amax: Tensor, used: Tensor) -> None:
        left = self._limits.to(used.device) / (amax * used)
        known = torch.isfinite(left) & (amax > 0) & torch.isfinite(amax)
        self.headroom = torch.where(known, torch.log2(left), torch.inf)
        largest, least, count, scale = self._recorded.unbind(-1)
        torch.maximum(largest, torch.where(torch.isfinite(amax), amax, 0.0), out=largest)
        torch.minimum(least, self.headroom, out=least)
        count += (~torch.isfinite(amax)).float()  # whether, not how many: it keeps no count
        scale.copy_(used)

    @torch.no_grad()
    def step(self) -> None:
        """After an optimizer step: layers that were watched for it get their first scales."""
        self.fold()
        memories = self._memories()
        rows = [row for row, memory in enumerate(memories) if memory.cold]
        cold = [memories[row] for row in rows]
        if not cold:
            return
        device = next((m.seen.device for m in cold if m.seen is not None), self._limits.device)
        amax = torch.stack(
            [torch.zeros(3, device=device) if m.seen is None else m.seen for m in cold]
        )
        if _many_ranks():
            dist.all_reduce(amax, op=dist.ReduceOp.MAX)
        # Input and weight must have been seen; a frozen model has no gradients, and needs no scale.
        there = ((amax > 0) & torch.isfinite(amax))[:, :2].all(dim=1)
        ready: list[bool] = there.tolist()
        for row, memory, largest, is_ready in zip(rows, cold, amax, ready, strict=True):
            memory.seen = None
            if is_ready:
                history = torch.zeros(3, self.config.history_len, device=device)
                history[:, 0] = torch.where(torch.isfinite(largest), largest, 0.0)
                self._begin(row, history, None)

    def _begin(self, row: int, history: Tensor, scales: Tensor | None) -> None:
        """Give a layer scales, from its next call on.

        Args:
            row: which layer.
            history: float32 [3, history_len], newest first.
            scales: float32 [3]; None to make them from the history.
        """
        memory = self._memories()[row]
        if scales is None:
            scales = history_scale(history, self._limits[row].to(history.device), self.config)
        scales = torch.where(scales > 0, scales, 1.0)  # 1 is where Transformer Engine begins
        theirs = torch.zeros(self.config.history_len, 3, device=history.device)
        theirs[1:] = history[:, :-1].flip(1).t()  # newest last; the first row is the next step's
        one = torch.ones(1, device=history.device)
        none = torch.zeros(self.config.history_len, 1, device=history.device)
        # Their third place in forward is the output, their second in backward grad_input: unused.
        memory.pending = {
            "scaling_fwd": [torch.cat([scales[:2], one]), torch.cat([theirs[:, :2], none], dim=1)],
            "scaling_bwd": [torch.cat([scales[2:], one]), torch.cat([theirs[:, 2:], none], dim=1)],
        }
        memory.cold = False

    # -- what was seen --------------------------------------------------------------------------

    @torch.no_grad()
    def take_amax_record(self) -> AmaxRecord:
        """All of it since the last time, over all ranks; then start anew. Call alike on all."""
        parts = [*self._earlier_records, self._amax_record()]
        self._earlier_records.clear()
        self._recorded = _nothing_recorded(self._limits)
        device = self._limits.device
        return AmaxRecord(
            layers=[layer for part in parts for layer in part.layers],
            formats=[format for part in parts for format in part.formats],
            values=torch.cat([part.values.to(device) for part in parts]),
        )

    def _amax_record(self) -> AmaxRecord:
        return AmaxRecord(list(self._layers), self._formats, self._recorded)

    # -- replays --------------------------------------------------------------------------------

    @contextmanager
    def untouched(self) -> Generator[None, None, None]:
        """Whatever runs in the block leaves no trace in histories and scales."""
        state = self._copy()
        used, self._used = self._used, None
        headroom, watched = self.headroom, self._recorded.clone()
        try:
            yield
        finally:
            self.headroom, self._recorded, self._used = headroom, watched, used
            for memory, before in zip(self._memories(), state, strict=True):
                cold, seen, pending, tensors = before
                memory.cold, memory.seen = cold, seen
                if tensors is not None:
                    for (scale, history), (old_scale, old_history) in zip(
                        states(memory.module), tensors, strict=True
                    ):
                        scale.copy_(old_scale)
                        history.copy_(old_history)
                else:
                    memory.pending = pending

    def _copy(self) -> list[tuple[bool, Tensor | None, Any, list[tuple[Tensor, Tensor]] | None]]:
        copies: list[tuple[bool, Tensor | None, Any, list[tuple[Tensor, Tensor]] | None]] = []
        for memory in self._memories():
            tensors = None
            if _lives(memory):
                tensors = [(s.clone(), h.clone()) for s, h in states(memory.module)]
            seen = None if memory.seen is None else memory.seen.clone()
            copies.append((memory.cold, seen, memory.pending, tensors))
        return copies

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Histories and scales by layer as plain tensors, in the order of `ScaleHistory`.

        The scales too: the entry that one of them was made for may have left the history since.
        """
        rows = [self._read(memory) for memory in self._memories()]
        width = self.config.history_len
        return {
            "layers": list(self._layers),
            "history": torch.stack([h for h, _ in rows]) if rows else torch.zeros(0, 3, width),
            "scales": torch.stack([s for _, s in rows]) if rows else torch.zeros(0, 3),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the layers that are here and were there; also from a state of `ScaleHistory`."""
        saved: Tensor = state["history"]
        if saved.shape[-1] != self.config.history_len:
            log.warning(
                "history_len changed from %d to %d: scales start anew",
                saved.shape[-1],
                self.config.history_len,
            )
            return
        scales: Tensor | None = state.get("scales")
        rows = {name: index for index, name in enumerate(state["layers"])}
        for row, (name, memory) in enumerate(zip(self._layers, self._memories(), strict=True)):
            if name not in rows:
                continue
            history = saved[rows[name]].to(self._limits.device)
            given = None if scales is None else scales[rows[name]].to(self._limits.device)
            seen = history[:2, 0] if given is None else given[:2]
            if bool((seen > 0).all()):
                self._begin(row, history, given)
            else:
                memory.cold, memory.seen, memory.pending = True, None, None

    def _read(self, memory: EngineMemory) -> tuple[Tensor, Tensor]:
        """History [3, history_len], newest first, and scales [3]; zeros while there are none."""
        device, width = self._limits.device, self.config.history_len
        if memory.pending is not None:
            forward, backward = memory.pending["scaling_fwd"], memory.pending["scaling_bwd"]
            scales = torch.cat([forward[0][:2], backward[0][:1]])
            theirs = torch.cat([forward[1][:, :2], backward[1][:, :1]], dim=1)
        elif not _lives(memory):
            return torch.zeros(3, width, device=device), torch.zeros(3, device=device)
        else:
            scales = torch.cat([scale for scale, _ in states(memory.module)])
            theirs = torch.cat([history for _, history in states(memory.module)], dim=1)
        history = torch.zeros(3, width, device=theirs.device)
        history[:, :-1] = theirs[1:].flip(0).t()
        return history, scales.clone()

    def _memories(self) -> list[EngineMemory]:
        engines = [layer.engine for layer in self._layers.values()]
        return [e.memory for e in engines if e is not None and e.memory is not None]

    def _scales(self) -> Tensor:
        """float32 [layers, 3], 0 where there are none yet."""
        rows = [self._read_scales(layer) for layer in self._layers.values()]
        return torch.stack(rows)

    def _read_scales(self, layer: FPLinear) -> Tensor:
        memory = None if layer.engine is None else layer.engine.memory
        if memory is not None and memory.pending is not None:
            forward, backward = memory.pending["scaling_fwd"], memory.pending["scaling_bwd"]
            return torch.cat([forward[0][:2], backward[0][:1]])
        scales = None if layer.engine is None else layer.engine.scales()
        return torch.zeros(3, device=self._limits.device) if scales is None else scales


def _lives(memory: EngineMemory) -> bool:
    """Whether Transformer Engine itself has the layer's scales by now."""
    return memory.module is not None and memory.pending is None and not memory.cold


def _many_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _nothing_recorded(like: Tensor) -> Tensor:
    nothing = torch.zeros_like(like)
    return torch.stack([nothing, torch.full_like(like, torch.inf), nothing, nothing], dim=-1)


def _kernel(layer: FPLinear) -> TransformerEngineKernel:
    kernel = layer.kernel
    if not isinstance(kernel, TransformerEngineKernel):
        raise TypeError(f"layer {layer.fqn!r}: not multiplied by Transformer Engine")
    return kernel
