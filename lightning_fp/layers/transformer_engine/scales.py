"""Delayed scaling as Transformer Engine keeps it: opened, watched, saved and put back."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor

from lightning_fp.kernels.transformer_engine.kernel import (
    Engine,
    EngineHistory,
    TransformerEngineKernel,
    states,
)
from lightning_fp.kernels.transformer_engine.library import library
from lightning_fp.kernels.transformer_engine.recipe import RecipeSettings, delayed_of, make_recipe
from lightning_fp.layers.histories.delayed_scales import DelayedScales, first_device
from lightning_fp.layers.rank_layers import RankLayers
from lightning_fp.layers.switchable import SwitchableLayer
from lightning_fp.numerics import DelayedScaling, history_scale


class EngineScales(DelayedScales):
    """What `ScaleHistory` is for our own kernel, where Transformer Engine updates the scales.

    Histories and scales are its own tensors, updated by itself at the end of a forward (input and
    weight, all ranks together) and of a backward (grad_output). Here they are read and written, as
    plain tensors and in the order of `ScaleHistory`, so that a checkpoint of one continues in the
    other. A layer that comes to delayed scaling runs its first step in high precision, where its
    scales are found: Transformer Engine would begin, or go on after a pause, with useless ones.

    Args:
        config: how scales follow from a history.
        ranks: those that agree on scales; None: all.
    """

    def __init__(self, config: DelayedScaling, ranks: RankLayers | None = None) -> None:
        super().__init__(config, ranks)
        self._used: Tensor | None = None
        self._settings: RecipeSettings | None = None
        self._recipes: dict[RecipeSettings, Any] = {}

    # -- which layers ---------------------------------------------------------------------------

    def track(self, layers: Mapping[str, SwitchableLayer], amax_only: Collection[str] = ()) -> None:
        """See `DelayedScales.track`; layers of more than one recipe are refused."""
        settings = {_kernel(layer).settings for layer in layers.values()}
        if len(settings) > 1:
            raise ValueError(
                "layers under delayed scaling must share one recipe with Transformer Engine, which"
                f" reduces their amaxes together; got {len(settings)}:"
                f" {', '.join(sorted({layer.format.name for layer in layers.values()}))}"
            )
        for layer in set(self._layers.values()) - set(layers.values()):
            _engine(layer).history = None
        for layer in layers.values():
            engine = _engine(layer)
            engine.history = EngineHistory() if engine.history is None else engine.history
        self._begin(layers, amax_only)
        self._settings = next(iter(settings), None)
        given = None if self._settings is None else self._settings.given
        if given is not None:
            self.config = delayed_of(given.recipe)
        self._watch_from(first_device(layers.values()))
        self._used = None

    def release(self, names: Collection[str]) -> None:
        """See `DelayedScales.release`."""
        remaining = {name: each for name, each in self._layers.items() if name not in names}
        self._begin(remaining)
        self._watch_from(first_device(remaining.values()))
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
        group = self.ranks.group  # None: all ranks
        with engine.autocast(enabled=True, recipe=self._recipes[settings], group=group):
            yield

    @torch.no_grad()
    def fold(self) -> None:
        """After a backward: what Transformer Engine saw in it, before it is pushed on."""
        used, self._used = self._used, None
        if used is None or not self._layers:
            return
        newest = torch.zeros_like(used)
        for row, memory in enumerate(self._memories()):
            if memory.lives:
                newest[row] = torch.cat([history[-1] for _, history in states(memory.module)])
        # Whether there was inf or NaN, not how many: it keeps no count.
        self.amax = newest
        self._watch(newest, (~torch.isfinite(newest)).float(), used)

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
        names = self.names
        amax = self.ranks.largest(amax, [names[row] for row in rows])
        # Input and weight must have been seen; a frozen model has no gradients, and needs no scale.
        there = ((amax > 0) & torch.isfinite(amax))[:, :2].all(dim=1)
        ready: list[bool] = there.tolist()
        for row, memory, largest, is_ready in zip(rows, cold, amax, ready, strict=True):
            memory.seen = None
            if is_ready:
                history = torch.zeros(3, self.config.history_len, device=device)
                history[:, 0] = torch.where(torch.isfinite(largest), largest, 0.0)
                self._give(row, history, None)

    def _give(self, row: int, history: Tensor, scales: Tensor | None) -> None:
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

    # -- replays --------------------------------------------------------------------------------

    @contextmanager
    def untouched(self) -> Generator[None, None, None]:
        """Whatever runs in the block leaves no trace in histories and scales."""
        memories = self._memories()
        seen = [None if memory.seen is None else memory.seen.clone() for memory in memories]
        tensors = [[tensor.clone() for tensor in _tensors(memory)] for memory in memories]
        kept = list(zip(memories, map(copy, memories), seen, tensors, strict=True))
        used, self._used = self._used, None
        headroom, watched = self.headroom, self._recorded.clone()
        try:
            yield
        finally:
            self.headroom, self._recorded, self._used = headroom, watched, used
            for memory, before, largest, old in kept:
                vars(memory).update(vars(before), seen=largest)
                for tensor, value in zip(_tensors(memory), old, strict=True):
                    tensor.copy_(value)

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
    def _load(self, state: Mapping[str, Any]) -> None:
        saved: Tensor = state["history"]  # also one of `ScaleHistory`, which has no scales
        scales: Tensor | None = state.get("scales")
        rows = {name: index for index, name in enumerate(state["layers"])}
        for row, (name, memory) in enumerate(zip(self._layers, self._memories(), strict=True)):
            if name not in rows:
                continue
            history = saved[rows[name]].to(self._limits.device)
            given = None if scales is None else scales[rows[name]].to(self._limits.device)
            seen = history[:2, 0] if given is None else given[:2]
            if bool((seen > 0).all()):
                self._give(row, history, given)
            else:
                memory.cold, memory.seen, memory.pending = True, None, None

    def _read(self, memory: EngineHistory) -> tuple[Tensor, Tensor]:
        """History [3, history_len], newest first, and scales [3]; zeros while there are none."""
        device, width = self._limits.device, self.config.history_len
        if memory.pending is not None:
            forward, backward = memory.pending["scaling_fwd"], memory.pending["scaling_bwd"]
            scales = torch.cat([forward[0][:2], backward[0][:1]])
            theirs = torch.cat([forward[1][:, :2], backward[1][:, :1]], dim=1)
        elif not memory.lives:
            return torch.zeros(3, width, device=device), torch.zeros(3, device=device)
        else:
            scales = torch.cat([scale for scale, _ in states(memory.module)])
            theirs = torch.cat([history for _, history in states(memory.module)], dim=1)
        history = torch.zeros(3, width, device=theirs.device)
        history[:, :-1] = theirs[1:].flip(0).t()
        return history, scales.clone()

    def _memories(self) -> list[EngineHistory]:
        histories = [_engine(layer).history for layer in self._layers.values()]
        return [history for history in histories if history is not None]

    def _scales(self) -> Tensor:
        """float32 [layers, 3], 0 where there are none yet."""
        return torch.stack([self._read(memory)[1] for memory in self._memories()])


def _engine(layer: SwitchableLayer) -> Engine:
    if not isinstance(layer.memory, Engine):
        raise TypeError(f"layer {layer.fqn!r}: not multiplied by Transformer Engine")
    return layer.memory


def _tensors(memory: EngineHistory) -> list[Tensor]:
    """What Transformer Engine itself has of a layer."""
    return [tensor for pair in states(memory.module) for tensor in pair] if memory.lives else []


def _kernel(layer: SwitchableLayer) -> TransformerEngineKernel:
    kernel = layer.kernel
    if not isinstance(kernel, TransformerEngineKernel):
        raise TypeError(f"layer {layer.fqn!r}: not multiplied by Transformer Engine")
    return kernel
