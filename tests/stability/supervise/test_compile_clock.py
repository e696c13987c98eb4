"""What the compiler takes is said where a run waits for it: at its start, and after a demotion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_fp.loop import PrecisionLoop
from lightning_fp.records import read_events
from lightning_fp.stability.supervise.compile_clock import CompileClock


def test_it_counts_while_it_runs() -> None:
    torch._dynamo.reset()
    clock = CompileClock()
    twice = torch.compile(lambda x: 2 * x, backend="eager")
    clock.start()
    twice(torch.ones(2))
    assert clock.take() > 0
    twice(torch.ones(2))
    assert clock.take() == 0
    clock.close()
    twice(torch.ones(2, dtype=torch.float64))
    assert clock.take() == 0


@pytest.mark.slow
def test_a_run_says_what_it_waited_for(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    model.compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loop = PrecisionLoop(
        model, optimizer, layers={"*": "fp8-dynamic"}, base="32-true", dirpath=tmp_path
    )
    for step in range(3):
        if step == 2:
            loop.precision_map.set("0", "fp8-rowwise")
        loop.step(lambda x: model(x).square().mean(), torch.randn(8, 16))
    loop.close()
    said = [
        (event.step, event.numbers["compile_seconds"] > 0, event.reason.split(" waited")[0])
        for event in read_events(tmp_path, kinds=["note"])
        if "compile_seconds" in event.numbers
    ]
    assert said == [(0, True, "the first step"), (2, True, "the first step in the new formats")]
