"""Weights to hand over: tensors by name, with the format that training multiplies each layer in.

From a model as it stands, or from a checkpoint, of which one tensor after the other is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_fp.kernels.memory import WEIGHT
from lightning_fp.kernels.stored.weight import StoredWeight
from lightning_fp.kernels.transformer_engine.kernel import TransformerEngineKernel
from lightning_fp.layers import LinearFormat
from lightning_fp.layers.layer_names import fold_names
from lightning_fp.layers.linear import FPLinear, is_switchable_linear
from lightning_fp.layers.rules import clean_name, modules_by_both_names
from lightning_fp.rl.engine.weight_casts import WeightCast, scaled_by, weight_cast, why_none
from lightning_fp.shown import a_kind


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor that is to be had."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Its values, whole; in a sharded model a collective."""

    address: int = 0
    """Where its memory begins, by which tied weights are known; 0 where that is not known."""


@dataclass(frozen=True, kw_only=True)
class LayerWeight:
    """How a layer's weight is cast in training."""

    format: LinearFormat

    cast: Callable[[Tensor], WeightCast]
    """Of the weight's values."""

    refusal: str | None = None
    """Why what training multiplies cannot be known; None if it can."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's state, in its order.

    Raises:
        ValueError: if a layer in FP8 has no weight in it: it would go out as something else.
    """

    tensors: Mapping[str, Stored]
    """By name."""

    layers: Mapping[str, LayerWeight]
    """Layers in FP8, by name."""

    def __post_init__(self) -> None:
        without = [
            name for name in self.layers if f"{name}.weight".removeprefix(".") not in self.tensors
        ]
        if without:
            raise ValueError(
                f"state_dict must have the weights of all layers in FP8, got none of"
                f" {', '.join(fold_names(without))}; undo what renames them"
            )


def weights_of(model: nn.Module) -> Weights:
    """The weights of a model, cast as its next training step would.

    Args:
        model: converted by `convert`, a precision plugin or a loop; with FSDP2 too.

    Raises:
        ValueError: if it was not converted.
    """
    converted = False
    names: dict[str, str] = {}
    layers: dict[str, LayerWeight] = {}
    # a module in two places is twice in the state_dict
    for fqn, name, module in modules_by_both_names(model, remove_duplicate=False):
        names[fqn] = name
        if is_switchable_linear(module):
            converted = True
            if not module.format.is_high_precision:
                layers[name] = _of_layer(module)
    if not converted:
        raise ValueError(
            "model must have layers in FP8, got one without; convert(model, 'fp8-block'), or hand"
            " it over while it trains"
        )
    tensors: dict[str, Stored] = {}
    for key, value in model.state_dict().items():
        # wrappers may leave their own part out of a state_dict
        place, _, last = key.rpartition(".")
        tensors[f"{names.get(place, clean_name(place))}.{last}".removeprefix(".")] = stored(value)
    return Weights(tensors=tensors, layers=layers)


def of_format(format: LinearFormat, delayed_scale: Tensor | None = None) -> LayerWeight:
    """How a layer of a format casts its weight.

    Args:
        format: the layer's.
        delayed_scale: float32 scalar of delayed scaling; see `weight_cast`.
    """
    refusal = None if scaled_by(format) is not None else why_none(format)
    return LayerWeight(
        format=format,
        cast=lambda weight: weight_cast(weight, format, delayed_scale),
        refusal=refusal,
    )


def _of_layer(layer: FPLinear) -> LayerWeight:
    scales = None if layer.memory is None else layer.memory.scales
    of = of_format(layer.format, None if scales is None else scales[WEIGHT].detach().clone())
    kept = layer._parameters.get("weight")
    if isinstance(kept, StoredWeight):
        scale = torch.where(kept.amax.isfinite(), kept.scale.reciprocal(), torch.nan)
        cast = WeightCast(tensor=kept.cast, scale=scale, scaled="tensor")
        return LayerWeight(format=layer.format, cast=lambda _: cast, refusal=of.refusal)
    if isinstance(layer.kernel, TransformerEngineKernel):
        why = "Transformer Engine casts the weight itself"
        return LayerWeight(format=layer.format, cast=of.cast, refusal=why)
    return of


def stored(value: object) -> Stored:
    """A tensor of a state_dict.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, Tensor):
        raise ValueError(
            f"state_dict must have tensors only, got {a_kind(value)}; leave get_extra_state out"
        )
    tensor = value

    def load() -> Tensor:
        plain = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return plain.detach()

    shape = tuple(tensor.shape)
    return Stored(shape=shape, dtype=tensor.dtype, load=load, address=address_of(tensor))


def address_of(tensor: Tensor) -> int:
    """See `Stored.address`."""
    if isinstance(tensor, StoredWeight):
        return 0
    return tensor.to_local().data_ptr() if isinstance(tensor, DTensor) else tensor.data_ptr()
