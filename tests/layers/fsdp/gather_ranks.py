"""Runs on two real ranks whose weights are gathered in FP8, and as they are: test_all_gather.py."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_fp import PrecisionMap, convert
from lightning_fp.layers import FPLinear
from lightning_fp.layers.switchable import Gathering
from tests.two_ranks import one_of_two_ranks

IN, TOKENS, STEPS = 48, 7, 6
SAMPLED = 1, 2, 4
FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and how."""

    format: str = "fp8-dynamic"
    dtype: torch.dtype | None = torch.bfloat16
    hidden: int = 80
    """Odd ones are sharded unevenly."""

    reshard: bool | int = True
    recompute: bool = False
    micro_batches: int = 1
    stays: bool = False
    """Whether weights stay gathered between micro-batches."""

    meanwhile: str = ""
    """What happens besides: "flips", "evaluation", "sampled", "replay", "written", "written by one
    rank", "forward alone", "compiled", "not finite"; or `IN_BETWEEN`."""

    optimizer: str = "AdamW"
    """Or "fused", "foreach", "data": of each step one that writes in another way."""

    frozen: bool = False
    """Whether the first block's weights stay what they are."""

    mesh: str = "fsdp"
    offload: bool = False
    scale: float = 1.0
    """Of the first layer's initial weights."""


class Block(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(IN)
        self.up, self.down = nn.Linear(IN, case.hidden), nn.Linear(case.hidden, IN)
        self.recompute = case.recompute

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            return checkpoint(self.inside, x, use_reentrant=False)
        return self.inside(x)

    def inside(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Traffic(TorchDispatchMode):
    """Bytes that a rank contributes to all-gathers, and casts to FP8 of weights or their shards.

    Args:
        weights: elements of the smallest shard of a weight.
        rows: of what else is cast.
    """

    def __init__(self, *, weights: int, rows: int = TOKENS) -> None:
        super().__init__()
        self.bytes = 0
        self.casts = 0
        self.collectives: Counter[str] = Counter()
        self._least, self._rows = weights, rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.collectives[func.__name__.split(".")[0]] += 1
            if "allgather" in func.__name__:
                sent: Any = args[1]
                for each in sent if isinstance(sent, list) else [sent]:
                    self.bytes += each.numel() * each.itemsize
        if isinstance(result, Tensor) and result.dtype in FLOAT8 and args[0].is_floating_point():
            weight = result.numel() >= self._least and self._rows not in result.shape
            self.casts += args[0].dtype not in FLOAT8 and weight
        return result


@dataclass
class Told:
    losses: list[float] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    casts: list[int] = field(default_factory=list)
    reductions: list[int] = field(default_factory=list)
    amax: list[Tensor] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    graphs: int = 0
    """That dynamo has captured so far."""


def build(case: Case, all_gather: Gathering) -> tuple[Any, PrecisionMap]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(Block(case) for _ in range(3)), nn.Linear(IN, 11))
    with torch.no_grad():
        model[0].up.weight.mul_(case.scale)
    world = dist.get_world_size()
    if case.mesh == "hsdp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("copies", "shards"))
    elif case.mesh == "two dimensions":
        whole = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("shards", "parts"))
        for block in model[:3]:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, whole["parts"], plan)
        mesh = whole["shards"]
    else:
        mesh = init_device_mesh("cpu", (world,))
    how: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(case.dtype, torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if case.offload else OffloadPolicy(),
    }
    for block in model[:3]:
        fully_shard(block, reshard_after_forward=case.reshard, **how)
    fully_shard(model, **how)
    if case.meanwhile == "compiled":
        for block in model[:3]:
            block.compile(backend="aot_eager")
    table = convert(model, case.format, layers={"*": case.format}).precision_map
    table.phase.all_gather = all_gather
    if case.frozen:
        model[0].requires_grad_(False)
    return model, table


def train(case: Case, all_gather: Gathering) -> Told:
    model, table = build(case, all_gather)
    optimizer = optimizer_of(case, model)
    told = Told()
    for step in range(STEPS):
        table.before_batch()
        between(case, step, model, table)
        traffic = Traffic(weights=IN * case.hidden // 2)
        # Dynamo compiles nothing while a mode looks on.
        with nullcontext() if case.meanwhile == "compiled" else traffic:
            for index in range(case.micro_batches):
                last = index == case.micro_batches - 1
                model.set_requires_gradient_sync(last)
                model.set_reshard_after_backward(last or not case.stays)
                loss = loss_of(model, batch(case, step, index))
                loss.backward()
                told.losses.append(float(loss.detach()))
                if case.meanwhile == "evaluation":
                    told.evaluated.append(evaluate(model, case))
                if not last and case.meanwhile in IN_BETWEEN:
                    IN_BETWEEN[case.meanwhile](model, step)
        told.bytes.append(traffic.bytes)
        told.casts.append(traffic.casts)
        told.reductions.append(traffic.collectives["allreduce_"])
        optimizer.step()
        optimizer.zero_grad()
        table.step()
        told.amax.append(table.scale_history.amax.clone())
    told.evaluated.append(evaluate(model, case))
    told.graphs = counters["stats"]["unique_graphs"]
    told.weights = {name: whole_of(each) for name, each in model.named_parameters()}
    return told


def between(case: Case, step: int, model: Any, table: PrecisionMap) -> None:
    """What a run does between two steps."""
    happens: dict[str, Callable[[], object]] = {
        "flips": lambda: flip(step, table),
        "sampled": lambda: sample(step, model),
        "replay": lambda: replay(case, step, model, table),
        "written": lambda: write(model, step, every_rank=True),
        "written by one rank": lambda: write(model, step, every_rank=False),
        "forward alone": lambda: loss_of(model, batch(case, step, 7)),
        "not finite": lambda: step == 3 and write(model, step, every_rank=False, by=torch.inf),
    }
    happens.get(case.meanwhile, lambda: None)()


def flip(step: int, table: PrecisionMap) -> None:
    if step in (2, 4):
        table.set("1.*", "bf16" if step == 2 else "fp8-dynamic")
        table.set("*.down", "fp8-rowwise" if step == 2 else "fp8-delayed")
        table.apply()


def sample(step: int, model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, FPLinear):
            layer.collect = step in SAMPLED


def replay(case: Case, step: int, model: Any, table: PrecisionMap) -> None:
    """In the run's formats and in others, with gradients, which are dropped."""
    for formats in ({}, {"1.up": "bf16", "2.down": "fp8-rowwise"}):
        with table.overridden(formats):
            loss_of(model, batch(case, step, 5)).backward()
    model.zero_grad()


@torch.no_grad()
def write(model: Any, step: int, *, every_rank: bool, by: float = 3.0) -> None:
    """Larger weights than before, which no optimizer knows of."""
    if every_rank or dist.get_rank() == 1:
        local = model[1].up.weight.to_local()
        local.data[0, step] = by * local.abs().max()


@torch.no_grad()
def clip(model: Any, step: int) -> None:
    for parameter in model.parameters():
        parameter.clamp_(-0.1, 0.1)


@torch.no_grad()
def load(model: Any, step: int) -> None:
    """What was loaded, as after a rollback."""
    state = model.state_dict()
    model.load_state_dict({name: 0.5 * value for name, value in state.items()})


@torch.no_grad()
def turn(model: Any, step: int) -> None:
    """The same values in other places, and so of the same sum."""
    local = model[1].up.weight.to_local()
    local.copy_(local.flip(0))


IN_BETWEEN: dict[str, Callable[[Any, int], object]] = {
    "written in between": lambda model, step: write(model, step, every_rank=True),
    "written in between by one rank": lambda model, step: write(model, step, every_rank=False),
    "clipped in between": clip,
    "loaded in between": load,
    "turned in between": turn,
}
"""What a run may do to weights between two micro-batches of a step."""


class WritesData(torch.optim.SGD):
    """As optimizers of other libraries do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                local, grad = parameter.to_local().data, parameter.grad.to_local()
                local.copy_(local - 0.05 * grad)


def optimizer_of(case: Case, model: Any) -> torch.optim.Optimizer:
    if case.optimizer == "data":
        return WritesData(model.parameters(), lr=1.0)
    options = {} if case.optimizer == "AdamW" else {case.optimizer: True}
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def batch(case: Case, step: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * index + dist.get_rank())
    if case.mesh == "two dimensions":
        generator.manual_seed(100 * step + 10 * index)
    return torch.randn(TOKENS, IN, generator=generator)


def loss_of(model: Any, x: Tensor) -> Tensor:
    output = model(x)
    return output.float().square().mean()


@torch.no_grad()
def evaluate(model: Any, case: Case) -> float:
    model.eval()
    loss = float(loss_of(model, batch(case, 99, 0)))
    model.train()
    return loss


def whole_of(parameter: Tensor) -> Tensor:
    found = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return found.detach().clone()


def off(how: str) -> dict[str, Any]:
    """Runs whose weights cannot be gathered in FP8: bytes of a step, and what the log says."""
    case, lines = Case(), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("lightning_fp.layers.fsdp.weights")
    logger.addHandler(handler)
    model, table = build(case, "auto")
    if how == "another torch":
        for block in model[:3]:
            for group in block._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    del parameter.mp_policy
    if how == "own all-gather":
        for module in (*model[:3], model):
            module.set_custom_all_gather(Own())
    table.before_batch()
    if how == "another torch":
        return {"lines": lines}
    for step in range(2):
        with Traffic(weights=IN * case.hidden // 2) as traffic:
            loss_of(model, batch(case, step, 0)).backward()
    logger.removeHandler(handler)
    return {"lines": lines, "bytes": traffic.bytes}


class Own(DefaultAllGather):
    """A user's."""


def main(directory: Path, cases: dict[str, Case]) -> None:
    with one_of_two_ranks(directory, seconds=120) as rank:
        found: dict[str, Any] = {
            name: {kind: vars(train(case, kind)) for kind in ("auto", "high")}
            for name, case in cases.items()
        }
        found["off"] = {how: off(how) for how in ("another torch", "own all-gather", "")}
        torch.save(found, directory / f"rank{rank}.pt")
