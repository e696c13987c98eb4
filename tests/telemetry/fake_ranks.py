"""One of 1,024 ranks that are not there, by torch's fake process group: test_rank_costs.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp.loop import PrecisionLoop
from tests.helper import TinyGPT, next_byte_loss, text_rows

HSDP = ("copies", "shards")
RANKS, SHARDS = 1024, 8
SAMPLE_EVERY, LOG_EVERY, STEPS = 3, 3, 3
FIRST_SAMPLED = 1
"""Seed by which of three steps the first is sampled."""


class Asked(TorchDispatchMode):
    """What a rank hands to collectives of all ranks: the mesh's own are the strategy's."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives = self.sent = self.received = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name: str = func.__name__
        if func.namespace == "c10d" and name.startswith(("allreduce_.", "allgather_.")):
            gathers = name.startswith("allgather")
            inputs, group = (args[1], args[2]) if gathers else (args[0], args[1])
            if ProcessGroup.unbox(group).size() < RANKS:
                return func(*args, **(kwargs or {}))
            size = sum(each.nbytes for each in inputs)
            self.collectives += 1
            self.sent += size
            self.received += size * (len(args[0][0]) if gathers else 1)
        return func(*args, **(kwargs or {}))


class OfShards(TorchDispatchMode):
    """What a rank hands to the ranks that share its weights, but for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.agreed = self.gathered = (0, 0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name: str = func.__name__
        if func.namespace == "c10d" and name.startswith(("allreduce_.", "_allgather_base_.")):
            gathers = name.startswith("_allgather_base")
            group = args[2] if gathers else args[1]
            if ProcessGroup.unbox(group).size() == SHARDS:
                sent = args[1].nbytes if gathers else sum(each.nbytes for each in args[0])
                received = args[0].nbytes if gathers else sent
                before = self.gathered if gathers else self.agreed
                after = before[0] + 1, before[1] + sent, before[2] + received
                if gathers:
                    self.gathered = after
                else:
                    self.agreed = after
        return func(*args, **(kwargs or {}))


def steps(scaling: str, blocks: int, directory: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = TinyGPT(blocks=blocks)
    mesh = init_device_mesh("cpu", (RANKS // SHARDS, SHARDS), mesh_dim_names=HSDP)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loop = PrecisionLoop(
        model,
        torch.optim.AdamW(model.parameters()),
        scaling,
        layers={"*": f"fp8-{scaling}"},
        base="32-true",
        monitor={
            "every_n_steps": SAMPLE_EVERY,
            "log_every_n_steps": LOG_EVERY,
            "seed": FIRST_SAMPLED,
        },
        log_every_n_steps=LOG_EVERY,
        dirpath=directory,
    )
    found: list[tuple[int, int, int]] = []
    shared: list[dict[str, tuple[int, int, int]]] = []
    for batch in text_rows(4 * STEPS).split(4):
        with Asked() as asked, OfShards() as of_shards:
            loop.step(lambda rows: next_byte_loss(model, rows), batch)
        found.append((asked.collectives, asked.sent, asked.received))
        shared.append({"agreed": of_shards.agreed, "gathered": of_shards.gathered})
    snapshots = loop._parts.watching
    assert snapshots is not None
    return {
        "steps": found,
        "shared": shared,
        "blocks": _sizes(TinyGPT(blocks=blocks).blocks),
        "rest": _sizes(nn.ModuleList(m for n, m in model.named_children() if n != "blocks")),
        "layers": len(loop.precision_map.layers),
        "parameters": sum(p.numel() for p in TinyGPT(blocks=blocks).parameters()),
        "snapshot": snapshots.snapshots.kept[0].nbytes,
    }


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Elements of the weights of linear layers, and of everything else."""
    linears = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    weights = sum(weight.numel() for weight in linears)
    return weights, sum(p.numel() for p in model.parameters()) - weights


def main(directory: Path) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    found = {
        f"{scaling} {blocks}": steps(scaling, blocks, directory / f"{scaling} {blocks}")
        for scaling, blocks in (("delayed", 1), ("delayed", 4), ("dynamic", 1))
    }
    torch.save(found, directory / "found.pt")
