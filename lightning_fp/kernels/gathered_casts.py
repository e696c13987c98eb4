"""Casts of a weight that FSDP2 has gathered: made where they are first used, freed with the weight.

FSDP2 frees a gathered weight by taking away its memory, and the memory of every tensor in a list of
its own. A cast is put into that list. So one cast serves all micro-batches, recomputations and
backwards between a gather and the next reshard, and of what sharding saves nothing is kept longer.
Autograd must save no such cast: it would find it without its memory.

For eager mode alone: compiled code may not write attributes in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
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


class KeptCasts(Protocol):
    """Where casts of a gathered weight are kept, or of a part of it."""

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
        ...

    def find(self, weight: Tensor, key: Hashable) -> Any:
        """The cast that is kept of this weight; None if there is none."""
        ...

    def keep(
        self, weight: Tensor, keys: Sequence[Hashable], cast: Any, freed: Sequence[Tensor]
    ) -> None:
        """Keep a cast until the weight is freed; nothing, where FSDP2 has not gathered it."""
        ...

    def use_values(self) -> None:
        """Note that something is computed from the weight's own values, and not of its cast."""
        ...

    def part(self, weight: Tensor, which: Hashable) -> KeptCasts:
        """Where those of a part of it are kept, which has products of its own.

        Args:
            weight: the whole, which is looked at in place of the part.
            which: tells the part from all others.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Kept:
    cast: Any
    freed: tuple[Tensor, ...]
    version: int


class GatheredCasts(KeptCasts):
    """The casts of one layer's weight, as long as it is gathered.

    Args:
        weight: FSDP2's.
    """

    def __init__(self, weight: GatheredWeight) -> None:
        self._weight = weight
        self._kept: dict[Hashable, _Kept] = {}
        self._ours: list[Tensor] = []
        self.multiplying = False
        """Whether the layer's own product is being computed."""
        self.values_used = False
        """Whether it was computed from values that the cast has not, as second derivatives are."""

    @contextmanager
    def own_product(self) -> Generator[None, None, None]:
        """Within, what reads the weight is its layer."""
        self.multiplying = True
        try:
            yield
        finally:
            self.multiplying = False

    def use_values(self) -> None:
        """See `KeptCasts.use_values`."""
        self.values_used = True

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
        """See `KeptCasts.of`."""
        kept = self.find(weight, key)
        if kept is None:
            kept = make()
            self.keep(weight, (key,), kept, freed(kept))
        return kept

    def find(self, weight: Tensor, key: Hashable) -> Any:
        """See `KeptCasts.find`."""
        kept = self._kept.get(key)
        if kept is None or not self.is_of(weight) or kept.version != weight._version:
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
        """See `KeptCasts.keep`."""
        if self.is_of(weight):
            self._keep(keys, _Kept(cast, tuple(freed), weight._version))

    def part(self, weight: Tensor, which: Hashable) -> GatheredPart:
        """See `KeptCasts.part`."""
        return GatheredPart(self, weight, which)

    def arrives(self, keys: Sequence[Hashable], cast: Any, freed: Sequence[Tensor]) -> None:
        """Keep a cast that is gathered beside the weight, which is about to be there."""
        unsharded = getattr(self._weight, "_unsharded_param", None)  # None before the first gather
        local = getattr(unsharded, "_local_tensor", unsharded)
        self._keep(keys, _Kept(cast, tuple(freed), 0 if local is None else local._version))

    def _keep(self, keys: Sequence[Hashable], kept: _Kept) -> None:
        freed = self._weight._unsharded_inner_tensors
        if any(key in self._kept for key in keys) or not all(map(_has_memory, self._ours[-1:])):
            # Another weight than before: what was kept of that one goes.
            ours = set(map(id, self._ours))
            self._kept = {k: x for k, x in self._kept.items() if _lives(x) and k not in keys}
            self._ours = [x for each in self._kept.values() for x in each.freed]
            freed = [*(each for each in freed if id(each) not in ours), *self._ours]
            self._weight._unsharded_inner_tensors = freed
        self._kept.update(dict.fromkeys(keys, kept))
        self._ours.extend(kept.freed)
        freed.extend(kept.freed)

    def is_of(self, weight: Tensor) -> bool:
        """Whether it is what FSDP2 has gathered, and no other that the layer was lent."""
        if weight.is_inference():
            return False
        gathered = self._weight.all_gather_outputs
        return (
            len(gathered) == 1
            and _has_memory(gathered[0])
            and gathered[0].data_ptr() == weight.data_ptr()
        )


@dataclass(frozen=True, slots=True)
class GatheredPart(KeptCasts):
    """The casts of a part of a gathered weight, kept with those of the whole."""

    whole: GatheredCasts
    weight: Tensor
    """The whole weight."""

    which: Hashable

    def of(
        self,
        weight: Tensor,
        key: Hashable,
        make: Callable[[], Cast],
        freed: Callable[[Cast], Sequence[Tensor]],
    ) -> Cast:
        """See `KeptCasts.of`."""
        return self.whole.of(self.weight, (self.which, key), make, freed)

    def find(self, weight: Tensor, key: Hashable) -> Any:
        """See `KeptCasts.find`."""
        return self.whole.find(self.weight, (self.which, key))

    def keep(
        self, weight: Tensor, keys: Sequence[Hashable], cast: Any, freed: Sequence[Tensor]
    ) -> None:
        """See `KeptCasts.keep`."""
        self.whole.keep(self.weight, [(self.which, key) for key in keys], cast, freed)

    def use_values(self) -> None:
        """See `KeptCasts.use_values`."""
        self.whole.use_values()

    def part(self, weight: Tensor, which: Hashable) -> GatheredPart:
        """See `KeptCasts.part`."""
        return GatheredPart(self.whole, self.weight, (self.which, which))


def identity(x: Tensor | None) -> tuple[int, int] | None:
    """Tells a tensor from all others that live at the same time, whoever refers to it."""
    return None if x is None else (x.data_ptr(), x._version)


def _has_memory(x: Tensor) -> bool:
    return x.untyped_storage().size() > 0


def _lives(kept: _Kept) -> bool:
    return all(_has_memory(each) for each in kept.freed)
