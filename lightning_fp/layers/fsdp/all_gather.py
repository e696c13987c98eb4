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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fp.kernels import NativeKernel
from lightning_fp.kernels.gathered_casts import WeightOperand, identity
from lightning_fp.kernels.memory import WEIGHT, OperandMemory
from lightning_fp.layers.fsdp.message import Part, WeightScale, pack, unpack
from lightning_fp.layers.linear import FPLinear, is_switchable_linear
from lightning_fp.numerics import tensor_amax
from lightning_fp.numerics.devices import has_dtype

DTYPES = torch.float32, torch.bfloat16
"""In which FSDP2 may gather a weight that is sent in FP8. fp16's subnormals are so far apart that
what stands for a cast need not have the same cast."""

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element."""


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter of a group that FSDP2 gathers together."""

    parameter: Any
    """FSDP2's own record of it, an FSDPParam."""

    layer: FPLinear | None
    """The layer whose weight it is, and nobody else's."""

    @property
    def numel(self) -> int:
        """Of its padded shard."""
        return self.parameter._sharded_param_data.numel()

    @property
    def wants_fp8(self) -> bool:
        """Whether the forward that begins here uses nothing of it but its cast."""
        layer, parameter = self.layer, self.parameter
        if layer is None or not is_switchable_linear(layer):
            return False
        kernel, phase = layer.kernel, layer.phase
        return (
            isinstance(kernel, NativeKernel)
            and not (phase.gathers_high or phase.stays_high(layer.training))
            and not (phase.evaluates(layer.training) or layer.collect)
            and (phase.evaluating is False or phase.away is None)
            and self.dtype in DTYPES
            and has_dtype(kernel.weight, parameter.device)
            and hasattr(parameter, "param_dtype")  # not before FSDP2's first forward
        )

    @property
    def dtype(self) -> torch.dtype:
        """In which it is gathered where it is not in FP8."""
        return self.parameter.mp_policy.param_dtype or self.parameter.sharded_param.dtype

    def measure(self) -> Shard:
        """This rank's shard, as it is now."""
        values: Tensor = self.parameter._sharded_param_data
        amax = tensor_amax(values).to(self.dtype)
        if self.layer is not None:
            amax = self.layer.kernel.exported(amax)  # roundings keep the order
        device = self.parameter.device
        return Shard(
            place=identity(values),
            bits=_sum_of_bits(values).to(device),
            amax=torch.nan_to_num(amax.float(), nan=torch.inf).to(device),
        )

    def scale(self, amax: Tensor) -> WeightScale | None:
        """How its layer casts the whole weight, of which all ranks now know the amax."""
        if self.layer is None or not isinstance(kernel := self.layer.kernel, NativeKernel):
            return None
        memory = self.layer.memory if kernel.delayed else None
        scales = memory.scales if isinstance(memory, OperandMemory) else None
        scale = kernel.scale(amax, scales, WEIGHT, kernel.weight)
        return WeightScale(kernel=kernel, scale=scale, amax=amax, scales=scales)

    def is_cast_by(self, how: WeightScale, scales: tuple[int, int] | None) -> bool:
        """Whether its layer would still cast it so.

        Args:
            how: it was cast.
            scales: the identity that its layer's delayed scales had then.
        """
        if self.layer is None or self.layer.kernel != how.kernel:
            return False
        memory = self.layer.memory if how.kernel.delayed else None
        now = memory.scales if isinstance(memory, OperandMemory) else None
        return identity(now) == scales


class Shard(NamedTuple):
    """What tells whether a shard was written to, and how large its values are."""

    place: tuple[int, int] | None
    """Its identity, which changes with most writes."""

    bits: Tensor
    """int64 scalar, their sum: writes by way of `.data` change no version."""

    amax: Tensor
    """float32 scalar, inf where something is not finite."""


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
        return [index for index, member in enumerate(members) if member.wants_fp8]

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
        return shard, kept.shard.bits != shard.bits

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


def _sum_of_bits(values: Tensor) -> Tensor:
    """int64 scalar; of eight bytes at a time where that fits, which is several times as fast."""
    whole = values.nbytes % 8 == 0 and values.storage_offset() * values.itemsize % 8 == 0
    integers = torch.int64 if whole else INTEGERS[values.itemsize]
    return values.view(integers).sum(dtype=torch.int64)


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
