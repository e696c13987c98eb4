"""Whole runs under tensor parallelism: ranks are alike, and as one process is; resumed ones too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fp.records import read_events
from tests.plugins.tensor_parallel_ranks import HALF, train
from tests.two_ranks import run_on_two_ranks

SLOW = pytest.mark.slow
RUNS = ["fp8-delayed", pytest.param("fp8-dynamic", marks=SLOW)]
TWO_DIMENSIONS = pytest.param("fp8-delayed sharded", marks=SLOW)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensor-parallel")


@pytest.fixture(scope="module")
def told(request: pytest.FixtureRequest, base: Path) -> list[dict[str, Any]]:
    """Of each rank, of the run that a test names and the same resumed."""
    name, directory = request.param, base / request.param
    directory.mkdir()
    run_on_two_ranks("tests.plugins.tensor_parallel_ranks", directory, [name])
    ranks = [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return [{"run": r[name], "resumed": r[f"{name} resumed"], "at": directory} for r in ranks]


def of(*names: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("told", names, indirect=True)


def assert_same(one: dict[str, Any], other: dict[str, Any], *, losses: int = 0) -> None:
    """Bit for bit; of the first run its last losses, where the other begins later."""
    assert one["losses"][losses:] == other["losses"]
    assert one["formats"] == other["formats"]
    assert torch.equal(one["scales"], other["scales"])
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name


@pytest.mark.compatibility("wrappers", "tensor parallelism (`parallelize_module`)", "works")
@of(*RUNS, TWO_DIMENSIONS)
def test_ranks_are_alike_and_nothing_fails(told: list[dict[str, Any]]) -> None:
    assert_same(told[0]["run"], told[1]["run"])
    assert told[0]["run"]["failed_at"] is None
    assert told[0]["run"]["phase"] == "warmup"
    assert told[0]["run"]["formats"]["model.blocks.1.fc1"] == "fp8-rowwise"
    first, resumed = sorted(path for path in told[0]["at"].iterdir() if path.is_dir())
    (rehearsal,) = read_events(first, kinds=["rehearsal"])
    assert rehearsal.outcome == "passed"
    assert not read_events(first, kinds=["watch_failed"])
    assert not read_events(resumed, kinds=["watch_failed"])


@of(*RUNS, TWO_DIMENSIONS)
def test_a_resumed_run_goes_on_bit_for_bit(told: list[dict[str, Any]]) -> None:
    for rank in told:
        assert_same(rank["run"], rank["resumed"], losses=HALF)
        assert rank["resumed"]["val_losses"] == rank["run"]["val_losses"][-2:]


@of(*RUNS)
def test_it_trains_as_one_process_does(told: list[dict[str, Any]], tmp_path: Path) -> None:
    """Not bit for bit: sums are made in parts, and a shard's scale is its own under `dynamic`."""
    alone = train(tmp_path, told[0]["at"].name, parallel=False)
    for what in ("losses", "val_losses"):
        assert told[0]["run"][what] == pytest.approx(alone[what], rel=5e-3)
