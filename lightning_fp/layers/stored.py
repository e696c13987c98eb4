"""Frozen layers that keep no more of their weight than FP8: which ones, and the way back.

LoRA and its like train next to weights that never change, and these are most of the memory. What an
FP8 product takes of them is a cast of one byte per element. With `frozen="stored"` nothing else is
kept. It is off by default, because the bits that the cast rounds away are gone: high precision, in
evaluation and after a fallback, computes with the rounded values from then on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_fp.argument_types import checked
from lightning_fp.kernels.stored.weight import StoredWeight
from lightning_fp.layers.backends import Resolved
from lightning_fp.layers.linear import is_switchable_linear
from lightning_fp.layers.rules import clean_named_modules, compile_pattern, no_match_message
from lightning_fp.numerics import FloatFormat, float_format

Frozen = Literal["kept", "stored"]
"""What is kept of the weights of frozen layers: all, or their FP8 cast alone."""


@dataclass(frozen=True, kw_only=True)
class Storing:
    """What `frozen="stored"` does to a model, decided before anything is changed."""

    formats: Mapping[str, FloatFormat]
    """The 8-bit format in which a layer's weight is kept, by the layer's name."""

    kept: Mapping[str, str]
    """The other frozen layers in FP8, with the reason why they keep their weight."""


def decide_storing(model: nn.Module, resolved: Mapping[str, Resolved]) -> Storing:
    """Which frozen weights in FP8 layers are to be kept as their cast alone.

    Args:
        model: whose layers these are.
        resolved: the format and kernel of each of its linear layers, by name.

    Returns:
        The decision.

    Raises:
        ValueError: if no layer is frozen, the model is sharded, or a layer's format casts its
            weight in more ways than one.
    """
    low = {name: each for name, each in resolved.items() if each.format.is_fp8}
    modules = dict(clean_named_modules(model))
    frozen = {name: each for name, each in low.items() if _is_frozen(modules[name])}
    if not frozen:
        raise ValueError(
            "frozen must be 'kept' for a model without frozen layers in FP8, got 'stored'; freeze"
            " weights, requires_grad_(False), before the conversion"
        )
    _check_whole(model)
    formats = {name: _format(name, each) for name, each in frozen.items()}
    slots = {id(m._parameters): m._parameters for m in model.modules()}
    holders = Counter(id(p) for slot in slots.values() for p in slot.values())
    reasons = {name: _why_kept(modules[name]._parameters["weight"], holders) for name in frozen}
    return Storing(
        formats={name: format for name, format in formats.items() if reasons[name] is None},
        kept={name: reason for name, reason in reasons.items() if reason is not None},
    )


@checked
def unstore(model: nn.Module, pattern: str = "*") -> int:
    """Give frozen layers that keep only FP8 a weight again, to merge adapters into it or to train.

    It has the values that are left, in the dtype that it had. The layers go on in their formats.

    Args:
        model: a model that was converted with `frozen="stored"`.
        pattern: a glob over the whole name of a layer, or a regular expression after "re:".

    Returns:
        How many layers have their weight again.

    Raises:
        ValueError: if the pattern matches no converted layer.
    """
    compiled = compile_pattern(pattern)
    converted = {n: m for n, m in clean_named_modules(model) if is_switchable_linear(m)}
    layers = [layer for name, layer in converted.items() if compiled.fullmatch(name)]
    if not layers:
        raise ValueError(no_match_message(pattern, converted))
    return sum(layer.unstore() for layer in layers)


def is_stored(layer: object) -> bool:
    """Whether a layer keeps only the FP8 cast of its weight."""
    parameters = layer._parameters if isinstance(layer, nn.Module) else {}
    return isinstance(parameters.get("weight"), StoredWeight)


def saved_bytes(layer: nn.Module) -> int:
    """What a layer's weight takes less of memory than before; 0 where it is not stored."""
    weight = layer._parameters.get("weight")
    if not isinstance(weight, StoredWeight):
        return 0
    return weight.numel() * (weight.dtype.itemsize - weight.cast.dtype.itemsize)


def _is_frozen(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and not weight.requires_grad


def _check_whole(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"frozen must be 'kept' for a sharded model, got 'stored': {name!r} is a DTensor;"
                " FSDP2 gathers weights in the dtype that they have, and has less of each already"
            )


def _format(name: str, resolved: Resolved) -> FloatFormat:
    """The format in which the layer's kernel takes a weight that is kept in it alone."""
    format = float_format(resolved.format.weight)
    if not resolved.kernel.takes_stored(format):
        raise ValueError(
            f"frozen must be 'kept' for layer {name!r}, got 'stored': {resolved.format.name!r}"
            f" ({resolved.kernel.name}) casts a weight in blocks, anew for each of its products, or"
            " from its bf16 export; take 'fp8-dynamic' or 'fp8-delayed' with our own kernel"
        )
    return format


def _why_kept(weight: Tensor | None, holders: Mapping[int, int]) -> str | None:
    if weight is None or is_lazy(weight):
        return "its weight is made by its first batch"
    if holders[id(weight)] > 1:
        return "its weight is shared with another module"
    if not (weight.is_meta or bool(torch.isfinite(weight).all())):
        return "its weight has inf or NaN"
    return None
