"""DDP, FSDP2, HSDP, tensor and sequence parallelism: alike on all ranks, and as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.loop.strategy_ranks import (
    FAULT,
    FAULTY,
    FLIPPED,
    LONG,
    SAVED,
    STRATEGIES,
    Run,
    alone,
)
from tests.two_ranks import run_on_ranks

GATHERED = ("fsdp2", "hsdp")
"""Whose weights are sharded over both ranks, and gathered in FP8."""

PARTS = ("tensor parallel", "sequence parallel", "two dimensions")
"""Whose sums are made in parts."""


Runs = dict[str, tuple[str, Run]]
Told = tuple[str, list[dict[str, Any]]]
"""A strategy, and of each rank its runs by their number of blocks."""


def ranks(directory: Path, world: int, runs: Runs) -> list[dict[str, Any]]:
    """What each rank tells of each run."""
    codes = run_on_ranks(world, "tests.loop.strategy_ranks", directory, runs, timeout=600)
    assert codes == [0] * world, (directory / "log0").read_text()[-4000:]
    files = [directory / f"rank{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Of each rank, of the strategy that a test names."""
    strategy: str = request.param
    runs = {str(blocks): (strategy, Run(blocks=blocks)) for blocks in (1, 3)}
    return strategy, ranks(tmp_path_factory.mktemp("two"), 2, runs)


SLOW = pytest.mark.slow
of_each = pytest.mark.parametrize(
    "two",
    [
        "fsdp2",
        "two dimensions",
        *(
            pytest.param(name, marks=SLOW)
            for name in ("ddp", "hsdp", "tensor parallel", "sequence parallel")
        ),
    ],
    indirect=True,
)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return alone(Run(), tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("blocks", [1, 3])
@of_each
def test_a_step_adds_one_collective_for_scales_and_one_for_signals(two: Told, blocks: int) -> None:
    """Whatever the number of layers; the first step asks once whether all have the same layers.

    Weights that are gathered in FP8 need one more, for their amaxes.
    """
    for told in two[1]:
        run = told[str(blocks)]
        amaxes = two[0] in GATHERED
        assert run["collectives"][1] == run["plain"][1] + 2 + amaxes


@of_each
def test_tables_are_the_same_on_all_ranks_at_every_step(two: Told) -> None:
    assert_alike([told["3"] for told in two[1]])


def assert_alike(runs: list[dict[str, Any]]) -> None:
    one, *others = runs
    for other in others:
        for mine, yours in zip(one["tables"], other["tables"], strict=True):
            assert mine["formats"] == yours["formats"]
            assert mine["statistics"] == yours["statistics"]
            assert torch.equal(mine["amax"], yours["amax"])
            assert torch.equal(mine["scales"], yours["scales"])
        assert one["phase"] == other["phase"]
        for name, weight in one["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name
    assert any(table["statistics"] for table in one["tables"])


@of_each
def test_it_trains_as_one_process_does(two: Told, once: dict[str, Any]) -> None:
    strategy, told = two
    assert_as_alone(told[0]["1"], once, strategy)


def assert_as_alone(run: dict[str, Any], once: dict[str, Any], strategy: str) -> None:
    """Equal bits where all ranks have the whole batch; else sums are made in another order.

    So is the norm of gradients that are sharded, and these runs are not clipped."""
    assert [t["formats"] for t in run["tables"]] == [t["formats"] for t in once["tables"]]
    if strategy in PARTS:
        assert run["losses"] == pytest.approx(once["losses"], rel=1e-3)
        assert run["evaluated"] == pytest.approx(once["evaluated"], rel=1e-3)
        return
    assert run["losses"] == once["losses"]
    assert run["evaluated"] == once["evaluated"]
    for name, weight in once["weights"].items():
        assert torch.equal(weight, run["weights"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["fp8-delayed", "fp8-dynamic"])
@pytest.mark.parametrize(
    ("world", "strategy"),
    [(2, name) for name in STRATEGIES] + [(4, "hsdp"), (4, "two dimensions")],
)
def test_what_one_rank_finds_all_ranks_carry_out(
    world: int, strategy: str, scaling: str, tmp_path: Path
) -> None:
    """Formats rolled out, flipped and demoted, and a checkpoint after which all goes on alike."""
    run = Run(scaling=scaling, steps=LONG, long=True)
    runs = [told["run"] for told in ranks(tmp_path, world, {"run": (strategy, run)})]
    assert_alike(runs)
    demoted = [step for step, kind, _ in runs[0]["told"] if kind == "demote"]
    assert demoted
    assert demoted[0] >= FAULT
    formats = [table["formats"] for table in runs[0]["tables"]]
    assert formats[0][FAULTY] == "fp32"
    assert formats[SAVED - 1][FAULTY] == scaling
    assert formats[SAVED][FLIPPED] == "fp8-rowwise"
    assert formats[-1][FAULTY] == "fp32"
    for told in runs:
        assert repr(told["resumed"]) == repr(told["losses"][SAVED:])  # those at the fault are NaN
