"""Ranks agree on the amaxes of all weights where a forward begins: one collective for all of them.

There, and not after the optimizer's step: what is cast must be what was measured. In between
weights may be restored, loaded, clipped or pruned, perhaps by one rank in its own shards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_fp.layers.fsdp.all_gather import FP8AllGather, backward_runs

Gather: TypeAlias = tuple[FP8AllGather, dist.ProcessGroup]


class Agreement:
    """Stands around the forwards of a model's sharded modules.

    Args:
        gathers: of sharded modules, with the ranks that each gathers from.
    """

    def __init__(self, gathers: Mapping[FSDPModule, Gather]) -> None:
        self._gathers = dict(gathers)
        self._depth = 0

    def stand_around(self, module: FSDPModule) -> None:
        """Hear of its forwards, before FSDP2 does."""
        module.register_forward_pre_hook(self._before, prepend=True)  # pyright: ignore
        module.register_forward_hook(self._after, always_call=True)  # pyright: ignore

    @torch._dynamo.disable
    def _before(self, module: Any, args: Any) -> None:
        if backward_runs():
            return
        self._depth += 1
        if self._depth == 1:
            self._agree(module, training=torch.is_grad_enabled())
        gather, _ = self._gathers.get(module, (None, None))
        if gather is not None and gather.must_gather_again:
            module.reshard()

    @torch._dynamo.disable
    def _after(self, module: Any, args: Any, output: Any) -> None:
        if backward_runs():
            return
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            for gather, _ in self._gathers.values():
                gather.agreed = None

    @torch.no_grad()
    def _agree(self, outermost: nn.Module, *, training: bool) -> None:
        wanted: dict[dist.ProcessGroup, list[tuple[FP8AllGather, int]]] = defaultdict(list)
        for module in outermost.modules():
            if isinstance(module, FSDPModule) and module in self._gathers:
                gather, group = self._gathers[module]
                wanted[group] += [(gather, index) for index in gather.begin(training=training)]
        for group, members in wanted.items():
            if not members:
                continue
            shards = [gather.measure(index) for gather, index in members]
            amaxes = torch.stack([shard.amax for shard, _ in shards])
            written = torch.stack(
                [torch.as_tensor(anew, device=amaxes.device).float() for _, anew in shards]
            )
            everywhere = torch.stack([amaxes, written])
            dist.all_reduce(everywhere, dist.ReduceOp.MAX, group=group)
            # Only where a cast might do once more does the host wait to hear of the others'.
            anew = [True] * len(members)
            if any(isinstance(here, Tensor) for _, here in shards):
                anew = everywhere[1].bool().tolist()
            found: dict[FP8AllGather, dict[int, Tensor]] = defaultdict(dict)
            unchanged: dict[FP8AllGather, set[int]] = defaultdict(set)
            for (gather, index), amax, now in zip(members, everywhere[0], anew, strict=True):
                found[gather][index] = amax
                if not now:
                    unchanged[gather].add(index)
            for gather, of_gather in found.items():
                gather.agree(of_gather, unchanged[gather])
                if amaxes.is_cuda:
                    gather.ready = torch.cuda.current_stream(amaxes.device).record_event()
