"""A replay leaves no trace, and what it measures is right."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_fp.layers import PrecisionMap, convert
from lightning_fp.layers.format import NAMED_FORMATS
from lightning_fp.stability import (
    GradientGap,
    RandomState,
    Replay,
    ReplayFailedError,
    compare,
    measure_parity,
    replay_step,
    untouched,
)
from tests.helper import TinyGPT, next_byte_loss, text_rows


class Messy(nn.Module):
    """Writes wherever a training step may write."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.teacher = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.accuracy = torchmetrics.MeanMetric()
        self.kept_metric = torchmetrics.CatMetric()
        self.register_buffer("inplace", torch.zeros(2))
        self.register_buffer("rebound", torch.zeros(2), persistent=False)
        self.plain = torch.zeros(3)
        self.steps = 0
        self.outputs: list[Any] = []
        self.nested: dict[str, list[int]] = {"a": []}
        self.hidden = [nn.BatchNorm1d(4)]
        self.generator = torch.Generator().manual_seed(1)

    def step(self) -> Tensor:
        x = torch.randn(6, 4, generator=self.generator) + random.random() + np.random.rand()
        loss = self.norm(self.linear(nn.functional.dropout(x))).square().mean()
        self.hidden[0](x)
        with torch.no_grad():
            self.teacher.weight.mul_(0.9).add_(self.linear.weight, alpha=0.1)
            self.inplace += 1
            self.plain += 1
        self.rebound = self.rebound + 1
        self.accuracy.update(loss.detach())
        self.kept_metric.update(loss.detach())
        self.steps += 1
        self.outputs.append(loss)
        self.nested["a"].append(self.steps)
        self.new = 1
        self.linear.weight.requires_grad_(False)
        self.norm.eval()
        torch.set_default_dtype(torch.float64)
        loss.backward()
        return loss


def state_of(model: Messy) -> dict[str, Any]:
    metrics = [
        copy.deepcopy((vars(m)["_update_count"], m.metric_state, vars(m)["_computed"]))
        for m in (model.accuracy, model.kept_metric)
    ]
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "hidden": {key: value.clone() for key, value in model.hidden[0].state_dict().items()},
        "metrics": metrics,
        "attributes": {name: id(value) for name, value in vars(model).items()},
        "buffers": {name: (id(b), b.clone()) for name, b in model.named_buffers()},
        "contents": copy.deepcopy((model.plain, model.steps, len(model.outputs), model.nested)),
        "generator": model.generator.get_state(),
        "flags": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [id(p.grad) for p in model.parameters()],
        "values": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": (random.getstate(), np.random.get_state()[1], torch.get_rng_state()),
        "dtype": torch.get_default_dtype(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def assert_same(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    elif isinstance(one, (Tensor, np.ndarray)):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), path
    else:
        assert one == other, path


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_that_a_step_writes_is_left(fails: bool) -> None:
    model = Messy()
    model.linear.weight.grad = torch.ones(4, 4)
    model.accuracy.update(1.0)
    before = state_of(model)
    try:
        with torch.no_grad(), untouched(model):
            assert all(p.grad is None for p in model.parameters())
            model.step()
            assert model.linear.bias.grad is not None
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert_same(state_of(model), before)


def test_a_frozen_model_larger_than_the_trained_part_is_not_copied() -> None:
    model = nn.Sequential(nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 2))
    with untouched(model), torch.no_grad():
        model[0].weight.zero_()
    assert not model[0].weight.any()


class Owner:
    """Neither a module nor a part of one: a callback, a scheduler."""

    def __init__(self) -> None:
        self.count, self.name = 0, "a"
        self.shadow = {"w": torch.ones(2), "deep": [torch.zeros(1)]}
        self.array = np.zeros(3)
        self.generators: list[Any] = [
            random.Random(0),
            np.random.default_rng(0),
            np.random.RandomState(0),
            torch.Generator().manual_seed(0),
        ]
        self.average = nn.BatchNorm1d(4)

    def write(self) -> None:
        self.count, self.name, self.new = 1, "b", 1
        self.shadow["w"] += 1
        self.shadow["deep"][0].fill_(3)
        self.shadow["more"] = torch.ones(1)
        self.array += 1
        self.draw()
        self.average(torch.randn(3, 4))

    def draw(self) -> tuple[float, ...]:
        python, numpy, old, own = self.generators
        numbers = (python.random(), numpy.random(), old.rand())
        return (*map(float, numbers), torch.rand((), generator=own).item())


def test_what_hooks_write_into_other_objects_is_undone() -> None:
    def contents(owner: Owner) -> dict[str, Any]:
        plain = {
            name: v for name, v in vars(owner).items() if name not in ("generators", "average")
        }
        return copy.deepcopy({**plain, "average": dict(owner.average.state_dict())})

    model, owner = nn.Linear(2, 2), Owner()
    before, same = contents(owner), [owner.shadow, owner.shadow["w"], owner.array]
    with untouched(model, [owner]):
        owner.write()
    assert_same(contents(owner), before)
    assert all(
        a is b for a, b in zip(same, [owner.shadow, owner.shadow["w"], owner.array], strict=True)
    )
    assert owner.draw() == Owner().draw()


def test_an_optimizers_own_numbers_are_undone_and_its_state_is_left_alone() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer: Any = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.steps = 0
    with untouched(nn.Linear(1, 1), [optimizer]):
        parameter.grad = torch.ones(2)
        optimizer.step()
        optimizer.steps += 1
    assert optimizer.steps == 0
    assert parameter in optimizer.state


def test_an_optimizer_in_a_backward_hook_does_not_step() -> None:
    model = nn.Linear(3, 3)
    stepped: list[str] = []
    model.weight.register_post_accumulate_grad_hook(lambda _: stepped.append("step"))
    with untouched(model):
        model(torch.ones(1, 3)).sum().backward()
    assert not stepped
    model(torch.ones(1, 3)).sum().backward()
    assert stepped == ["step"]


def test_the_random_state_gives_the_same_numbers_again() -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    state = RandomState.capture()
    first = draw()
    draw()
    state.restore()
    assert draw() == first


# -- replay -------------------------------------------------------------------------------------


def converted(format: str = "fp8-delayed", **options: Any) -> tuple[TinyGPT, PrecisionMap]:
    torch.manual_seed(0)
    model = TinyGPT(**options)
    table = convert(model, format).precision_map
    assert table is not None
    return model, table


def forward_backward(model: nn.Module, rows: slice = slice(0, 4)) -> Callable[[], Tensor]:
    batch = text_rows(64)[rows]

    def step() -> Tensor:
        loss = next_byte_loss(model, batch)
        loss.backward()
        return loss

    return step


def train(model: nn.Module, table: PrecisionMap, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index in range(steps):
        optimizer.zero_grad()
        forward_backward(model, slice(4 * index, 4 * index + 4))()
        optimizer.step()
        table.step()


def table_state(table: PrecisionMap) -> dict[str, Any]:
    layers = table.layers.values()
    memories = [layer.memory for layer in layers if layer.memory is not None]
    return copy.deepcopy(
        {
            "state": table.state_dict(),
            "changes": len(table.changes),
            "recorded": [memory.recorded for memory in memories],
            "leaves": [memory.grad_leaf.grad for memory in memories],
            "calls": [memory.calls for memory in memories],
            "scales": [memory.scales for memory in memories],
            "formats": [(layer.format, layer.kernel, layer.record) for layer in layers],
            "folded": table.scale_history._grad_record,
            "watched": table.scale_history._recorded,
            "phase": table.phase.evaluating,
        }
    )


def test_a_replay_is_the_step_and_leaves_the_table_alone() -> None:
    model, table = converted(dropout=0.2)
    train(model, table)
    table.set("*fc1", "bf16", reason="waits for the boundary")
    forward_backward(model, slice(8, 12))()  # mid-accumulation: records and leaves are pending
    before, rng = table_state(table), RandomState.capture()
    done = replay_step(forward_backward(model), model, table)
    assert_same(table_state(table), before)
    assert_same(torch.get_rng_state(), rng.torch)

    model.zero_grad()
    loss = forward_backward(model)()
    assert torch.equal(done.loss, loss)
    for replayed, parameter in zip(done.gradients, model.parameters(), strict=True):
        assert torch.equal(replayed, parameter.grad)


def test_what_a_plugin_does_around_a_step_is_held_off() -> None:
    model, table = converted()
    train(model, table)
    forward_backward(model)()
    table.set("*fc1", "bf16", reason="waits for the boundary")
    before = table_state(table)

    def step() -> Tensor:
        assert table.apply() == []
        loss = forward_backward(model)()
        table.after_backward()
        assert table.step() == []
        return loss

    replay_step(step, model, table)
    assert_same(table_state(table), before)
    assert len(table.apply()) == 2


def test_a_replay_from_an_earlier_random_state() -> None:
    model, table = converted(dropout=0.5)
    rng = RandomState.capture()
    loss = forward_backward(model)()
    assert torch.equal(replay_step(forward_backward(model), model, table, rng=rng).loss, loss)
    assert not torch.equal(replay_step(forward_backward(model), model, table).loss, loss)


def test_formats_change_for_the_replay_only() -> None:
    model, table = converted()
    train(model, table)
    reference = copy.deepcopy(model)
    for layer in table.layers:
        reference.get_submodule(layer).switch(NAMED_FORMATS["high"], model.lm_head.kernel)
    before = table_state(table)
    done = replay_step(
        forward_backward(model), model, table, formats=dict.fromkeys(table.layers, "high")
    )
    assert_same(table_state(table), before)
    reference.zero_grad()
    assert torch.equal(done.loss, forward_backward(reference)())
    for replayed, parameter in zip(done.gradients, reference.parameters(), strict=True):
        assert torch.equal(replayed, parameter.grad)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_running_out_of_memory_is_a_result(where: str) -> None:
    model, table = converted()
    train(model, table)

    def exhaust(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    layer = model.blocks[1].fc1
    if where == "forward":
        handle = layer.register_forward_hook(exhaust)
    else:
        handle = layer.weight.register_hook(exhaust)
    before = table_state(table)
    gradients = [id(p.grad) for p in model.parameters()]
    done = replay_step(forward_backward(model), model, table)
    handle.remove()
    assert done == Replay(outcome="out of memory")
    assert_same(table_state(table), before)
    assert gradients == [id(p.grad) for p in model.parameters()]


def test_any_other_exception_comes_through_and_all_is_restored() -> None:
    model, table = converted()
    train(model, table)
    before = table_state(table)

    def fail() -> Tensor:
        next_byte_loss(model, text_rows(4)).backward()
        raise RuntimeError("not about memory")

    with pytest.raises(RuntimeError, match="not about memory"):
        replay_step(fail, model, table, formats={"blocks.0.fc1": "bf16"})
    assert_same(table_state(table), before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_nothing_is_compiled_and_compiled_graphs_stay_valid() -> None:
    model, table = converted("fp8-delayed")
    model.blocks[0].compile(backend="eager")
    train(model, table)
    graphs = dict(torch._dynamo.utils.counters["stats"])
    assert graphs["unique_graphs"] > 0
    for formats in ({}, {"blocks.0.fc1": "high"}, {"blocks.1.proj": "fp8-dynamic"}):
        replay_step(forward_backward(model), model, table, formats=formats, observe=True)
    train(model, table)
    assert dict(torch._dynamo.utils.counters["stats"]) == graphs
    assert table._budget.seen == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model, table = converted(dropout=0.2)
    train(model, table)
    plain = replay_step(forward_backward(model), model, table, observe=True)
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda x, f=inner: checkpoint(f, x, use_reentrant=reentrant)
    checkpointed = replay_step(forward_backward(model), model, table, observe=True)
    assert compare(plain, checkpointed, model, table).all.error == 0


# -- comparison ---------------------------------------------------------------------------------


def test_gaps_equal_a_computation_in_float64() -> None:
    model, table = converted("fp8-dynamic")
    one = replay_step(forward_backward(model), model, table)
    high = dict.fromkeys(table.layers, "high")
    other = replay_step(forward_backward(model), model, table, formats=high)
    comparison = compare(one, other, model, table)
    names = [name for name, _ in model.named_parameters()]
    pairs = zip(one.gradients, other.gradients, strict=True)
    gradients = dict(zip(names, pairs, strict=True))
    groups = {None: list(gradients), "blocks.0.fc1": ["blocks.0.fc1.weight", "blocks.0.fc1.bias"]}
    for layer, names in groups.items():
        a, b = (
            torch.cat([gradients[name][side].double().flatten() for name in names])
            for side in (0, 1)
        )
        gap = comparison.all if layer is None else comparison.layers[layer]
        expected = GradientGap(
            cosine=torch.nn.functional.cosine_similarity(a, b, dim=0).item(),
            norm_ratio=(a.norm() / b.norm()).item(),
            error=((a - b).norm() / b.norm()).item(),
            norm=b.norm().item(),
        )
        assert vars(gap) == pytest.approx(vars(expected), rel=1e-6)
    assert comparison.losses == (one.loss.item(), other.loss.item())


@pytest.mark.parametrize("kind", ["sparse", "uncoalesced", "mixed", "bf16", "complex", "none"])
def test_gaps_of_gradients_of_any_kind(kind: str) -> None:
    torch.manual_seed(0)
    model, table = converted()
    index = torch.tensor([[0, 3, 3]])
    a, b = torch.randn(2, 3, 4, dtype=torch.double).float().unbind(0)
    one, other = (torch.sparse_coo_tensor(index, x, (5, 4), check_invariants=True) for x in (a, b))
    if kind == "sparse":
        one, other = one.coalesce(), other.coalesce()
    elif kind == "mixed":
        one = one.to_dense()
    elif kind == "bf16":
        one, other = one.bfloat16(), other.bfloat16()
    elif kind == "complex":
        one, other = (torch.view_as_complex(x.reshape(6, 2)) for x in (a, b))
    elif kind == "none":
        one = torch.sparse_coo_tensor(size=(5, 4), check_invariants=True)
    rest = [None] * (len(list(model.parameters())) - 1)
    first = None if kind == "none" else one
    replays = [
        Replay(loss=torch.zeros(()), gradients=[gradient, *rest]) for gradient in (first, other)
    ]
    gap = compare(*replays, model, table).all
    dense = [x.to(torch.promote_types(x.dtype, torch.double)).to_dense() for x in (one, other)]
    exact = float((dense[0] - dense[1]).norm() / dense[1].norm())
    assert gap.error == pytest.approx(exact, rel=1e-6)
    assert gap.norm_ratio == pytest.approx(float(dense[0].norm() / dense[1].norm()), rel=1e-6)


def test_gaps_at_the_edges() -> None:
    model, table = converted("fp8-dynamic")
    zero = [torch.zeros_like(p) for p in model.parameters()]
    some = [torch.ones_like(p) for p in model.parameters()]
    loss = torch.zeros(())

    def gap(one: list[Any], other: list[Any]) -> GradientGap:
        replays = (Replay(loss=loss, gradients=g) for g in (one, other))
        return compare(*replays, model, table).all

    assert gap(zero, [None] * len(zero)) == GradientGap(cosine=1.0, norm_ratio=1.0, error=0.0)
    assert gap(some, [-x for x in some]).cosine == pytest.approx(-1)
    assert gap(some, zero).error == float("inf")
    assert np.isnan(gap([x * float("nan") for x in some], some).cosine)


@pytest.mark.parametrize("name", ["blocks.0.qkv", "blocks.1.fc2"])
@pytest.mark.parametrize("operand", [0, 2])
def test_a_layer_that_clamps_is_found(name: str, operand: int) -> None:
    model, table = converted()
    train(model, table)
    table.layers[name].memory.scales[operand] *= 64
    rng = RandomState.capture()

    def run(formats: Any, *, observe: bool = False) -> Replay:
        step = forward_backward(model)
        return replay_step(step, model, table, formats=formats, rng=rng, observe=observe)

    parity = measure_parity(run, model, table, NAMED_FORMATS["high"], worst=2)
    assert parity.noise == 0
    assert parity.worst[0].layer == name
    assert parity.worst[0].removed_error > 0.5
    assert len(parity.worst) == 2


def test_without_memory_there_is_no_parity() -> None:
    model, table = converted()

    def run(formats: Any, *, observe: bool = False) -> Replay:
        return Replay(outcome="out of memory")

    with pytest.raises(ReplayFailedError, match="out of memory"):
        measure_parity(run, model, table, NAMED_FORMATS["high"])
