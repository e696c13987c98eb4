"""What an all-gather carries of a rank's shards: weights in FP8, everything else as it is.

What arrives is written where FSDP2 looks for high precision: the values that the casts stand for.
Cast again with the same scale these give the same FP8 numbers, and their amax is the weight's, so
that products in FP8 are bit for bit those of weights that were gathered whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fp.kernels import NativeKernel
from lightning_fp.kernels.gemm import cast_operand, widen
from lightning_fp.numerics import FloatFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightScale:
    """How a weight is cast by all ranks."""

    kernel: NativeKernel
    """The layer's."""

    scale: Tensor
    """float32 scalar."""

    amax: Tensor
    """float32 scalar, of the whole weight; inf where it is not finite."""

    scales: Tensor | None
    """The layer's delayed scales, if it has any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One parameter of a group that is gathered together."""

    numel: int
    """Of its padded shard."""

    scale: WeightScale | None
    """None: gathered as it is."""

    cast: Tensor | None = None
    """What an earlier message has of it, uint8, of the same values with the same scale."""


def pack(shards: Tensor, parts: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
    """What a rank sends.

    Args:
        shards: [numel], this rank's of all parameters, one after the other.
        parts: which parameters these are.

    Returns:
        uint8, one-dimensional, and the part of each parameter in it.
    """
    sent: list[Tensor] = []
    for shard, part in zip(shards.split([part.numel for part in parts]), parts, strict=True):
        if part.cast is not None:
            shard = part.cast
        elif (how := part.scale) is not None:
            exported = how.kernel.exported(shard)
            shard, _ = cast_operand(exported, how.scale, how.kernel.weight, None)
        sent.append(shard.view(torch.uint8))
    message = torch.cat(sent)
    return message, list(message.split([each.numel() for each in sent]))


def unpack(arrived: Tensor, parts: Sequence[Part], into: Tensor) -> list[Tensor | None]:
    """Write what all ranks have sent to where it is looked for.

    Args:
        arrived: uint8 [ranks, bytes].
        parts: see `pack`.
        into: [ranks, numel] in the dtype of the shards.

    Returns:
        Of each part the FP8 numbers of the whole parameter, flat; None where it was sent as it is.
    """
    sizes = [part.numel * (into.itemsize if part.scale is None else 1) for part in parts]
    places = into.split([part.numel for part in parts], dim=1)
    casts: list[Tensor | None] = []
    for sent, place, part in zip(arrived.split(sizes, dim=1), places, parts, strict=True):
        whole = sent.contiguous()
        if (how := part.scale) is None:
            place.copy_(whole.view(into.dtype))
            casts.append(None)
        else:
            cast = whole.view(how.kernel.weight.dtype or torch.uint8)
            place.copy_(values_of(cast, how.scale, how.amax, how.kernel.weight))
            casts.append(cast.flatten())
    return casts


def values_of(cast: Tensor, scale: Tensor, amax: Tensor, format: FloatFormat) -> Tensor:
    """The values that a cast stands for; the largest are the amax itself, which has the same cast.

    Args:
        cast: FP8, any shape.
        scale: float32 scalar.
        amax: float32 scalar, of what was cast.
        format: of the cast.

    Returns:
        float32, same shape; NaN if `amax` is not finite.
    """
    exact = widen(cast, format, torch.float32)
    largest = widen(cast_operand(amax, scale, format, None)[0], format, torch.float32)
    values = torch.where(
        exact.abs() == largest, torch.copysign(amax, exact), exact * scale.reciprocal()
    )
    return torch.where(torch.isfinite(amax), values, torch.nan)
