"""Weights that FSDP2 gathers are cast once, and what is kept of the casts goes with them."""

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
from lightning_fp.layers import FPLinear
from lightning_fp.layers.fsdp import weights as fsdp_weights
from tests.layers.fsdp.one_step import one_step

IN, OUT, TOKENS = 48, 80, 7
FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
BOTH_WAYS = {"fp8-rowwise": 2, "mxfp8": 2}
"""Formats whose scales lie along what a product sums over: one cast for each of two products."""

FORMATS = ["fp8-dynamic", "fp8-delayed", "fp8-rowwise", "fp8-block", "mxfp8"]

pytestmark = pytest.mark.skipif(
    not dist.is_available() or sys.platform != "linux", reason="needs gloo"
)


@pytest.fixture(autouse=True, scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("rank") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self, *, recompute: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, IN)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            return checkpoint(self.inside, x, use_reentrant=False)
        return self.inside(x)

    def inside(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class WeightCasts(TorchDispatchMode):
    """Counts casts to FP8 of what has a weight's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in FLOAT8 and args[0].is_floating_point():
            self.count += args[0].dtype not in FLOAT8 and set(result.shape) == {IN, OUT}
        return result


def sharded(
    format: str, *, reshard: bool = False, recompute: bool = False
) -> tuple[nn.Module, PrecisionMap]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(recompute=recompute), Block(recompute=recompute))
    mesh, policy = init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(torch.bfloat16)
    for block in model:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    table = convert(model, format).precision_map
    return model, table


step = partial(one_step, shape=(TOKENS, IN))


def layers(model: nn.Module) -> list[FPLinear]:
    return [module for module in model.modules() if isinstance(module, FPLinear)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_gathered_weight_is_cast_once_in_a_step(format: str, recompute: bool) -> None:
    """Whatever the micro-batches, backwards and recomputations between gather and reshard."""
    model, table = sharded(format, recompute=recompute)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with WeightCasts() as casts:
            step(model, table, optimizer)
        assert casts.count == len(layers(model)) * BOTH_WAYS.get(format, 1)


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_that_is_sharded_in_between_is_cast_for_each_gather(format: str) -> None:
    model, table = sharded(format, reshard=True, recompute=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with WeightCasts() as casts:
        step(model, table, optimizer, micro_batches=1)
    gathers = 2
    both_ways = BOTH_WAYS.get(format, 1) - 1  # backward's own is not made in forward
    assert casts.count == len(layers(model)) * (gathers + both_ways)


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("format", [*FORMATS, "e4m3-scaled", "e8m3"])
def test_it_changes_no_bit(format: str, reshard: bool) -> None:
    runs: list[tuple[list[float], list[Tensor]]] = []
    for keeps in (True, False):
        model, table = sharded(format, reshard=reshard, recompute=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        table.before_batch()
        assert all(layer.gathered is not None for layer in layers(model))
        for layer in layers(model) if not keeps else []:
            layer.gathered = None
        losses = [step(model, table, optimizer) for _ in range(3)]
        weights = [p.full_tensor() for p in model.parameters() if isinstance(p, DTensor)]
        runs.append((losses, weights))
    (losses, weights), (others, other_weights) = runs
    assert losses == others
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


@pytest.mark.parametrize("format", [*FORMATS, "e4m3-scaled", "e8m3"])
def test_a_resharded_weight_leaves_no_cast_behind(format: str) -> None:
    """What FSDP2 frees besides is as long as the ways to cast a weight, step after step."""
    model, table = sharded(format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, table, optimizer)
    weights = dict(fsdp_weights._weights(model))
    for layer in layers(model):
        freed = weights[layer]._unsharded_inner_tensors
        assert 1 <= len(freed) <= 4
        assert all(each.untyped_storage().size() == 0 for each in freed)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_the_weight_any_more_is_cast_anew(format: str) -> None:
    """Written to in place, or another weight that is lent for a call."""
    model, table = sharded(format)
    table.before_batch()
    block: Any = next(model.children())
    x = torch.randn(TOKENS, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        model(x)
        layer: FPLinear = block.up
        before = layer(x)
        lent = torch.func.functional_call(layer, {"weight": layer.weight * 2}, (x,))
        layer.weight.mul_(2)
        written = layer(x)
    assert not torch.equal(written, before)
    assert torch.equal(written, lent)


def test_formats_change_and_casts_with_them() -> None:
    model, table = sharded("fp8-dynamic")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, table, optimizer)
    table.set("*.up", "bf16")
    table.set("*.down", "fp8-block")
    table.apply()
    with WeightCasts() as casts:
        step(model, table, optimizer)
    assert casts.count == 2


def test_without_torchs_private_fields_it_is_off_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(_: object) -> None:
        raise AttributeError("'FSDPParam' object has no attribute 'all_gather_outputs'")

    monkeypatch.setattr(fsdp_weights, "_check", missing)
    model, table = sharded("fp8-dynamic")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, table, optimizer)
    assert all(layer.gathered is None for layer in layers(model))
    (line,) = [r.getMessage() for r in caplog.records if "cast anew" in r.getMessage()]
    assert "has no attribute 'all_gather_outputs'" in line


def test_torch_frees_what_is_in_its_list_with_the_weight() -> None:
    """The contract that the rest stands on."""
    model, _ = sharded("fp8-dynamic")
    (_, weight), *_ = fsdp_weights._weights(model)
    ours = torch.ones(4)
    with torch.no_grad():
        model(torch.randn(TOKENS, IN, dtype=torch.bfloat16))
    weight._unsharded_inner_tensors.append(ours)
    assert weight.all_gather_outputs[0].untyped_storage().size() > 0
    for block in model.children():
        block.reshard()  # pyright: ignore
    assert weight.all_gather_outputs[0].untyped_storage().size() == 0
    assert ours.untyped_storage().size() == 0
