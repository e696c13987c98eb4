"""Any layer changes to any format in mid-run: eager, and compiled by blocks and as a whole."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from lightning_fp import FP8Precision, convert
from lightning_fp.layers import linear_format
from lightning_fp.layers.regions import (
    RECOMPILE_LIMIT,
    PatternBudget,
    Region,
    compiled_regions,
    raise_recompile_limit,
)
from tests.helper import FORMATS, LanguageModel, TinyGPT, fit, next_byte_loss, text_rows

# Dynamo looks at the gradient of every input of a compiled block.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def every_transition(formats: tuple[str, ...]) -> list[str]:
    """A walk over `formats` that takes every ordered pair once."""
    remaining = {a: [b for b in formats if b != a] for a in formats}
    walk, stack = [], [formats[0]]
    while stack:
        if remaining[stack[-1]]:
            stack.append(remaining[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return walk[::-1]


def test_the_walk_takes_every_pair() -> None:
    walk = every_transition(FORMATS)
    assert set(itertools.pairwise(walk)) == set(itertools.permutations(FORMATS, 2))


class Identity:
    """What a flip must not touch."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.before = self.now()

    def now(self) -> dict[str, Any]:
        state = self.optimizer.state
        return {
            "modules": [id(module) for module in self.model.modules()],
            "parameters": [(id(p), p.data_ptr()) for p in self.model.parameters()],
            "keys": list(self.model.state_dict()),
            "optimizer": [id(p) for g in self.optimizer.param_groups for p in g["params"]],
            "moments": [
                state[p]["exp_avg"].data_ptr() for p in self.model.parameters() if p in state
            ],
        }

    def check(self) -> None:
        now = self.now()
        if not self.before["moments"]:
            self.before["moments"] = now["moments"]
        assert now == self.before


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = next_byte_loss(model, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_every_format_to_every_other_eagerly() -> None:
    model, batch = TinyGPT(), text_rows(4)
    table = convert(model).precision_map
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    identity = Identity(model, optimizer)
    for index, format in enumerate(every_transition(FORMATS)):
        table.set(f"blocks.{index % 2}.*", format)
        table.apply()
        # exactly what a model computes that was converted this way from the start
        fresh = TinyGPT()
        fresh.load_state_dict(model.state_dict())
        convert(fresh, layers=table.formats())
        assert torch.equal(next_byte_loss(model, batch), next_byte_loss(fresh, batch))
        assert step(model, optimizer, batch).isfinite()
        identity.check()
    assert all(s["step"] == index + 1 for s in optimizer.state.values())


def test_every_format_to_every_other_in_a_trainer() -> None:
    walk = every_transition(FORMATS)

    class Flip(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
            self.identity = Identity(module, trainer.optimizers[0])

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.identity.check()
            trainer.precision_plugin.precision_map.set(
                f"*.blocks.{trainer.global_step % 2}.*", walk[trainer.global_step]
            )

    plugin = FP8Precision()
    model = fit(plugin, max_steps=len(walk) - 1, callbacks=[Flip()])
    assert torch.tensor(model.losses).isfinite().all()
    assert sum(model.losses[-5:]) < sum(model.losses[:5])
    assert len(plugin.precision_map.changes) > 100


# -- compiled ----------------------------------------------------------------------------------


class CountingBackend:
    """Dynamo's graphs, run as they are, and counted: a region that fell back runs none."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


class Flat(nn.Module):
    """Six small blocks of two linear layers."""

    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FlatBlock() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class FlatBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def compile_it(model: nn.Module, how: str, backend: Any) -> nn.Module:
    if how == "regional":
        for block in model.blocks:  # pyright: ignore
            block.compile(backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    else:
        return torch.compile(model, backend=backend)  # pyright: ignore
    return model


@pytest.mark.parametrize(
    "how",
    ["regional", *(pytest.param(how, marks=pytest.mark.slow) for how in ("whole", "in place"))],
)
def test_flips_under_compile_are_the_eager_ones(how: str) -> None:
    walk = ["fp8-dynamic", "bf16", "fp8-rowwise", "e8m3", "fp8-dynamic", "high"]
    losses: dict[str, list[float]] = {}
    for mode in ("eager", "compiled"):
        torch.manual_seed(0)
        model: nn.Module = Flat(2)
        inner, x = model, torch.randn(32, 16)
        if mode == "compiled":
            model = compile_it(model, how, "aot_eager")
        table = convert(model).precision_map
        assert list(table.formats()) == [n for n, m in inner.named_modules() if hasattr(m, "fqn")]
        optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
        identity = Identity(inner, optimizer)
        losses[mode] = []
        for index, format in enumerate(walk):
            table.set("blocks.1.*" if index % 2 else "*.up", format)
            table.apply()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (model(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[mode].append(loss.item())
            identity.check()
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-3)
    assert losses["eager"][-1] < losses["eager"][0]


@pytest.mark.slow
def test_forty_random_flips_never_fall_back_to_eager() -> None:
    random.seed(0)
    backend, model, x = CountingBackend(), Flat(), torch.randn(32, 16, requires_grad=True)
    for block in model.blocks:
        block.compile(backend=backend)
    table = convert(model).precision_map
    assert torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT
    formats = ("fp8-dynamic", "fp8-rowwise", "bf16", "e8m3", "fp8-rowwise-gw-hp", "fp32")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for flip in range(40):
            table.set(random.choice(list(table.layers)), random.choice(formats))
            table.apply()
            before = backend.runs
            model(x).square().sum().backward()
            assert backend.runs - before == 6, f"flip {flip}: a block ran eagerly"
    patterns = {(block.up.format, block.down.format) for block in model.blocks}
    assert len(patterns) > 1
    # blocks of one class share their graphs: as many as there were patterns, not six times that
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(FlatBlock.forward.__code__)
    assert backend.graphs <= len(formats) ** 2
    assert len(entries) == backend.graphs


def test_blocks_of_equal_format_share_one_graph() -> None:
    backend, model, x = CountingBackend(), Flat(), torch.randn(32, 16, requires_grad=True)
    for block in model.blocks:
        block.compile(backend=backend)
    table = convert(model).precision_map
    model(x).sum().backward()
    assert (backend.graphs, backend.runs) == (1, 6)
    table.set("blocks.3.up", "bf16")
    table.apply()
    model(x).sum().backward()
    assert (backend.graphs, backend.runs) == (2, 12)
    table.set("blocks.3.up", "fp8-dynamic")
    table.apply()
    model(x).sum().backward()
    assert (backend.graphs, backend.runs) == (2, 18)


def test_writes_are_widened_before_the_limit() -> None:
    random.seed(0)
    backend, model, x = CountingBackend(), Flat(), torch.randn(32, 16, requires_grad=True)
    for block in model.blocks:
        block.compile(backend=backend)
    table = convert(model).precision_map
    formats = ("fp8-dynamic", "fp8-rowwise", "bf16", "e8m3")
    with torch._dynamo.config.patch(recompile_limit=12, fail_on_recompile_limit_hit=True):
        for _ in range(30):
            table.set(random.choice(list(table.layers)), random.choice(formats))
            table.apply()
            before = backend.runs
            model(x).sum().backward()
            assert backend.runs - before == 6
    widened = [change for change in table.changes if change.reason.startswith("widened")]
    assert widened
    assert widened[0].reason.startswith("widened to all of blocks.")
    # six mixed patterns, and one uniform pattern for each format
    assert backend.graphs <= 6 + len(formats)


# -- regions and their budget ---------------------------------------------------------------------


def test_regions_are_found_however_they_were_compiled() -> None:
    model = Flat(3)
    model.blocks[0].compile(backend="eager")
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # pyright: ignore
    layers = convert(model).precision_map.layers
    regions = compiled_regions(model, layers)
    assert [(region.name, region.layers) for region in regions] == [
        ("blocks.0", ("blocks.0.up", "blocks.0.down")),
        ("blocks.1", ("blocks.1.up", "blocks.1.down")),
    ]
    assert {region.code for region in regions} == {FlatBlock.forward.__code__}
    whole = torch.compile(Flat(1), backend="eager")
    (region,) = compiled_regions(whole, convert(whole).precision_map.layers)
    assert region.name == ""
    assert region.code is Flat.forward.__code__


@pytest.mark.slow
def test_a_compiled_lightning_module_is_found() -> None:
    model = LanguageModel()
    compiled = torch.compile(model, backend="eager")
    plugin = FP8Precision()
    fit(plugin, compiled, max_steps=2)  # pyright: ignore
    assert plugin.precision_map.model is not None
    regions = compiled_regions(plugin.precision_map.model, plugin.precision_map.layers)
    assert [len(region.layers) for region in regions] == [9]


def test_the_limit_is_raised_and_never_lowered() -> None:
    for limit, expected in ((8, RECOMPILE_LIMIT), (500, 500)):
        with torch._dynamo.config.patch(recompile_limit=limit):
            raise_recompile_limit()
            assert torch._dynamo.config.recompile_limit == expected


def test_the_budget_counts_patterns_and_widens() -> None:
    code = FlatBlock.forward.__code__
    low, high, other = (linear_format(name) for name in ("fp8-dynamic", "bf16", "e8m3"))
    regions = [Region(f"b{i}", code, (f"b{i}.up", f"b{i}.down")) for i in range(2)]
    before = {name: low for region in regions for name in region.layers}
    with torch._dynamo.config.patch(recompile_limit=4):
        budget = PatternBudget()
        assert budget.limit == 2
        writes = {"b0.up": high}
        assert budget.widen(regions, before, writes) == {}  # the second pattern
        assert writes == {"b0.up": high}
        now = {**before, **writes}
        writes = {"b1.up": high}
        assert budget.widen(regions, now, writes) == {}  # seen before, in another region
        now = {**now, **writes}
        writes = {"b1.down": other}
        assert budget.widen(regions, now, writes) == {"b1.up": "b1"}  # one too many
        assert writes == {"b1.down": other, "b1.up": other}
