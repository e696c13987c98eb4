"""An all-gather in FP8 changes how much is sent, and no bit of what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.layers.fsdp.gather_ranks import SAMPLED, STEPS, Case
from tests.two_ranks import run_on_ranks

CASES = {
    "dynamic": Case(),
    "delayed": Case(format="fp8-delayed"),
    "flips of delayed": Case(meanwhile="flips", format="fp8-delayed", micro_batches=2),
    "evaluation while gathered": Case(
        meanwhile="evaluation", micro_batches=2, stays=True, reshard=False
    ),
    "checkpointing": Case(recompute=True),
    "uneven": Case(hidden=81),
    "sampled": Case(meanwhile="sampled"),
    "written by one rank": Case(meanwhile="written by one rank", format="fp8-delayed"),
    "accumulation": Case(micro_batches=3, format="fp8-delayed"),
    "written in between by one rank": Case(
        meanwhile="written in between by one rank", micro_batches=2
    ),
    "frozen": Case(frozen=True),
}
MORE = {
    "float32": Case(dtype=None),
    "flips": Case(meanwhile="flips"),
    "evaluation": Case(meanwhile="evaluation", micro_batches=2),
    "written in between": Case(meanwhile="written in between", micro_batches=2),
    "frozen, delayed": Case(frozen=True, format="fp8-delayed"),
    "clipped in between": Case(meanwhile="clipped in between", micro_batches=2),
    "loaded in between": Case(meanwhile="loaded in between", micro_batches=3),
    "turned in between": Case(meanwhile="turned in between", micro_batches=2),
    "fused": Case(optimizer="fused", micro_batches=2),
    "foreach": Case(optimizer="foreach"),
    "an optimizer that writes .data": Case(optimizer="data", micro_batches=2),
    "not resharded": Case(reshard=False, micro_batches=2, stays=True),
    "replay": Case(meanwhile="replay", format="fp8-delayed"),
    "written": Case(meanwhile="written"),
    "forward alone": Case(meanwhile="forward alone", reshard=False),
    "not finite": Case(meanwhile="not finite"),
    "compiled": Case(meanwhile="compiled"),
    "offloaded": Case(offload=True),
    "large weights": Case(scale=100.0, format="fp8-delayed"),
}

OVER_FOUR = {
    "hsdp": Case(mesh="hsdp", format="fp8-delayed"),
    "two dimensions": Case(mesh="two dimensions"),
}
WEIGHTS = 6
"""Of three blocks; the head's is too small to be counted."""


def on_ranks(directory: Path, world: int, cases: dict[str, Case]) -> list[dict[str, Any]]:
    codes = run_on_ranks(world, "tests.layers.fsdp.gather_ranks", directory, cases, timeout=500)
    assert codes == [0] * world, (directory / "log0").read_text()[-4000:]
    files = [directory / f"rank{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(tmp_path_factory.mktemp("ranks"), 2, CASES)


@pytest.mark.slow
def test_more_losses_are_equal_bit_for_bit(tmp_path: Path) -> None:
    for rank in on_ranks(tmp_path, 2, MORE):
        assert rank["compiled"]["auto"]["graphs"] > 0
        for name in MORE:
            assert_equal(rank[name]["auto"], rank[name]["high"])


@pytest.mark.parametrize("name", CASES)
def test_losses_are_equal_bit_for_bit(told: list[dict[str, Any]], name: str) -> None:
    for rank in told:
        assert_equal(rank[name]["auto"], rank[name]["high"])


def assert_equal(low: dict[str, Any], high: dict[str, Any]) -> None:
    assert repr(low["losses"]) == repr(high["losses"])
    assert repr(low["evaluated"]) == repr(high["evaluated"])
    for one, other in zip(low["amax"], high["amax"], strict=True):
        assert torch.equal(one, other)
    for weight, other in zip(low["weights"].values(), high["weights"].values(), strict=True):
        assert torch.equal(weight.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("name", ["dynamic", "delayed", "checkpointing", "uneven", "accumulation"])
def test_half_the_bytes_and_one_cast_of_each_weight(told: list[dict[str, Any]], name: str) -> None:
    """The first step is gathered as it is: FSDP2 knows its own dtypes only afterwards."""
    forwards = CASES[name].micro_batches
    for rank in told:
        low, high = rank[name]["auto"], rank[name]["high"]
        if forwards == 1:
            assert low["bytes"][0] == high["bytes"][0]
        for step in range(1, STEPS):
            assert low["bytes"][step] <= 0.55 * high["bytes"][step]
            assert low["casts"][step] == WEIGHTS
            assert low["reductions"][step] == high["reductions"][step] + forwards


def test_a_shard_is_cast_again_after_it_was_written_to(told: list[dict[str, Any]]) -> None:
    """That of one layer, on all ranks; one that is never written to is not cast any more."""
    frozen = 2
    once = [WEIGHTS] + [WEIGHTS - frozen] * (STEPS - 2)
    for rank in told:
        written = rank["written in between by one rank"]["auto"]["casts"]
        assert written[1:] == [WEIGHTS + 1] * (STEPS - 1)
        assert rank["frozen"]["auto"]["casts"][1:] == once


def test_sampled_steps_are_gathered_as_they_are(told: list[dict[str, Any]]) -> None:
    for rank in told:
        low, high = rank["sampled"]["auto"]["bytes"], rank["sampled"]["high"]["bytes"]
        assert [one == other for one, other in zip(low, high, strict=True)] == [
            step == 0 or step in SAMPLED for step in range(STEPS)
        ]


def test_it_is_off_where_torch_or_the_user_has_it_otherwise(told: list[dict[str, Any]]) -> None:
    """Without a private field of torch's the log says so; a user's own all-gather stays."""
    for rank in told:
        (line,) = rank["off"]["another torch"]["lines"]
        assert "FSDP2 gathers all weights as they are: torch" in line
        assert "mp_policy" in line
        assert rank["off"]["own all-gather"]["bytes"] == rank["dynamic"]["high"]["bytes"][-1]
        assert rank["off"][""]["bytes"] == rank["dynamic"]["auto"]["bytes"][-1]


@pytest.mark.slow
def test_copies_and_tensor_parallelism_over_four_ranks(tmp_path: Path) -> None:
    for rank in on_ranks(tmp_path, 4, OVER_FOUR):
        for name in OVER_FOUR:
            low, high = rank[name]["auto"], rank[name]["high"]
            assert_equal(low, high)
            assert low["bytes"][-1] <= 0.55 * high["bytes"][-1]
