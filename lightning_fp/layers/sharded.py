"""Products of tensor parallelism: each rank multiplies its shards, DTensor joins what comes out.

A sharded weight's placement says what is to be multiplied. Rows of the weight, as `ColwiseParallel`
shards it, are features of the output: each rank has the whole input and makes its features.
Columns, as `RowwiseParallel` shards it, are features of the input: each rank makes a part of the
sum. Between the two no rank needs to know of the others' values, so a kernel gets plain local
tensors, and a scale per tensor becomes one per shard: no collective is added, and a shard's own
range is never larger than the whole tensor's. Delayed scales are the same on all ranks, since
histories are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

Product = Callable[[Tensor, Tensor], Tensor]
"""Of a local input [..., in_features] and a local weight [out_features, in_features]."""


def multiply_shards(
    product: Product, input: DTensor, weight: DTensor, bias: Tensor | None
) -> Tensor:
    """The product of sharded operands, each rank's by itself.

    Args:
        product: what a rank does with its own; without the bias.
        input: [..., in_features].
        weight: [out_features, in_features], over a mesh of one dimension.
        bias: [out_features], sharded as the output's features are.

    Returns:
        [..., out_features]: sharded over its features, a sum of which each rank has a part, or
        sharded as the input is.
    """
    mesh, (placed,) = weight.device_mesh, weight.placements
    last = input.dim() - 1
    input_placed, output_placed = _placements(placed, input.placements[0], last)
    if input.placements != (input_placed,):  # backward through none would join the gradient's parts
        input = input.redistribute(mesh, [input_placed])
    shared = isinstance(placed, Replicate) and not isinstance(input_placed, Replicate)
    x = _arrived(
        input.to_local(grad_placements=[Partial() if placed == Shard(0) else input_placed])
    )
    w = weight.to_local(grad_placements=[Partial() if shared else placed])
    output = _joined(product(x, w), mesh, output_placed, (*input.shape[:-1], weight.shape[0]))
    return output if bias is None else output + bias.to(output.dtype)


def _placements(weight: Placement, input: Placement, last: int) -> tuple[Placement, Placement]:
    """How input and output are placed, by where the weight is.

    Args:
        weight: its placement.
        input: the input's, as it comes.
        last: the dimension of the features.
    """
    if weight == Shard(0):
        return Replicate(), Shard(last)
    if weight == Shard(1):
        return Shard(last), Partial()
    whole = input.is_partial() or input in (Shard(last), Shard(-1))
    return (Replicate(), Replicate()) if whole else (input, input)


def _arrived(local: Tensor) -> Tensor:
    """What a collective may still be bringing, as the plain tensor that kernels take."""
    return _Arrived.apply(local) if isinstance(local, AsyncCollectiveTensor) else local


class _Arrived(torch.autograd.Function):
    """Waits for the collective."""

    @staticmethod
    def forward(ctx: Any, local: AsyncCollectiveTensor) -> Tensor:
        return local.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _joined(local: Tensor, mesh: DeviceMesh, placed: Placement, shape: tuple[int, ...]) -> DTensor:
    """The whole, of a given shape: shards need not be of one size."""
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(local, mesh, [placed], run_check=False, shape=size, stride=stride)
