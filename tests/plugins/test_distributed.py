"""Flips under DDP and FSDP2, on two real gloo ranks."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.plugins.ranks import SCENARIOS, WALK, read_ranks
from tests.two_ranks import run_on_two_ranks

TIMEOUT = 270
"""Seconds for all scenarios, below the limit of a test."""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not dist.is_available() or not dist.is_gloo_available(),
    reason="needs gloo on Linux",
)


SLOW = [name for name in SCENARIOS if name.endswith("whole")]
"""The whole model is compiled anew for each set of formats; in `make proof`."""


def scenarios(*names: str) -> list[Any]:
    """As parameters."""
    marks = {name: pytest.mark.slow if name in SLOW else () for name in names}
    return [pytest.param(name, marks=marks[name]) for name in names]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_once(tmp_path_factory, "ranks", [n for n in SCENARIOS if n not in SLOW])


@pytest.fixture(scope="module")
def slow_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_once(tmp_path_factory, "slow_ranks", SLOW)


def run_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, scenarios: list[str]
) -> list[dict[str, Any]]:
    """Both ranks' results of scenarios, run once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    finished = directory / "finished"
    try:
        directory.mkdir()
    except FileExistsError:  # the other worker runs them
        deadline = time.monotonic() + TIMEOUT
        while not finished.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        return read_ranks(directory)
    try:
        run_on_two_ranks("tests.plugins.ranks", directory, scenarios, timeout=TIMEOUT)
    finally:
        finished.touch()
    return read_ranks(directory)


def results(request: pytest.FixtureRequest, name: str) -> list[dict[str, Any]]:
    """Both ranks' results of one scenario; fails with a rank's traceback if it raised."""
    fixture = "slow_ranks" if name in SLOW else "ranks"
    both = [rank[name] for rank in request.getfixturevalue(fixture)]
    for rank, result in enumerate(both):
        assert "error" not in result, f"rank {rank}: {result['error']}"
    return both


@pytest.mark.compatibility("wrappers", "DDP", "works")
@pytest.mark.parametrize("name", scenarios(*SCENARIOS))
def test_flips_keep_the_layers_and_the_ranks_agree(
    request: pytest.FixtureRequest, name: str
) -> None:
    one, other = results(request, name)
    assert one["same"], "Parameters or optimizer state were exchanged"
    assert other["same"], "Parameters or optimizer state were exchanged"
    assert one["formats"] == other["formats"]
    assert len(one["weights"]) == len(other["weights"])
    for a, b in zip(one["weights"], other["weights"], strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
    assert one["losses"] != other["losses"], "every rank has its own data"
    assert one["losses"][-1] < one["losses"][0]


@pytest.mark.parametrize("name", ["ddp", "fsdp2 convert after"])
def test_the_flips_happened(request: pytest.FixtureRequest, name: str) -> None:
    for result in results(request, name):
        assert [formats["blocks.1.up"] for formats in result["formats"]] == list(WALK)


@pytest.mark.compatibility("wrappers", "torch.compile of blocks", "works")
@pytest.mark.parametrize(
    "name", scenarios("ddp regional", "ddp whole", "fsdp2 regional", "fsdp2 whole")
)
def test_compiled_is_eager(request: pytest.FixtureRequest, name: str) -> None:
    eager = "ddp" if name.startswith("ddp") else "fsdp2 convert after"
    for one, other in zip(results(request, eager), results(request, name), strict=True):
        steps = len(other["losses"])
        assert one["formats"][:steps] == other["formats"]
        assert other["losses"] == pytest.approx(one["losses"][:steps], rel=1e-3)


@pytest.mark.compatibility("wrappers", "FSDP2 (`ModelParallelStrategy`)", "works")
def test_fsdp2_trains_as_ddp_does(request: pytest.FixtureRequest) -> None:
    for one, other in zip(
        results(request, "ddp"), results(request, "fsdp2 convert after"), strict=True
    ):
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-3)


@pytest.mark.parametrize("policy", ["convert", "bf16"])
def test_converting_before_or_after_sharding_is_the_same(
    request: pytest.FixtureRequest, policy: str
) -> None:
    before, after = (results(request, f"fsdp2 {policy} {when}") for when in ("before", "after"))
    for one, other in zip(before, after, strict=True):
        assert one["losses"] == other["losses"]
        for a, b in zip(one["weights"], other["weights"], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name", scenarios(*(n for n in SCENARIOS if "fsdp2" in n and "trainer" not in n))
)
def test_sharded_linears_convert_and_revert(request: pytest.FixtureRequest, name: str) -> None:
    for result in results(request, name):
        for what in ("converted", "reverted", "keys", "sharded"):
            assert result[what], what


@pytest.mark.parametrize("name", ["fsdp2 trainer", "fsdp2 trainer inside"])
def test_a_sharded_run_resumes_bit_for_bit(request: pytest.FixtureRequest, name: str) -> None:
    for result in results(request, name):
        assert result["sharded"]
        assert result["resumed"], "the losses differ"
        assert result["resumed formats"] == result["formats"][0]
        for a, b in zip(result["weights"], result["resumed weights"], strict=True):
            assert torch.equal(a, b)


def test_the_trainer_ran_two_ranks(request: pytest.FixtureRequest) -> None:
    assert [result["world"] for result in results(request, "ddp trainer")] == [2, 2]
