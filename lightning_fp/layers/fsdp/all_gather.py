"""An all-gather whose format follows the layers, forward by forward.

It is handed to FSDP2 by `FSDPModule.set_custom_all_gather`. Sharded parameters, gathered weights,
checkpoints and optimizers see nothing of it: it changes what goes from rank to rank. In FP8 go the
weights of layers with one scale per tensor, in training forwards and their backwards. Where the
values are needed themselves they go as they are: in evaluation, in replays, where a step's
statistics are taken, and of layers in any other format.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_fp.kernels.gathered_casts import WeightOperand, identity
from lightning_fp.layers.fsdp.member import Member, Shard
from lightning_fp.layers.fsdp.message import Part, WeightScale, pack, unpack
from lightning_fp.layers.fsdp.reads import Watched


@dataclass(frozen=True, slots=True)
class Kept:
    """The cast of a shard, until it is written to or cast otherwise."""

    shard: Shard
    how: WeightScale
    scales: tuple[int, int] | None
    cast: Tensor
    """uint8, a part of the message it was sent in."""


class Sent(NamedTuple):
    """What this rank has sent for a forward, and sends again for its backward."""

    parts: tuple[Part, ...]
    bytes: Tensor


class FP8AllGather:
    """Gathers one group of parameters, those that may be in FP8 as they are asked for.

    Args:
        plain: torch's own, which gathers everything else.
        members: the group's parameters, in FSDP2's order.
    """

    def __init__(self, plain: Any, members: Sequence[Member]) -> None:
        self.plain = plain
        self.members = tuple(members)
        self.agreed: tuple[Part, ...] | None = None
        """How the forward that runs now gathers; None: as it is."""
        self.ready: torch.Event | None = None
        """On CUDA: when what was agreed is known, on whichever stream FSDP2 gathers."""
        self._sent: Sent | None = None
        self._kept: dict[int, Kept] = {}
        self._shards: dict[int, Shard] = {}
        """As the forward that runs now has found them."""
        self.reads: dict[int, str] = {}
        """Members that were read besides their layers' products on this rank, and by what."""
        self._high: set[int] = set()
        """Members that are read so on any rank."""
        self._in_fp8: frozenset[int] = frozenset()
        """Members of which the last gather brought the FP8 numbers alone."""

    def begin(self, *, training: bool) -> list[int]:
        """A forward begins.

        Args:
            training: whether a backward may follow.

        Returns:
            The members that it wants in FP8.
        """
        self.agreed = self._sent = None
        members = self.members if training else ()
        for index, member in enumerate(members):
            gathered = None if member.layer is None else member.layer.gathered
            if gathered is not None and gathered.values_used:
                self.reads.setdefault(index, "second derivatives")
        return [
            index
            for index, member in enumerate(members)
            if member.wants_fp8 and index not in self._high
        ]

    def gather_high(self, index: int) -> tuple[str, str]:
        """From here on a member is gathered as it is.

        Returns:
            Its layer, and what reads it.
        """
        self._high.add(index)
        self._kept.pop(index, None)
        return self.members[index].fqn, self.reads.get(index, "on another rank")

    def watched(self) -> list[Watched]:
        """The members whose reads this forward shows."""
        return [
            Watched(
                parameter=each.parameter,
                multiplies=partial(_multiplies, each),
                read=partial(self.reads.setdefault, index),
            )
            for index, each in enumerate(self.members)
            if each.is_watched and index not in self._high
        ]

    def still_gathered(self) -> list[Watched]:
        """Those of them that are gathered, now that the forward is over."""
        return [
            weight
            for weight in self.watched()
            if weight.parameter.sharded_state.name == "UNSHARDED"
            and type(weight.parameter._unsharded_param) is nn.Parameter
        ]

    def measure(self, index: int) -> tuple[Shard, bool | Tensor]:
        """A member's shard now, and whether it must be cast anew: True, or what the device finds.

        Args:
            index: of the member.
        """
        member, kept = self.members[index], self._kept.get(index)
        shard = self._shards[index] = member.measure()
        if kept is None or kept.shard.place != shard.place:
            return shard, True
        if not member.is_cast_by(kept.how, kept.scales):
            return shard, True
        return shard, kept.shard.checksum != shard.checksum

    def agree(self, amaxes: dict[int, Tensor], unchanged: AbstractSet[int]) -> None:
        """How this forward gathers.

        Args:
            amaxes: of the members that are gathered in FP8, over all ranks.
            unchanged: those of them that no rank has to cast anew.
        """
        parts: list[Part] = []
        for index, member in enumerate(self.members):
            kept = self._kept.get(index) if index in unchanged else None
            if kept is not None:
                parts.append(Part(numel=member.numel, scale=kept.how, cast=kept.cast))
                continue
            self._kept.pop(index, None)
            scale = member.scale(amaxes[index]) if index in amaxes else None
            parts.append(Part(numel=member.numel, scale=scale))
        self.agreed = tuple(parts)

    @property
    def must_gather_again(self) -> bool:
        """Whether what lies gathered lacks what the forward that begins here needs."""
        gathered = self.members[0].parameter.all_gather_outputs
        if not self._in_fp8 or not gathered or gathered[0].untyped_storage().size() == 0:
            return False
        parts = self.agreed
        return any(parts is None or parts[index].scale is None for index in self._in_fp8)

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """See torch's `AllGather`, which has no public name."""
        return self.plain.allocate(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """See torch's `AllGather`."""
        if self.ready is not None:
            torch.cuda.current_stream(input_tensor.device).wait_event(self.ready)
        sent = self._to_send(input_tensor)
        if sent is None or async_op:
            self._in_fp8 = frozenset()
            return self.plain(output_tensor, input_tensor, group, async_op)
        ranks = group.size()
        arrived = sent.bytes.new_empty(ranks * sent.bytes.numel())
        self.plain(arrived, sent.bytes, group, False)
        casts = unpack(arrived.view(ranks, -1), sent.parts, output_tensor.view(ranks, -1))
        self._in_fp8 = frozenset(i for i, part in enumerate(sent.parts) if part.scale is not None)
        for member, part, cast in zip(self.members, sent.parts, casts, strict=True):
            if part.scale is not None and cast is not None:
                _hand_over(member, part.scale, cast)
        return None

    def _to_send(self, shards: Tensor) -> Sent | None:
        """None: as they are."""
        if backward_runs():
            return self._sent
        parts = self.agreed
        if parts is None or all(part.scale is None for part in parts):
            return None
        # Not where FSDP2 gathers bytes of several dtypes, or over a smaller mesh after forward.
        dtypes = {member.dtype for member in self.members}
        if dtypes != {shards.dtype} or sum(part.numel for part in parts) != shards.numel():
            return None
        message, pieces = pack(shards, parts)
        for index, (part, piece) in enumerate(zip(parts, pieces, strict=True)):
            if part.scale is not None:
                scales = identity(part.scale.scales)
                self._kept[index] = Kept(self._shards[index], part.scale, scales, piece)
        self._sent = Sent(parts, message)
        return self._sent


def _multiplies(member: Member) -> bool:
    gathered = None if member.layer is None else member.layer.gathered
    return gathered is not None and gathered.multiplying


def _hand_over(member: Member, how: WeightScale, cast: Tensor) -> None:
    """The layer multiplies with what has arrived, and casts nothing."""
    gathered = None if member.layer is None else member.layer.gathered
    if gathered is None:
        return
    shape = member.parameter._orig_size
    weight = cast[: shape.numel()].view(shape)
    keys = [(how.kernel, identity(how.scales), in_full) for in_full in (False, True)]
    operand = WeightOperand(weight, how.scale, how.amax, None, how.scales)
    gathered.arrives((*keys, (how.kernel, identity(how.scale))), operand, (weight,))


def backward_runs() -> bool:
    """Whether autograd is at work in this thread, recomputations of checkpointing included."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore
