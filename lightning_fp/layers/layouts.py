"""Inputs of a linear layer that are no strided tensor: jagged, sparse."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)


def of_layout(layer: Any, input: Tensor, weight: Tensor) -> Tensor:
    """A layer's product of an input that its kernel would not take as it is.

    Args:
        layer: an FPLinear.
        input: [..., in_features], jagged, sparse, or nested otherwise.
        weight: [out_features, in_features], the layer's.

    Returns:
        [..., out_features]: of a jagged one in the layer's format, the rows of all its parts
        together; of all others in high precision, as nn.Linear gives it.
    """
    jagged: Any = input
    if input.layout is torch.jagged and jagged._ragged_idx < input.dim() - 1:
        return torch.nested.nested_tensor_from_jagged(
            layer.multiply(jagged.values(), weight),
            jagged.offsets(),
            jagged.lengths(),
            jagged_dim=jagged._ragged_idx,
            min_seqlen=jagged._maybe_min_seqlen,
            max_seqlen=jagged._maybe_max_seqlen,
        )
    if not (layer.format.is_high_precision or torch.compiler.is_compiling()):
        _say(layer.fqn, "nested" if input.is_nested else str(input.layout).removeprefix("torch."))
    return F.linear(input, weight, layer.bias)


@cache
def _say(layer: str, layout: str) -> None:
    """Once for each layer."""
    log.warning("layer %r: its input is %s: multiplied in high precision", layer, layout)
