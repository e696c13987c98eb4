"""Ranks agree on all weights where a forward begins: one collective for all of them.

On their amaxes, on which were written to, and on which are read by others than their layers. There,
and not after the optimizer's step: what is cast must be what was measured. In between weights may
be restored, loaded, clipped or pruned, perhaps by one rank in its own shards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

from lightning_fp.layers.fsdp.all_gather import FP8AllGather, backward_runs
from lightning_fp.layers.fsdp.reads import LooksOn, have_rest, have_tell
from lightning_fp.layers.layer_names import fold_names

Gather: TypeAlias = tuple[FP8AllGather, dist.ProcessGroup]


class Agreement:
    """Stands around the forwards of a model's sharded modules.

    It looks on at the first training forward, which gathers weights as they are, and at the second,
    fourth, eighth and so on: what begins to read weights later is found there.

    Args:
        gathers: of sharded modules, with the ranks that each gathers from.
        tell: told a sentence where weights are read by others than their layers.
    """

    def __init__(self, gathers: Mapping[FSDPModule, Gather], tell: Callable[[str], object]) -> None:
        self._gathers = dict(gathers)
        self._tell = tell
        self._depth = 0
        self._forwards = 0
        """In training, so far."""
        self._looked = False
        """Whether ranks have looked on since they last heard of each other."""
        self._looks: LooksOn | None = None
        self._telling: list[nn.Parameter] = []

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
            self._rest()
            self._agree(module, training=torch.is_grad_enabled())
            if torch.is_grad_enabled():
                self._look(module)
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
            if self._looks is not None:
                self._looks.__exit__(None, None, None)
                self._looks = None
                self._look_further(output)

    # -- reads ----------------------------------------------------------------------------------

    def _look(self, outermost: nn.Module) -> None:
        """See what reads weights in this forward, if it is one of those."""
        weights = [each for gather, _ in self._of(outermost) for each in gather.watched()]
        if not weights:
            return
        self._forwards += 1
        if self._forwards.bit_count() == 1:
            self._looked = True
            self._looks = LooksOn(weights)
            self._looks.__enter__()

    def _look_further(self, output: Any) -> None:
        """Weights that stay gathered until backward are looked at until then."""
        for gather, _ in self._gathers.values():
            for weight in gather.still_gathered():
                have_tell(weight.parameter._unsharded_param, weight.read)
                self._telling.append(weight.parameter._unsharded_param)
        if self._telling:
            for each in tree_leaves(output):
                if isinstance(each, Tensor) and each.requires_grad:
                    each.register_hook(lambda _: self._rest())

    def _rest(self) -> None:
        for weight in self._telling:
            have_rest(weight)
        self._telling.clear()

    def _say(self, layers: Sequence[str], by: str) -> None:
        late = "" if self._forwards == 1 else "; until now they may have found FP8's values there"
        self._tell(
            "FSDP2 gathers weights as they are, and not in FP8, where others than their layers"
            f" read them ({by}): {', '.join(fold_names(layers))}{late}"
        )

    # -- values ---------------------------------------------------------------------------------

    def _of(self, outermost: nn.Module) -> list[Gather]:
        return [
            self._gathers[module]
            for module in outermost.modules()
            if isinstance(module, FSDPModule) and module in self._gathers
        ]

    @torch.no_grad()
    def _agree(self, outermost: nn.Module, *, training: bool) -> None:
        wanted: dict[dist.ProcessGroup, list[tuple[FP8AllGather, int]]] = defaultdict(list)
        for gather, group in self._of(outermost):
            wanted[group] += [(gather, index) for index in gather.begin(training=training)]
        read: dict[str, list[str]] = defaultdict(list)
        for group, members in wanted.items():
            if members:
                for layer, by in self._agree_in(group, members):
                    read[by].append(layer)
        for by, layers in read.items():
            self._say(layers, by)
        if any(wanted.values()):
            self._looked = False

    def _agree_in(
        self, group: dist.ProcessGroup, members: list[tuple[FP8AllGather, int]]
    ) -> list[tuple[str, str]]:
        """Returns the layers whose weights turn out to be read, and by what."""
        shards = [gather.measure(index) for gather, index in members]
        amaxes = torch.stack([shard.amax for shard, _ in shards])
        written = [torch.as_tensor(anew, device=amaxes.device) for _, anew in shards]
        read = [index in gather.reads for gather, index in members]
        everywhere = torch.stack([amaxes, torch.stack(written).float(), amaxes.new_tensor(read)])
        dist.all_reduce(everywhere, dist.ReduceOp.MAX, group=group)
        # The host waits only where a cast might do once more, and after forwards looked on at.
        anew = [True] * len(members)
        if any(isinstance(here, Tensor) for _, here in shards):
            anew = everywhere[1].bool().tolist()
        if self._looked or not everywhere.is_cuda:
            read = everywhere[2].bool().tolist()
        else:
            read = [False] * len(members)
        found: dict[FP8AllGather, dict[int, Tensor]] = defaultdict(dict)
        unchanged: dict[FP8AllGather, set[int]] = defaultdict(set)
        high: list[tuple[str, str]] = []
        for (gather, index), amax, cast_anew, is_read in zip(
            members, everywhere[0], anew, read, strict=True
        ):
            if is_read:
                high.append(gather.gather_high(index))
            else:
                found[gather][index] = amax
                if not cast_anew:
                    unchanged[gather].add(index)
        for gather, of_gather in found.items():
            gather.agree(of_gather, unchanged[gather])
            if amaxes.is_cuda:
                gather.ready = torch.cuda.current_stream(amaxes.device).record_event()
        return high
