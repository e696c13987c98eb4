"""What the compiler takes is said where a run waits for it: at its start, and after a demotion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fp import DivergenceDetector
from lightning_fp.loop import PrecisionLoop
from lightning_fp.records import read_events
from lightning_fp.stability.supervise.compile_clock import CompileClock
from tests import forked


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


@pytest.mark.slow
def test_a_demotion_says_what_the_next_step_waits_for(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    faulty: Any = model[0]
    faulty.compile(backend="eager")
    loop = PrecisionLoop(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        layers={"*": "fp8-dynamic"},
        base="32-true",
        fallback={"detector": DivergenceDetector(armed=16), "snapshot_every_n_steps": 4},
        dirpath=tmp_path,
    )

    def spoil(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        low = model.training and not faulty.format.is_high_precision
        return output * torch.nan if low and loop.global_step >= 20 else output

    model[1].register_forward_hook(spoil)
    for _ in range(24):
        loop.step(lambda x: model(x).square().mean(), torch.randn(8, 16))
    loop.close()
    demoted = read_events(tmp_path, kinds=["demote"])
    assert [event.layers for event in demoted] == [("0",)]
    assert "the next step waits for the compiler, which last took" in demoted[0].sentence()
    (first, after) = (
        event
        for event in read_events(tmp_path, kinds=["note"])
        if "compile_seconds" in event.numbers
    )
    assert f"{first.numbers['compile_seconds']:.1f} s" in demoted[0].action
    assert after.step == demoted[0].step


@pytest.mark.slow
def test_a_resumed_run_takes_from_torchs_cache_what_was_compiled(tmp_path: Path) -> None:
    """The generated code; graphs before it are traced anew, as autograd functions are in them."""

    def run() -> dict[str, Any]:
        """In a process of its own."""
        log, cache = tmp_path / "log", str(tmp_path / "cache")
        rank = forked.start(
            "tests.stability.supervise.compiled_run",
            tmp_path,
            log=log,
            environment={"TORCHINDUCTOR_CACHE_DIR": cache},
        )
        rank.join(600)
        assert rank.exitcode == 0, log.read_text()[-4000:]
        return torch.load(tmp_path / "found.pt", weights_only=True)

    first, resumed = run(), run()
    compiled = first["counters"]["fxgraph_cache_miss"]
    assert compiled > 0
    assert resumed["counters"]["fxgraph_cache_hit"] == compiled
    assert "fxgraph_cache_miss" not in resumed["counters"]
    assert resumed["waited"] == [0, 2]  # steps at which a process said what it waited for
