"""Experts' weights that FSDP2 gathers are cast once for each gather, whoever of them is apart."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_fp import PrecisionMap, convert
from tests.experts import GroupedExperts, mixture
from tests.layers.fsdp.one_step import one_step

FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
IN, TOKENS = 32, 11
GROUPED = {"fp8-rowwise": 2, "fp8-rowwise-gw-hp": 2, "fp8-dynamic": 1}
EACH = {"fp8-block": 1, "mxfp8": 2}
"""Formats that multiply expert by expert. With scales along what a product sums over there are two
casts, one for each of two products."""

pytestmark = pytest.mark.skipif(
    not dist.is_available() or sys.platform != "linux", reason="needs gloo"
)


@pytest.fixture(autouse=True, scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("rank") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class OfTransformers(nn.Module):
    """A model's experts, to which every token goes by number."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.experts: Any = mixture(name).model.layers[0].mlp.experts
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        number = torch.arange(TOKENS)
        ids = torch.stack([number, number + 1], 1) % self.experts.num_experts
        how = ids, torch.full((TOKENS, 2), 0.5, dtype=x.dtype)
        if self.recompute:
            mixed: Any = checkpoint(self.experts, x, *how, use_reentrant=False)
            return x + mixed
        return x + self.experts(x, *how)


class OfTorchtitan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts: Any = GroupedExperts()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(x, torch.tensor([3, 4, 2, 2]))


MODELS = {
    "Mixtral": lambda: OfTransformers("Mixtral"),
    "Qwen3Moe": lambda: OfTransformers("Qwen3Moe"),
    "GptOss": lambda: OfTransformers("GptOss"),
    "torchtitan": OfTorchtitan,
}


class CastElements(TorchDispatchMode):
    """Counts the elements of weights that are cast to FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in FLOAT8 and args[0].is_floating_point():
            weight = min(result.shape[-2:]) >= IN and TOKENS not in result.shape
            self.count += result.numel() * (args[0].dtype not in FLOAT8 and weight)
        return result


def sharded(
    name: str, format: str, *, reshard: bool = False, recompute: bool = False
) -> tuple[Any, PrecisionMap]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(MODELS[name](), MODELS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    mesh, policy = init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(torch.bfloat16)
    for block in model:
        block.recompute = recompute
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    table = convert(model, format, layers={"*experts": format}).precision_map
    return model, table


step = partial(one_step, shape=(TOKENS, IN))


def weights_of(model: nn.Module) -> int:
    """Elements of the experts' weights."""
    return sum(p.numel() for p in model.parameters() if p.dim() == 3)


@pytest.mark.parametrize(
    ("name", "format", "recompute"),
    [
        ("Mixtral", "fp8-rowwise", True),
        ("Mixtral", "fp8-dynamic", False),
        ("Qwen3Moe", "fp8-rowwise", False),
        ("Qwen3Moe", "fp8-rowwise-gw-hp", True),
        ("GptOss", "fp8-rowwise", False),
        ("torchtitan", "fp8-dynamic", False),
    ],
)
def test_a_gathered_weight_is_cast_once_in_a_step(name: str, format: str, recompute: bool) -> None:
    """Whatever the micro-batches, backwards and recomputations between gather and reshard."""
    model, table = sharded(name, format, recompute=recompute)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        with CastElements() as casts:
            step(model, table, optimizer)
        assert casts.count == weights_of(model) * GROUPED[format]


@pytest.mark.parametrize("format", EACH)
def test_so_is_each_expert_that_is_multiplied_by_itself(format: str) -> None:
    model, table = sharded("Mixtral", format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        with CastElements() as casts:
            step(model, table, optimizer)
        assert casts.count == weights_of(model) * EACH[format]


def test_experts_apart_are_cast_once_too() -> None:
    """One is in bf16, one in a format of its own, and the others are cast without them."""
    model, table = sharded("Mixtral", "fp8-dynamic")
    table.set("*experts[1]", "bf16")
    table.set("*experts[3]", "fp8-rowwise")
    table.apply()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        with CastElements() as casts:
            step(model, table, optimizer)
        assert casts.count == weights_of(model) * (2 + 2) / 4


@pytest.mark.parametrize("format", [*GROUPED, *EACH, "e4m3-scaled", "apart"])
@pytest.mark.parametrize("reshard", [False, True])
def test_it_changes_no_bit(format: str, reshard: bool) -> None:
    runs: list[tuple[list[float], list[Tensor]]] = []
    for keeps in (True, False):
        first = "fp8-dynamic" if format == "apart" else format
        model, table = sharded("Qwen3Moe", first, reshard=reshard, recompute=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        table.before_batch()
        if format == "apart":
            table.set("*experts[2]", "fp8-rowwise")
            table.apply()
        for block in model:
            assert len(block.experts.gathered) == 2
            if not keeps:
                block.experts.gathered = ()
        losses = [step(model, table, optimizer) for _ in range(3)]
        weights = [p.full_tensor() for p in model.parameters() if isinstance(p, DTensor)]
        runs.append((losses, weights))
    (losses, weights), (others, other_weights) = runs
    assert losses == others
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
