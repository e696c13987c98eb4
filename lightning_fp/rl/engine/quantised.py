"""quantised_state_dict: what goes to an inference engine, the numbers that training multiplies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_fp.layers import LinearFormat, linear_format
from lightning_fp.layers.format import quantised_like
from lightning_fp.rl.engine.weight_casts import Scaled, WeightCast, weight_cast
from lightning_fp.rl.engine.weights import LayerWeight, Weights, weights_of

_NAMES: Mapping[Scaled, str] = {
    "tensor": "fp8-dynamic",
    "row": "fp8-rowwise[power_of_two=false]",
    "block": "fp8-block",
}

REQUANTISED: Mapping[Scaled, LinearFormat] = {
    scaled: quantised_like(linear_format(name), "bf16-export") for scaled, name in _NAMES.items()
}
"""How a weight is cast anew, where a checkpoint cannot hold the cast of training: e4m3, dynamic
scales of any factor, from the weight's bf16 export."""


def quantised_state_dict(
    model: nn.Module, *, requantise: bool = False
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """A model's state for a weight sync, tensor by tensor.

    Layers in FP8 give the codes that their next training forward multiplies, and the scale that
    makes values of them again. All else that is floating-point goes as bf16: the whole model where
    a recipe or the fallback has all layers in high precision. Formats are those in force;
    inside of `as_trained()` what was written for the coming step is too.

    >>> from lightning_fp import convert
    >>> model = nn.Sequential(nn.Linear(256, 128, bias=False))
    >>> _ = convert(model, "fp8-block")
    >>> for name, tensor, scale in quantised_state_dict(model):
    ...     print(name, tensor.dtype, tuple(scale.shape))
    0.weight torch.float8_e4m3fn (1, 2)

    Args:
        model: converted by `convert`, a precision plugin or a loop. Under FSDP2 each tensor is
            gathered when its turn comes, on all ranks alike.
        requantise: whether a weight in a format that has no such cast (`mxfp8`, simulated formats,
            Transformer Engine's) is cast anew in blocks of 128x128; it is an error otherwise.

    Yields:
        Name as in `state_dict()`, less what compiling and wrappers add; the tensor; and the scale
        (float32: a scalar, [out_features, 1], or one per block of 128x128), None for what is in
        high precision.

    Raises:
        ValueError: if the model was not converted, or a layer has no such cast.
    """
    weights = weights_of(model)
    casts = {
        name: decide(name, layer, ("tensor", "row", "block"), "block", requantise=requantise)
        for name, layer in weights.layers.items()
    }
    return _tensors(weights, casts)


def _tensors(
    weights: Weights, casts: Mapping[str, LayerWeight]
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    for name, stored in weights.tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in casts:
            cast = casts[layer].cast(stored.load())
            yield name, cast.tensor, cast.scale
        else:
            yield name, in_high_precision(stored.load()), None


def decide(
    name: str,
    layer: LayerWeight,
    held: tuple[Scaled, ...],
    anew: Scaled,
    *,
    requantise: bool,
    where: str = "a quantised state_dict",
) -> LayerWeight:
    """How a layer's weight goes out.

    Args:
        name: of the layer.
        layer: how training casts it.
        held: what may share a scale where it goes.
        anew: what shares one where it is cast anew.
        requantise: whether it may be.
        where: where it goes, for errors.

    Raises:
        ValueError: if training's cast cannot be held, and may not be replaced.
    """
    format, why = layer.format, layer.refusal
    if why is None and format.granularity not in held:
        why = f"it has a scale per {format.granularity}"
    if why is None and format.weight != "e4m3":
        why = f"its weights are {format.weight}, not e4m3"
    if why is None:
        return layer
    if not requantise:
        raise ValueError(
            f"layer {name!r} must be in a format whose weights {where} can hold, got"
            f" {format.name!r}: {why}; requantise=True casts it anew, other than it was trained"
        )
    return LayerWeight(format=REQUANTISED[anew], cast=lambda weight: _anew(weight, anew))


def _anew(weight: Tensor, scaled: Scaled) -> WeightCast:
    return weight_cast(weight, REQUANTISED[scaled])


def in_high_precision(tensor: Tensor) -> Tensor:
    """bf16 for what is floating-point; counts and the like stay what they are."""
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
