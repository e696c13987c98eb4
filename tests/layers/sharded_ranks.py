"""Layers under tensor parallelism on two real ranks with gloo: test_sharded.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lightning_fp import convert
from tests.two_ranks import WORLD, one_of_two_ranks

BATCH, TIME, IN, OUT = 2, 6, 32, 48

PLANS: dict[str, ParallelStyle] = {
    "columns": ColwiseParallel(use_local_output=False),
    "rows": RowwiseParallel(input_layouts=Replicate(), use_local_output=False),
}


class MLP(nn.Module):
    """As in a transformer: a norm, two layers, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(IN), nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


PLAIN = {"up": ColwiseParallel(), "down": RowwiseParallel()}

SEQUENCE = {
    "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
}


def seeded(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape)


def whole(value: Any) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def one_layer(mesh: DeviceMesh, plan: str, format: str, out: int) -> dict[str, Tensor]:
    """A layer's output and gradients, whole, beside those of its shards by plain layers."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, out)
    parts = _parts(layer, plan)
    model = nn.ModuleDict({"layer": layer})
    parallelize_module(model, mesh, {"layer": PLANS[plan]})
    convert(model, format, layers={"*": format})
    x = seeded(BATCH, TIME, IN).requires_grad_()
    output = layer(x)
    full = output.full_tensor() if isinstance(output, DTensor) else output
    grad_output = seeded(*full.shape)
    full.backward(grad_output)
    found = {
        "output": full,
        "grad_input": x.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad,
    }
    wanted = _by_hand(parts, plan, format, grad_output)
    return {
        **{name: whole(value) for name, value in found.items()},
        **{f"{name} by hand": whole(value) for name, value in wanted.items()},
    }


def _parts(layer: nn.Linear, plan: str) -> list[nn.Linear]:
    """What each rank has, as layers of their own."""
    parts: list[nn.Linear] = []
    for weight in layer.weight.detach().chunk(WORLD, dim=0 if plan == "columns" else 1):
        part = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        part.weight = nn.Parameter(weight.clone())
        parts.append(part)
    biases = layer.bias.detach().chunk(WORLD) if plan == "columns" else [layer.bias.detach()]
    for part, bias in zip(parts, biases, strict=False):  # of a sum one rank adds the bias
        part.bias = nn.Parameter(bias.clone())
    return parts


def _by_hand(parts: list[nn.Linear], plan: str, format: str, grad_output: Tensor) -> dict[str, Any]:
    """The same product made of the shards' own, on one process."""
    model = nn.ModuleList(parts)
    convert(model, format, layers={"*": format})
    x = seeded(BATCH, TIME, IN).requires_grad_()
    if plan == "columns":
        output = torch.cat([part(x) for part in parts], dim=-1)
    else:
        slices = x.chunk(WORLD, dim=-1)
        output = sum(part(piece) for part, piece in zip(parts, slices, strict=True))
    assert isinstance(output, Tensor)
    output.backward(grad_output)
    dim = 0 if plan == "columns" else 1
    return {
        "output": output,
        "grad_input": x.grad,
        "grad_weight": torch.cat([part.weight.grad for part in parts], dim=dim),  # pyright: ignore
        "grad_bias": torch.cat([p.bias.grad for p in parts if p.bias is not None]),  # pyright: ignore
    }


def block(mesh: DeviceMesh, plan: dict[str, ParallelStyle], format: str | None) -> dict[str, Any]:
    """Forward and backward of a block, with the collectives they need."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": MLP()})
    parallelize_module(model["mlp"], mesh, copy.copy(plan))
    if format is not None:
        convert(model, format, layers={"*": format})
    x = seeded(BATCH, TIME, IN)
    with CommDebugMode() as counted:
        model["mlp"](x).sum().backward()
    return {
        "collectives": {str(op): count for op, count in counted.get_comm_counts().items()},
        "gradients": {name: whole(p.grad) for name, p in model.named_parameters()},
    }


def compiled(mesh: DeviceMesh, format: str) -> dict[str, Any]:
    """The gradients of a block that is compiled, as regional compilation does."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": MLP()})
    parallelize_module(model["mlp"], mesh, copy.copy(PLAIN))
    convert(model, format, layers={"*": format})
    model["mlp"].compile(backend="aot_eager", fullgraph=True)
    model["mlp"](seeded(BATCH, TIME, IN)).sum().backward()
    return {"gradients": {name: whole(p.grad) for name, p in model.named_parameters()}}


def replicated(mesh: DeviceMesh) -> dict[str, Tensor]:
    """A weight that all ranks have, and an input of which each has a stretch of the sequence."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT)
    alone = copy.deepcopy(layer)
    for name, parameter in layer.named_parameters():
        shared = distribute_tensor(parameter.detach(), mesh, [Replicate()])
        layer.register_parameter(name, nn.Parameter(shared))
    model, single = nn.ModuleDict({"layer": layer}), nn.ModuleDict({"layer": alone})
    for each in (model, single):
        convert(each, "fp8-rowwise", layers={"*": "fp8-rowwise"})
    x = distribute_tensor(seeded(BATCH, TIME, IN), mesh, [Shard(1)])
    layer(x).full_tensor().sum().backward()
    alone(seeded(BATCH, TIME, IN)).sum().backward()
    return {
        name: whole(parameter.grad)
        for prefix, each in (("", layer), ("alone ", alone))
        for name, parameter in ((prefix + n, p) for n, p in each.named_parameters())
    }


def main(directory: Path, formats: list[str]) -> None:
    with one_of_two_ranks(directory) as rank:
        mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tensor_parallel",))
        told: dict[str, Any] = {
            f"{plan} {format} {out}": one_layer(mesh, plan, format, out)
            for plan in PLANS
            for format in formats
            for out in (OUT, OUT + 1)
        }
        for name, plan in (("plain", PLAIN), ("sequence", SEQUENCE)):
            for format in (None, *formats):
                told[f"{name} block {format}"] = block(mesh, plan, format)
        for format in formats:
            told[f"compiled block {format}"] = compiled(mesh, format)
        told["replicated"] = replicated(mesh)
        torch.save(told, directory / f"rank{rank}.pt")
