"""FPLinear: the nn.Linear whose format can change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_fp.kernels import HighPrecisionKernel, Kernel, KernelMemory
from lightning_fp.kernels.gathered_casts import GatheredCasts
from lightning_fp.kernels.plain_linear import transformed
from lightning_fp.kernels.stored.linear import dequantised_linear
from lightning_fp.kernels.stored.weight import StoredWeight
from lightning_fp.kernels.straight_through import straight_through
from lightning_fp.layers.format import NAMED_FORMATS, LinearFormat
from lightning_fp.layers.layouts import of_layout
from lightning_fp.layers.observe import OperandStatistics, observe
from lightning_fp.layers.sharded import multiply_shards
from lightning_fp.layers.switchable import Phase
from lightning_fp.numerics import FloatFormat

CAST_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""What autocast casts, and formats do. Others (float64, complex) somebody chose with a reason."""


class FPLinear(nn.Linear):
    """An nn.Linear that multiplies in a format of its own.

    Never constructed: `make_switchable` changes the class of an existing nn.Linear, so that
    Parameters, hooks, tied weights, the training flag and checkpoint keys stay what they are.

    What a forward does depends on four values, the dispatch key, each set on the instance (a
    class attribute would cost torch.compile one more graph): the format (with its kernel),
    `collect`, `record` and, through the shared `phase`, whether this is an evaluation.
    """

    fqn: str
    """The layer's name in the model."""

    format: LinearFormat
    kernel: Kernel
    phase: Phase

    collect: bool
    record: bool
    memory: KernelMemory | None
    """See `SwitchableLayer`, as of these three."""

    statistics: OperandStatistics | None
    """Where statistics go while they are collected; kept by `StatisticsTable`."""

    keeps_history = True
    """See `SwitchableLayer`."""

    gathered: GatheredCasts | None
    """Casts of the weight while FSDP2 has it gathered; None: FSDP2 does not shard it."""

    stored: FloatFormat | None
    """The format in which alone the weight is kept, see `lightning_fp.layers.stored`; None: it is a
    Parameter as any."""

    def switch(self, format: LinearFormat, kernel: Kernel) -> None:
        """Multiply in `format` from the next forward on; nothing else about the layer changes.

        A memory stays, also with a kernel that needs none: the one that made it may come back.
        """
        memory = kernel.make_memory(self) if self.memory is None else self.memory
        self.__dict__.update(format=format, kernel=kernel, memory=memory)

    @property
    def evaluating(self) -> bool:
        """Whether this forward belongs to an evaluation."""
        return self.phase.evaluates(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """The product in the layer's format, in high precision during evaluation.

        Args:
            input: [..., in_features].

        Returns:
            [..., out_features].
        """
        if getattr(self, "phase", None) is None:  # turned back; who wrapped `forward` kept this one
            return F.linear(input, self.weight, self.bias)
        high = self.phase.stays_high(self.training)
        # Asked for once: a parametrization computes it anew, and spectral_norm's then moves on.
        weight = self.weight
        if high or input.dtype not in CAST_DTYPES or weight.dtype not in CAST_DTYPES:
            if isinstance(weight, StoredWeight):
                return dequantised_linear(input, weight, self.bias)
            return F.linear(input, weight, self.bias)
        if input.layout is not torch.strided or input.is_nested:
            return of_layout(self, input, weight)
        if (
            isinstance(input, DTensor)
            and isinstance(weight, DTensor)
            and weight.device_mesh.ndim == 1
            and not self.format.is_high_precision  # that is nn.Linear's product, bit for bit
        ):
            return multiply_shards(self._multiply, input, weight, self.bias)
        return self.multiply(input, weight)

    def multiply(self, input: Tensor, weight: Tensor) -> Tensor:
        """The product in the layer's format, recorded and observed.

        Args:
            input: [..., in_features], strided, of a dtype that is cast.
            weight: [out_features, in_features], the layer's.

        Returns:
            [..., out_features].
        """
        return self._multiply(input, weight, self.bias)

    def _multiply(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        gathered = None if torch.compiler.is_compiling() or transformed() else self.gathered
        with nullcontext() if gathered is None else gathered.own_product():
            return self._observed(input, weight, bias, gathered)

    def _observed(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, gathered: GatheredCasts | None
    ) -> Tensor:
        evaluating = self.evaluating
        kernel, memory = self.kernel, self._memory_on(input.device)
        if kernel.records and self._after_its_trainer:
            memory = None  # nobody advances a history there, and its scales would only age
        record, collect = self.record and not evaluating, self.collect and not evaluating
        if isinstance(weight, StoredWeight) and (
            transformed() or not kernel.takes_stored(weight.format)
        ):
            weight = weight.dequantised()
        if transformed():
            if not kernel.every_derivative:
                # Nothing is recorded in there, so a history's scales would never follow.
                return straight_through(kernel, input, weight, bias)
            collect = False
        # Code compiled for one block would not serve the next if the layer's name were in it.
        name = "in compiled code" if torch.compiler.is_compiling() else self.fqn
        output = kernel.multiply(
            input,
            weight,
            bias,
            name,
            memory,
            record=record,
            evaluating=evaluating,
            gathered=gathered,
        )
        if collect and self.statistics is not None:
            scales = None if memory is None else memory.scales
            statistics = self._statistics_on(self.statistics, input.device)
            return observe(output, input, weight, kernel, scales, statistics)
        return output

    @property
    def _after_its_trainer(self) -> bool:
        """Whether this forward trains in a loop of one's own that came after a Trainer."""
        phase = self.phase
        return self.training and phase.evaluating is None and phase.away is not None

    def _memory_on(self, device: torch.device) -> KernelMemory | None:
        """The memory, where this forward computes.

        Weights come there by many ways that tell nobody: `fully_shard` on a mesh of another device
        and FSDP2's CPU offload set `.data`, dispatch hooks lend weights for a call.
        """
        memory = self.memory
        if memory is None or device.type == "meta":
            return memory
        there = memory.on(device)
        if there is not memory:
            self.memory = there
        return there

    def _statistics_on(
        self, statistics: OperandStatistics, device: torch.device
    ) -> OperandStatistics:
        """Likewise."""
        there = statistics.on(device)
        if there is not statistics:
            self.statistics = there
        return there

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FPLinear:
        """nn.Module's, and the memory follows the weight to its device."""
        super()._apply(fn, recurse)
        self._follow_weight()
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """nn.Module's, which `load_state_dict(assign=True)` replaces the weight by."""
        super().register_parameter(name, param)
        self._follow_weight()
        if name == "weight" and self.stored is not None:
            self.store(self.stored)

    def store(self, format: FloatFormat) -> None:
        """Keep no more of the weight than its cast.

        Args:
            format: the 8-bit format.
        """
        weight = self.weight
        if weight.requires_grad or (isinstance(weight, StoredWeight) and weight.format == format):
            return
        self.stored = format
        kept = StoredWeight.of(weight, format, self.fqn)
        self._parameters["weight"] = nn.Parameter(kept, requires_grad=False)

    def unstore(self) -> bool:
        """Have a weight again that can be written to, of the values that are left.

        Returns:
            Whether it was stored.
        """
        weight, self.stored = self._parameters.get("weight"), None
        if not isinstance(weight, StoredWeight):
            return False
        self._parameters["weight"] = nn.Parameter(weight.dequantised(), requires_grad=False)
        return True

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """nn.Module's; it loads into the plain model."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.get(f"{prefix}weight")
        if isinstance(weight, StoredWeight) and not keep_vars:
            destination[f"{prefix}weight"] = weight.dequantised()

    def _follow_weight(self) -> None:
        # Any parameter's device: weight_norm and its like have taken the weight's name away.
        first = next(self.parameters(), None)
        if self.memory is not None and first is not None and first.device.type != "meta":
            self.memory = self.memory.on(first.device)

    @property
    def qconfig(self) -> object:
        """Where torch.ao.quantization notes its plans; it would find no nn.Linear, in silence."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: object) -> None:
        raise ValueError(self._only_plain("torch.ao.quantization"))

    def _only_plain(self, who: str) -> str:
        return (
            f"layer {self.fqn!r}: {who} must find nn.Linear, got a layer whose format can change;"
            " hand it a plain copy: `plain = copy.deepcopy(model); revert(plain)`"
        )

    def _get_name(self) -> str:
        own = super()._get_name()
        return own if self._is_plain else own.replace("Linear", "FPLinear")

    def extra_repr(self) -> str:
        """nn.Linear's, with the format; nothing more where it computes as nn.Linear does."""
        own = super().extra_repr()
        return own if self._is_plain else f"{own}, format={self.format.name}"

    @property
    def _is_plain(self) -> bool:
        return self.format == NAMED_FORMATS["high"]


class LazyFPLinear(nn.LazyLinear, FPLinear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """An nn.LazyLinear that becomes an FPLinear where it sees its first batch."""

    cls_to_become = FPLinear  # pyright: ignore[reportAssignmentType]


# By name they are what they were made of: summaries, loggers and rules of other libraries that
# compare `type(module).__name__` go on as before. Pickle, and repr(type(layer)), read __qualname__.
FPLinear.__name__, LazyFPLinear.__name__ = nn.Linear.__name__, nn.LazyLinear.__name__

_SWITCHABLE: dict[type, type] = {nn.Linear: FPLinear, nn.LazyLinear: LazyFPLinear}
_PLAIN = {switchable: plain for plain, switchable in _SWITCHABLE.items()}

_ATTRIBUTES = tuple(name for name in FPLinear.__annotations__)

# TorchScript compiles nn.Linear's forward in place of this one, and so in high precision.
FPLinear.__jit_ignored_attributes__ = list(_ATTRIBUTES)  # pyright: ignore
FPLinear.__jit_unused_properties__ = [  # pyright: ignore
    name for name, value in vars(FPLinear).items() if isinstance(value, property)
]
FPLinear.forward.__wrapped__ = nn.Linear.forward  # pyright: ignore


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` is exactly nn.Linear, lazy or not, or that under FSDP2's class mix-in.

    Subclasses are not: their forward may do anything (nn.MultiheadAttention's projection is a
    subclass whose forward is never called).
    """
    return _without_fsdp(type(module)) in _SWITCHABLE


def is_switchable_linear(module: nn.Module) -> TypeGuard[FPLinear]:
    """Whether `module` is an FPLinear, under FSDP2's class mix-in or a parametrization too."""
    return _bare(type(module)) in _PLAIN


def why_it_stays(linear: nn.Linear) -> str | None:
    """Why the format of a linear layer cannot change; None if it can."""
    if "forward" in vars(linear) and not is_switchable_linear(linear):
        return (
            "its instance has a forward of its own, which would go on as it is; wrap it after the"
            " conversion, or by a hook"
        )
    dtype = first_parameter(linear).dtype
    if dtype not in CAST_DTYPES:
        return f"{str(dtype).removeprefix('torch.')}, which autocast leaves alone too"
    return None


def first_parameter(linear: nn.Linear) -> Tensor:
    """The weight, or what a parametrization keeps in its place.

    To ask for a parametrized weight is to make it, and spectral_norm's vectors then move on.
    """
    first = next(linear.parameters(), None)
    return linear.weight if first is None else first


def has_formats(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` is a linear layer whose format can change, converted or not."""
    if is_plain_linear(module) or is_switchable_linear(module):
        return why_it_stays(module) is None
    return False


def make_switchable(linear: nn.Linear, fqn: str, phase: Phase) -> FPLinear:
    """Turn an nn.Linear into an FPLinear in place; it computes what it did until `switch`."""
    plain = _bare(type(linear))
    linear.__class__ = _swap_base(type(linear), plain, _SWITCHABLE[plain])
    if not is_switchable_linear(linear):  # for the type checker; the line above made it so
        raise TypeError(f"{fqn!r} could not be converted")
    # Not through nn.Module.__setattr__, which looks for Parameters: ten times as slow.
    linear.__dict__.update(
        fqn=fqn,
        phase=phase,
        collect=False,
        record=False,
        memory=None,
        statistics=None,
        gathered=None,
        stored=None,
    )
    linear.switch(NAMED_FORMATS["high"], HighPrecisionKernel())
    return linear


def make_plain(linear: FPLinear) -> nn.Linear:
    """Turn an FPLinear back into the nn.Linear it was, in place."""
    linear.phase.left = True
    linear.unstore()
    for name in _ATTRIBUTES:
        delattr(linear, name)
    switchable = _bare(type(linear))
    linear.__class__ = _swap_base(type(linear), switchable, _PLAIN[switchable])
    return linear


def _without_fsdp(cls: type) -> type:
    """The class that `fully_shard` mixed FSDPModule into; `cls` itself where it did not."""
    if len(cls.__bases__) == 2 and cls.__bases__[0] is FSDPModule:
        return cls.__bases__[1]
    return cls


def _bare(cls: type) -> type:
    """The class that `fully_shard`, or torch.nn.utils.parametrize, has made a subclass of."""
    base = _without_fsdp(cls).__bases__[0]
    return base if _is_parametrized(cls, base) else _without_fsdp(cls)


def _is_parametrized(cls: type, base: type) -> bool:
    return cls.__name__ == f"Parametrized{base.__name__}"


@cache
def _swap_base(cls: type, old: type, new: type) -> type:
    """`new` for `old`; a subclass that FSDP2 or a parametrization made of it is made again."""
    if cls is old:
        return new
    namespace = {
        name: value
        for name, value in cls.__dict__.items()
        if name not in ("__dict__", "__weakref__", "__doc__")
    }
    if _is_parametrized(cls, old):
        return type(f"Parametrized{new.__name__}", (new,), namespace)
    return type(f"FSDP{new.__name__}", (FSDPModule, new), namespace)
