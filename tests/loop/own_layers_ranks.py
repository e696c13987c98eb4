"""Ranks with layers of their own, for test_own_layers.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from lightning_fp import convert
from lightning_fp.layers import PrecisionMap
from lightning_fp.loop import PrecisionLoop
from tests.two_ranks import WORLD, one_of_two_ranks

WIDTH, STEPS, MICRO_BATCHES = 32, 4, 2
SHARED, LATE = "head", "blocks.3"


class Part(nn.Module):
    """Some of four blocks, which keep their names, and a head that all ranks have."""

    def __init__(self, blocks: list[int]) -> None:
        super().__init__()
        layers = {str(index): nn.Linear(WIDTH, WIDTH) for index in blocks}
        self.blocks = nn.ModuleDict(layers)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = torch.relu(block(x))
        return self.head(x)


def blocks_of(rank: int) -> list[int]:
    return [0, 1] if rank == 0 else [2, 3, 4]


def rows(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(8, WIDTH, generator=generator) * (1 + 3 * rank)


def loop_of(model: nn.Module, scaling: str = "delayed", **options: Any) -> PrecisionLoop:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    parts = {"fallback": False, "monitor": False, **options}
    layers = None if scaling == "auto" else {"*": f"fp8-{scaling}"}
    return PrecisionLoop(model, optimizer, scaling, layers=layers, base="32-true", **parts)


def amaxes(table: PrecisionMap) -> dict[str, Tensor]:
    history = table.scale_history
    return dict(zip(history.names, history.amax.clone(), strict=True))


def by_name(rank: int) -> dict[str, Any]:
    """Blocks are one rank's each, the head is everybody's."""
    torch.manual_seed(0)
    model = Part(blocks_of(rank))
    loop = loop_of(model)
    found: dict[str, Any] = {"amax": [], "own": [], "formats": []}
    for step in range(STEPS):
        if step == 2:  # on one rank this matches nothing
            loop.precision_map.set(LATE, "fp8-dynamic")
        seen: list[Tensor] = []
        hook = model.head.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0]))
        loop.step(lambda x: model(x).square().mean(), rows(rank, step))
        hook.remove()
        found["own"].append(seen[0].detach().abs().amax())
        found["amax"].append(amaxes(loop.precision_map))
        found["formats"].append(loop.precision_map.formats())
    loop.close()
    return found


def left_out(rank: int) -> dict[str, Any]:
    """A gradient that is not finite on one rank: both leave the step out."""
    torch.manual_seed(0)
    model = Part(blocks_of(rank))
    loop = loop_of(model)
    before = model.head.weight.detach().clone()
    bad = torch.nan if rank == 1 else 1.0
    loop.step(lambda x: bad * model(x).square().mean(), rows(rank, 0))
    return {"moved": not torch.equal(before, model.head.weight)}


def none_here(rank: int) -> dict[str, Any]:
    """A rank whose layers all are in high precision meets the others all the same."""
    torch.manual_seed(0)
    model = Part(blocks_of(rank))
    format = "high" if rank == 0 else "fp8-delayed"
    table = convert(model, format, layers={"*": format}).precision_map
    table.meet()
    for step in range(STEPS):
        model(rows(rank, step)).square().mean().backward()
        table.step()
    return {"amax": amaxes(table)}


def refused(rank: int) -> dict[str, Any]:
    """What cannot be, on both ranks."""
    own = dist.new_group([0]), dist.new_group([1])

    def said(make: Callable[[], object]) -> str:
        try:
            make()
        except ValueError as error:
            return str(error)
        return ""

    def sizes() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH * (1 + rank)))

    found = {
        "fallback": said(lambda: loop_of(Part(blocks_of(rank)), fallback=True, monitor=True)),
        "auto": said(lambda: loop_of(Part(blocks_of(rank)), "auto")),
        "sizes": said(lambda: loop_of(sizes())),
    }
    model = sizes()
    loop = loop_of(model, scale_group=own[rank])
    for step in range(STEPS):
        loop.step(lambda x: model(x).square().mean(), rows(rank, step))
    return {**found, "amax": amaxes(loop.precision_map)}


# -- a pipeline ----------------------------------------------------------------------------------


class Stage(nn.Module):
    """Blocks of a whole, by their names in it."""

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = torch.relu(block(x))
        return x


def whole() -> Stage:
    torch.manual_seed(0)
    return Stage({str(index): nn.Linear(WIDTH, WIDTH) for index in range(4)})


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def table_of(model: nn.Module) -> PrecisionMap:
    formats = {"*.1": "fp8-dynamic", "*": "fp8-delayed"}
    present = {k: v for k, v in formats.items() if k == "*" or "1" in dict(model.blocks)}  # pyright: ignore
    return convert(model, "fp8-delayed", layers=present).precision_map


def pipeline(rank: int) -> dict[str, Any]:
    """Two stages by torch's own schedule; the table needs to be told that ranks differ."""
    blocks = whole().blocks
    names = list(blocks)[2 * rank : 2 * rank + 2]
    model = Stage({name: blocks[name] for name in names})
    table = table_of(model)
    table.meet()
    # Without shapes it finds them on memory that nobody has written, which histories would record.
    shapes = torch.empty(8 // MICRO_BATCHES, WIDTH, device="meta", requires_grad=True)
    known = {"input_args": shapes, "output_args": shapes}
    stage = PipelineStage(model, rank, WORLD, torch.device("cpu"), **known)
    schedule = ScheduleGPipe(stage, MICRO_BATCHES, loss_fn=squared)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[Tensor] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        of_step: list[Tensor] = []
        if rank == 0:
            schedule.step(rows(0, step))
        else:
            schedule.step(target=rows(1, step), losses=of_step)
        optimizer.step()
        table.step()
        losses += of_step
    return {
        "losses": [float(loss) for loss in losses],
        "weights": {name: weight.detach().clone() for name, weight in model.named_parameters()},
    }


def without_pipeline() -> dict[str, Any]:
    """The same on one process."""
    model = whole()
    table = table_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        pair = [rows(part, step).chunk(MICRO_BATCHES) for part in range(2)]
        for x, target in zip(*pair, strict=True):
            loss = squared(model(x), target)
            (loss / MICRO_BATCHES).backward()
            table.after_backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        table.step()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return {"losses": losses, "weights": weights}


RUNS: dict[str, Callable[[int], dict[str, Any]]] = {
    "by name": by_name,
    "left out": left_out,
    "none here": none_here,
    "refused": refused,
    "pipeline": pipeline,
}


def main(directory: Path) -> None:
    with one_of_two_ranks(directory) as rank:
        torch.save({name: run(rank) for name, run in RUNS.items()}, directory / f"rank{rank}.pt")
