"""Trainer runs under FSDP2 gathered in FP8: how much is sent, and that no bit is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.layers.fsdp.trainer_ranks import BLOCKS, FLIP, Run
from tests.two_ranks import run_on_two_ranks


def on_ranks(directory: Path, runs: dict[str, Run]) -> list[dict[str, Any]]:
    run_on_two_ranks("tests.layers.fsdp.trainer_ranks", directory, runs, timeout=500)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def assert_equal(low: dict[str, Any], high: dict[str, Any]) -> None:
    for what in ("losses", "evaluated", "formats", "changes", "told"):
        assert repr(low[what]) == repr(high[what]), what
    for name, weight in low["weights"].items():
        assert torch.equal(weight, high["weights"][name]), name


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    runs = {name: Run(scaling=name) for name in ("fp8-dynamic", "fp8-delayed")}
    return on_ranks(tmp_path_factory.mktemp("ranks"), runs)


@pytest.mark.parametrize("scaling", ["fp8-dynamic", "fp8-delayed"])
def test_at_most_0_55_of_the_bytes_and_one_cast_of_each_weight(
    told: list[dict[str, Any]], scaling: str
) -> None:
    """From the second step on; a block that is set to bf16 is gathered in bf16 from then on."""
    for rank in told:
        low, high = rank[scaling]["auto"], rank[scaling]["high"]
        assert_equal(low, high)
        assert low["bytes"][0] == high["bytes"][0]
        for step in range(1, FLIP):
            assert low["bytes"][step] <= 0.55 * high["bytes"][step]
            assert low["casts"][step] == 4 * BLOCKS + 1
        for step in range(FLIP, len(low["bytes"])):
            assert low["bytes"][FLIP - 1] < low["bytes"][step] < high["bytes"][step]
            assert low["casts"][step] == 4 * (BLOCKS - 1) + 1


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["fp8-dynamic", "fp8-delayed"])
def test_rehearsal_replays_and_rollback_are_the_same_bit_for_bit(
    scaling: str, tmp_path: Path
) -> None:
    runs = {"run": Run(scaling=scaling, incident=True)}
    for rank in on_ranks(tmp_path, runs):
        assert_equal(rank["run"]["auto"], rank["run"]["high"])
        assert min(rank["run"]["auto"]["bytes"]) < min(rank["run"]["high"]["bytes"])
    assert any(after == "fp32" for _, after, _ in rank["run"]["auto"]["changes"])
