"""A compiled run and the same resumed, each in a process of its own: test_compile_clock.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from lightning_fp.loop import PrecisionLoop
from lightning_fp.records import read_events

SAVED = "saved.pt"


def main(directory: Path) -> None:
    """Two steps, from where another process has saved in the directory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    model.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loop = PrecisionLoop(
        model,
        optimizer,
        layers={"*": "fp8-dynamic"},
        base="32-true",
        monitor=False,
        dirpath=directory / "run",
    )
    saved = directory / SAVED
    if saved.exists():
        state: Any = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        loop.load_state_dict(state["loop"])
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        loop.step(lambda x: model(x).square().mean(), torch.randn(8, 16, generator=generator))
    torch.save({"model": model.state_dict(), "loop": loop.state_dict()}, saved)
    loop.close()
    waited = [
        event.step
        for event in read_events(directory / "run", kinds=["note"])
        if "compile_seconds" in event.numbers
    ]
    found = {"counters": dict(counters["inductor"]), "waited": waited}
    torch.save(found, directory / "found.pt")
