"""FPExperts: a module of experts whose formats can change, all together or one by one."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_fp.kernels import HighPrecisionKernel, Kernel, KernelMemory
from lightning_fp.kernels.base import compute_dtype
from lightning_fp.kernels.gathered_casts import GatheredCasts
from lightning_fp.kernels.grouped.groups import Groups
from lightning_fp.kernels.grouped.product import of_rows
from lightning_fp.kernels.plain_linear import transformed
from lightning_fp.layers.experts.kinds import ExpertsKind, ExpertsShape, kind_of, shape_of
from lightning_fp.layers.experts.rows import NAME, ExpertsRow
from lightning_fp.layers.format import NAMED_FORMATS, LinearFormat
from lightning_fp.layers.linear import CAST_DTYPES, FPLinear
from lightning_fp.layers.observe import OperandStatistics
from lightning_fp.layers.switchable import Phase

log = logging.getLogger(__name__)


class FPExperts(ExpertsRow, nn.Module):
    """Experts that multiply in a format of their own.

    Never constructed: `make_switchable_experts` puts it before the class of an existing module, so
    that Parameters, hooks, the training flag and checkpoint keys stay what they are. It is one row
    of the table, `layers.3.experts`; an expert whose format was asked for by its name,
    `layers.3.experts[5]`, has a row of its own from then on.
    """

    phase: Phase
    kind: ExpertsKind
    apart: dict[int, Expert]
    """The experts with rows of their own, by number."""

    shape: ExpertsShape

    gathered: tuple[GatheredCasts | None, ...]
    """Casts of the weights while FSDP2 has them gathered, of each by itself; a copy has none."""

    @property
    def in_features(self) -> int:
        """Features of the tokens."""
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        """Features inside of an expert."""
        return self.shape.out_features

    @property
    def weight(self) -> Tensor:
        """One of the weights, where all of them are."""
        return self.kind.weights(self)[-1]

    def switch(self, format: LinearFormat, kernel: Kernel) -> None:
        """Multiply in `format` from the next forward on, all experts without a row of their own."""
        self.__dict__.update(format=format, kernel=kernel)

    def expert(self, number: int) -> Expert:
        """The row of one expert; it has the format of all others until it is switched.

        Args:
            number: from 0 on.
        """
        if number not in self.apart:
            self.apart[number] = Expert(self, number)
        return self.apart[number]

    def expert_names(self) -> list[str]:
        """What its experts are called, each by itself."""
        every = range(self.shape.experts)
        return [NAME.format(module=self.fqn, expert=expert) for expert in every]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module computes, in its formats; as it was written where these are high."""
        if self._as_written(args, kwargs):
            return super().forward(*args, **kwargs)
        return self.kind.forward(self, self._multiply, *args, **kwargs)

    def _as_written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        phase = getattr(self, "phase", None)
        input = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if phase is None or input is None:
            return True
        if input.is_meta:  # loops over experts would read from the device how many tokens they have
            return False
        if phase.stays_high(self.training) or transformed():
            return True
        weights, dtype = self.kind.weights(self), compute_dtype(input)
        if not CAST_DTYPES.issuperset((dtype, *(each.dtype for each in weights))):
            return True
        same = weights[0].dtype is input.dtype or torch.is_autocast_enabled(input.device.type)
        if all(row.is_plain(dtype if same else None) for row in (self, *self.apart.values())):
            return True
        if not all(self._multiplies_alone(each) for each in weights) or isinstance(input, DTensor):
            if not torch.compiler.is_compiling():
                _say_sharded(self.fqn)
            return True
        return False

    def _multiplies_alone(self, weight: Tensor) -> bool:
        """Whether this rank has the experts, whole, whose tokens it is given."""
        if not isinstance(weight, DTensor):
            return True
        return self.kind.takes_shards and all(each == Shard(0) for each in weight.placements)

    def _multiply(self, input: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        if input.is_meta:
            columns = weight.to(input.dtype).transpose(1, 2)
            return of_rows(input, columns, groups.ends, input.dtype).to(input.dtype)
        evaluating, first = self.phase.evaluates(self.training), 0
        if isinstance(weight, DTensor):  # expert parallelism: those of this rank, and their tokens
            shape, placed = weight.shape, weight.placements
            first = compute_local_shape_and_global_offset(shape, weight.device_mesh, placed)[1][0]
            weight = weight.to_local()
        kept = self._kept_of(weight)
        mine = range(first, first + groups.experts)
        others = [row for row in self.apart.values() if row.number in mine]
        others = [row for row in others if row.kernel != self.kernel or row.collect]
        if not others:
            how: Any = {"evaluating": evaluating, "gathered": kept}
            return self.multiply_groups(input, weight, groups, **how)
        numbers = {row.number - first for row in others}
        rest = [number for number in range(groups.experts) if number not in numbers]
        rows: list[tuple[ExpertsRow, list[int]]] = [(row, [row.number - first]) for row in others]
        output = input.new_zeros(input.shape[0], weight.shape[1], dtype=compute_dtype(input))
        for row, chosen in [*rows, (self, rest)] if rest else rows:
            which = torch.tensor(chosen, device=input.device)
            rows_of = torch.isin(groups.of_row, which).nonzero().squeeze(1)
            if rows_of.shape[0] == 0:
                continue
            ids = torch.searchsorted(which, groups.of_row.index_select(0, rows_of))
            part = row.multiply_groups(
                input.index_select(0, rows_of),
                weight.index_select(0, which),
                Groups.of_sorted(ids, len(chosen)),
                evaluating=evaluating,
                gathered=None if kept is None else kept.part(weight, tuple(chosen)),
            )
            output = output.index_copy(0, rows_of, part.to(output.dtype))
        return output

    def _kept_of(self, weight: Tensor) -> GatheredCasts | None:
        """What is kept of the casts of one of its weights; None where FSDP2 has not gathered it."""
        if torch.compiler.is_compiling():
            return None
        return next((each for each in self.gathered if each and each.is_of(weight)), None)

    def extra_repr(self) -> str:
        """The module's, with the format; nothing more where it computes as it was written."""
        own = super().extra_repr()
        if self.format == NAMED_FORMATS["high"]:
            return own
        return f"{own}, format={self.format.name}".removeprefix(", ")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class was made here, and pickle finds it by what it was made of."""
        cls = type(self)
        if cls.__bases__[0] is not FPExperts:  # under FSDP2's class mix-in or a parametrization
            return super().__reduce_ex__(protocol)
        return _blank, (cls.__bases__[1],), self.__dict__


class Expert(ExpertsRow):
    """One expert with a row of its own.

    Args:
        owner: the module whose expert it is.
        number: which one.
    """

    def __init__(self, owner: FPExperts, number: int) -> None:
        self.owner, self.number = owner, number
        self.fqn = NAME.format(module=owner.fqn, expert=number)
        self.collect = self.record = False
        self.memory: KernelMemory | None = None
        self.statistics: OperandStatistics | None = None
        self.switch(owner.format, owner.kernel)

    @property
    def phase(self) -> Phase:
        """Of the table that it belongs to; None after the module was turned back."""
        return getattr(self.owner, "phase", None)  # pyright: ignore[reportReturnType]

    @property
    def in_features(self) -> int:
        """Features of the tokens."""
        return self.owner.in_features

    @property
    def out_features(self) -> int:
        """Features inside of the expert."""
        return self.owner.out_features

    @property
    def weight(self) -> Tensor:
        """One of the weights."""
        return self.owner.weight

    def switch(self, format: LinearFormat, kernel: Kernel) -> None:
        """Multiply in `format` from the next forward on."""
        self.format, self.kernel = format, kernel


_ATTRIBUTES = (*ExpertsRow.__annotations__, *FPExperts.__annotations__)


def is_switchable_experts(module: object) -> TypeGuard[FPExperts]:
    """Whether a module is an FPExperts."""
    return isinstance(module, FPExperts) and "phase" in vars(module)


def is_switchable(module: object) -> TypeGuard[FPLinear | FPExperts]:
    """Whether a module has a format of its own: a linear layer, or experts."""
    return isinstance(module, (FPLinear, FPExperts))


def why_experts_stay(module: nn.Module, kind: ExpertsKind) -> str | None:
    """Why the format of a module of experts cannot change; None if it can."""
    if "forward" in vars(module):
        return (
            "its instance has a forward of its own, which would go on as it is; wrap it after the"
            " conversion, or by a hook"
        )
    dtypes = {weight.dtype for weight in kind.weights(module)} - CAST_DTYPES
    if dtypes:
        return f"{str(dtypes.pop()).removeprefix('torch.')}, which autocast leaves alone too"
    return None


def make_switchable_experts(module: nn.Module, fqn: str, phase: Phase) -> FPExperts:
    """Turn a module of experts into an FPExperts in place; it computes what it did until `switch`.

    Raises:
        TypeError: if it is none that is known.
    """
    kind = kind_of(module)
    if kind is None:
        raise TypeError(f"{fqn!r} is no module of experts that is known")
    module.__class__ = _switchable(type(module))
    module.__dict__.update(
        fqn=fqn,
        phase=phase,
        kind=kind,
        shape=shape_of(module, kind),
        apart={},
        gathered=(),
        collect=False,
        record=False,
        memory=None,
        statistics=None,
    )
    experts: Any = module
    experts.switch(NAMED_FORMATS["high"], HighPrecisionKernel())
    return experts


def make_plain_experts(experts: FPExperts) -> nn.Module:
    """Turn an FPExperts back into the module it was, in place."""
    experts.phase.left = True
    for name in _ATTRIBUTES:
        vars(experts).pop(name, None)
    module: Any = experts
    module.__class__ = _without(type(experts))
    return module


@cache
def _switchable(cls: type) -> type:
    """A class before which FPExperts stands; by name it is what it was made of."""
    made = type(cls.__name__, (FPExperts, cls), {"__module__": cls.__module__})
    made.__qualname__ = cls.__qualname__
    return made


@cache
def _without(cls: type) -> type:
    """The class before FPExperts was put before it, under FSDP2's class mix-in too."""
    first, *others = cls.__bases__
    if first is FPExperts:
        return others[0]
    bases = tuple(_without(base) if issubclass(base, FPExperts) else base for base in cls.__bases__)
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, namespace)


@cache
def _say_sharded(layer: str) -> None:
    """Once for each module."""
    log.warning(
        "experts %r: their weights are sharded in a way that their products are not known for:"
        " multiplied in high precision",
        layer,
    )


def _blank(cls: type) -> nn.Module:
    """A module to load a state into."""
    made = _switchable(cls)
    return made.__new__(made)  # pyright: ignore[reportCallIssue]
