"""Ranks with the same and with other layers under delayed scaling: test_ranks.py."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_fp import convert
from tests.two_ranks import one_of_two_ranks


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
    with one_of_two_ranks(directory) as rank:
        stage = ["a", "b"] if rank == 0 else ["c", "d"]
        more = ["a"] if rank == 0 else ["a", "b", "c"]
        told = {"same": step(["a", "b"]), "other": step(stage), "fewer": step(more)}
        torch.save(told, directory / f"rank{rank}.pt")
