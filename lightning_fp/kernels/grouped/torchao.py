"""torchao's grouped products on CUDA: FP8 per row, MXFP8.

Both are prototypes there, so the dependency on them stays in this one file. FP8 wants groups of a
multiple of 16 rows, MXFP8 of 32: the tokens are padded here, without waiting for the device.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fp.format_names import ALIGNMENT
from lightning_fp.kernels.base import without_autocast
from lightning_fp.kernels.block import MX_BLOCK
from lightning_fp.kernels.derivatives import first_derivatives_only
from lightning_fp.kernels.grouped.groups import Groups, padded
from lightning_fp.kernels.hardware import check_alignment
from lightning_fp.kernels.quiet import import_quietly

Grouped = Literal["rowwise", "mx"]

_WHERE = {
    "rowwise": ("fp8_grouped_mm", "_to_fp8_rowwise_then_scaled_grouped_mm", ALIGNMENT),
    "mx": ("mxfp8_grouped_mm", "_to_mxfp8_then_scaled_grouped_mm", MX_BLOCK),
}
"""Module, function, and what sizes and groups must be multiples of."""


def torchao_groups(
    input: Tensor,
    weight: Tensor,
    groups: Groups,
    layer: str,
    kind: Grouped,
    **options: Any,
) -> Tensor:
    """The products of a layer's experts, on CUDA.

    Args:
        input: [tokens, in_features], sorted by expert.
        weight: [experts, out_features, in_features].
        groups: whose the rows of `input` are.
        layer: the layer's name, for error messages.
        kind: per row or MXFP8.
        options: of torchao's function.

    Returns:
        [tokens, out_features] in the dtype of `input`; 0 for rows of nobody.

    Raises:
        ValueError: if sizes are no multiples of what the hardware wants, or this torchao has no
            such function.
    """
    multiple = _WHERE[kind][2]
    out_features, in_features = weight.shape[1:]
    check_alignment(layer, in_features=in_features, out_features=out_features, multiple=multiple)
    place, ends, rows = padded(groups, multiple)
    with without_autocast(input.device.type):
        x = input.to(torch.bfloat16)
        x = x.new_zeros(rows, in_features).index_copy(0, place, x)
        w = weight.contiguous().transpose(1, 2)  # stored column by column
        output = _function(kind)(x, w, ends, out_dtype=torch.bfloat16, **options)
        own = (groups.of_row < groups.experts).unsqueeze(1)
        output = torch.where(own, output.index_select(0, place), 0).to(input.dtype)
    return first_derivatives_only(output, layer)


def has_grouped_fp8() -> bool:
    """Whether torch has the grouped FP8 product on the devices here: on Hopper and sm100."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return all(torch.cuda.get_device_capability(each) in ((9, 0), (10, 0)) for each in devices)


@cache
def _function(kind: Grouped) -> Any:
    module, name, _ = _WHERE[kind]
    try:
        return getattr(import_quietly(f"torchao.prototype.moe_training.{module}"), name)
    except (ImportError, AttributeError) as error:
        version = getattr(import_quietly("torchao"), "__version__", "unknown")
        raise ValueError(
            f"experts need torchao's grouped product of torchao 0.18, this is {version} ({error});"
            " install torchao==0.18.*, or leave experts in high precision with"
            " layers={'*experts': 'bf16'}"
        ) from error
