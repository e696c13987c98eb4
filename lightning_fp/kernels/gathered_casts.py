"""Casts of a weight that FSDP2 has gathered: made where they are first used, freed with the weight.

FSDP2 frees a gathered weight by taking away its memory, and the memory of every tensor in a list of
its own. A cast is put into that list. So one cast serves all micro-batches, recomputations and
backwards between a gather and the next reshard, and of what sharding saves nothing is kept longer.
Autograd must save no such cast: it would find it without its memory.

For eager mode alone: compiled code may not write attributes in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Cast = TypeVar("Cast")


class GatheredWeight(Protocol):
    """What FSDP2 has of a weight, whole or sharded."""

    all_gather_outputs: list[Tensor]
    """What the weight was gathered into, flat; without memory while it is sharded."""

    _unsharded_inner_tensors: list[Tensor]
    """What loses its memory together with it."""


@dataclass(frozen=True, slots=True)
class WeightOperand:
    """The cast of a weight with one scale."""

    cast: Tensor
    """FP8 [out_features, in_features]."""

    scale: Tensor
    """float32 scalar."""

    amax: Tensor | None = None
    """float32 scalar; None where it was not asked for, in backward."""

    row: Tensor | None = None
    """What each call records of the weight; None: it follows from the amax."""

    scales: Tensor | None = None
    """Those of the layer, kept so that no others can come to lie in their place."""


@dataclass(frozen=True, slots=True)
class _Kept:
    cast: Any
    freed: tuple[Tensor, ...]
    version: int


class GatheredCasts:
    """The casts of one layer's weight, as long as it is gathered.

    Args:
        weight: FSDP2's.
    """

    def __init__(self, weight: GatheredWeight) -> None:
        self._weight = weight
        self._kept: dict[Hashable, _Kept] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the layer has none: its weight is no other's."""
        return type(None), ()

    def of(
        self,
        weight: Tensor,
        key: Hashable,
        make: Callable[[], Cast],
        freed: Callable[[Cast], Sequence[Tensor]],
    ) -> Cast:
        """The cast that is kept, or a new one.

        Args:
            weight: what is cast, as the layer has it now.
            key: tells apart the ways to cast it.
            make: casts it.
            freed: of a cast the tensors that are freed with the weight: that nobody else has, and
                autograd does not save.
        """
        kept = self.find(weight, key)
        if kept is None:
            kept = make()
            self.keep(weight, (key,), kept, freed(kept))
        return kept

    def find(self, weight: Tensor, key: Hashable) -> Any:
        """The cast that is kept of this weight; None if there is none."""
        kept = self._kept.get(key)
        if kept is None or not self._is_gathered(weight) or kept.version != weight._version:
            return None
        if not _lives(kept):
            return None
        for each in kept.freed:
            if each.is_cuda:  # it may have been made on a stream of FSDP2's
                each.record_stream(torch.cuda.current_stream(each.device))
        return kept.cast

    def keep(
        self, weight: Tensor, keys: Sequence[Hashable], cast: Any, freed: Sequence[Tensor]
    ) -> None:
        """Keep a cast until the weight is freed; nothing, where FSDP2 has not gathered it."""
        if self._is_gathered(weight):
            self._keep(keys, _Kept(cast, tuple(freed), weight._version))

    def arrives(self, keys: Sequence[Hashable], cast: Any, freed: Sequence[Tensor]) -> None:
        """Keep a cast that is gathered beside the weight, which is about to be there."""
        unsharded = getattr(self._weight, "_unsharded_param", None)  # None before the first gather
        local = getattr(unsharded, "_local_tensor", unsharded)
        self._keep(keys, _Kept(cast, tuple(freed), 0 if local is None else local._version))

    def _keep(self, keys: Sequence[Hashable], kept: _Kept) -> None:
        there = {key: each for key, each in self._kept.items() if _lives(each) and key not in keys}
        self._kept = {**there, **dict.fromkeys(keys, kept)}
        before = {id(each) for each in self._ours}
        others = [each for each in self._weight._unsharded_inner_tensors if id(each) not in before]
        self._ours = list({id(x): x for each in self._kept.values() for x in each.freed}.values())
        self._weight._unsharded_inner_tensors = [*others, *self._ours]

    _ours: Sequence[Tensor] = ()

    def _is_gathered(self, weight: Tensor) -> bool:
        """Whether it is what FSDP2 has gathered, and no other that the layer was lent."""
        if weight.is_inference():
            return False
        gathered = self._weight.all_gather_outputs
        return (
            len(gathered) == 1
            and _has_memory(gathered[0])
            and gathered[0].data_ptr() == weight.data_ptr()
        )


def identity(x: Tensor | None) -> tuple[int, int] | None:
    """Tells a tensor from all others that live at the same time, whoever refers to it."""
    return None if x is None else (x.data_ptr(), x._version)


def _has_memory(x: Tensor) -> bool:
    return x.untyped_storage().size() > 0


def _lives(kept: _Kept) -> bool:
    return all(_has_memory(each) for each in kept.freed)
