"""Ranks with the same and with other layers under delayed scaling: test_ranks.py."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lightning_fp import convert


def step(names: list[str]) -> str:
    """One training step of layers with these names; what it raised, or ""."""
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(16, 16))
    table = convert(model, "fp8-delayed", layers={"*": "fp8-delayed"}).precision_map
    try:
        for _ in range(2):
            model(torch.randn(16, 16)).sum().backward()
            table.step()
    except ValueError as error:
        return str(error)
    return ""


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    stage = ["a", "b"] if rank == 0 else ["c", "d"]
    more = ["a"] if rank == 0 else ["a", "b", "c"]
    told = {"same": step(["a", "b"]), "other": step(stage), "fewer": step(more)}
    torch.save(told, directory / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
