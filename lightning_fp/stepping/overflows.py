"""Where gradients lie in the range of FP16, and which layer left it first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_fp.layers.rules import clean_name
from lightning_fp.numerics import float_format

LEAST_NORMAL = float_format("fp16").smallest_normal


@torch.no_grad()
def first_overflow(module: nn.Module) -> str | None:
    """The layer closest to the loss with an inf or NaN gradient: backward comes there first.

    Args:
        module: its parameters' `.grad` are read. On all ranks alike: a collective if sharded.

    Returns:
        The layer's name; None if all gradients are finite.
    """
    named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    if not named:
        return None
    flags = [~torch.isfinite(_local(gradient)).all() for _, gradient in named]
    found = torch.stack([flag.float().to(flags[0].device) for flag in flags])
    _over_ranks(found, [gradient for _, gradient in named], dist.ReduceOp.MAX)
    last = [name for (name, _), bad in zip(named, found.tolist(), strict=True) if bad]
    return layer_of(last[-1]) if last else None


@torch.no_grad()
def counts(gradients: Sequence[Tensor], scale: Tensor) -> Tensor:
    """How many elements of each gradient are where.

    Args:
        gradients: without the loss scale. On all ranks alike: a collective if sharded.
        scale: the loss scale, scalar.

    Returns:
        float32 [gradients, 4]: all, zero, subnormal with the scale, inf or NaN.
    """
    rows: list[Tensor] = []
    for gradient in gradients:
        local = _local(gradient)
        size = (local.float() * scale.to(local.device)).abs()
        small = (size > 0) & (size < LEAST_NORMAL)
        parts = (torch.full_like(scale, local.numel()), size == 0, small, ~torch.isfinite(size))
        rows.append(torch.stack([part.to(scale.device).sum().float() for part in parts]))
    table = torch.stack(rows)
    _over_ranks(table, gradients, dist.ReduceOp.SUM)
    return table


def layer_of(parameter: str) -> str:
    """The name of the layer that a parameter belongs to, as layer rules have it."""
    return clean_name(parameter.rpartition(".")[0])


def _local(gradient: Any) -> Tensor:
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local.coalesce().values() if local.is_sparse else local


def _over_ranks(values: Tensor, gradients: Sequence[Tensor], how: Any) -> None:
    """In place, where this rank has only a part of them."""
    meshes: list[Any] = [getattr(gradient, "device_mesh", None) for gradient in gradients]
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is not None:
        for dimension in range(mesh.ndim):
            dist.all_reduce(values, how, group=mesh.get_group(dimension))
