"""One parameter of a group that FSDP2 gathers together: whether it may go in FP8, and its shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fp.kernels import NativeKernel
from lightning_fp.kernels.gathered_casts import identity
from lightning_fp.kernels.memory import WEIGHT, OperandMemory
from lightning_fp.layers.fsdp.message import WeightScale
from lightning_fp.layers.linear import FPLinear, is_switchable_linear
from lightning_fp.numerics import tensor_amax
from lightning_fp.numerics.devices import has_dtype

DTYPES = torch.float32, torch.bfloat16
"""In which FSDP2 may gather a weight that is sent in FP8. fp16's subnormals are so far apart that
what stands for a cast need not have the same cast."""

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element."""

LANES = 251
"""In how many sums a checksum is made; prime, so that rows that change places change lanes."""


class Shard(NamedTuple):
    """What tells whether a shard was written to, and how large its values are."""

    place: tuple[int, ...]
    """Where it is, its versions, and the step: what changes with most writes, and needs no look."""

    checksum: Tensor
    """int64 scalar: fused optimizers, and writes by way of `.data`, change no version."""

    amax: Tensor
    """float32 scalar, inf where something is not finite."""


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
    def fqn(self) -> str:
        """Of its layer."""
        return "" if self.layer is None else self.layer.fqn

    @property
    def is_watched(self) -> bool:
        """Whether the forward that begins here shows who else reads it."""
        layer = self.layer
        if layer is None or not is_switchable_linear(layer) or layer.gathered is None:
            return False
        return not (layer.phase.gathers_high or layer.phase.stays_high(layer.training))

    @property
    def wants_fp8(self) -> bool:
        """Whether the forward that begins here uses nothing of it but its cast, as far as known."""
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
        parameter = self.parameter.sharded_param
        local = getattr(parameter, "_local_tensor", parameter)
        steps = 0 if self.layer is None or not parameter.requires_grad else self.layer.phase.steps
        amax = tensor_amax(values).to(self.dtype)
        if self.layer is not None:
            amax = self.layer.kernel.exported(amax)  # roundings keep the order
        device = self.parameter.device
        return Shard(
            place=(local.data_ptr(), parameter._version, local._version, steps),
            checksum=checksum(values).to(device),
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


def checksum(values: Tensor) -> Tensor:
    """Tells tensors apart whose values differ, or lie in another order; int64 scalar.

    Args:
        values: one-dimensional, of any floating-point dtype.
    """
    # Eight bytes at a time where that fits, which is several times as fast.
    whole = values.nbytes % 8 == 0 and values.storage_offset() * values.itemsize % 8 == 0
    integers = values.view(torch.int64 if whole else INTEGERS[values.itemsize])
    rest = integers.numel() % LANES
    lanes = integers[: integers.numel() - rest].view(-1, LANES).sum(0, dtype=torch.int64)
    lanes[:rest] += integers[integers.numel() - rest :] * LANES
    return (lanes * torch.arange(1, LANES + 1, device=values.device)).sum()
