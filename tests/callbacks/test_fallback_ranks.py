"""A fault on one of two ranks: both decide alike, at the same step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fp.records import read_events
from tests.callbacks.test_precision_fallback import LAYER

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",  # Lightning asks for one, nobody listens on it
            "TORCHELASTIC_RUN_ID": "tests",  # so that Lightning starts no processes of its own
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        if Path("/sys/class/net/lo").exists():
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        with (directory / f"log{rank}").open("w") as log:
            command = [sys.executable, "-m", "tests.callbacks.fallback_ranks", str(directory)]
            processes.append(
                subprocess.Popen(
                    command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:
        for process in processes:
            process.wait(240)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, (directory / f"log{rank}").read_text()[-4000:]
    return directory


@pytest.fixture(scope="module")
def told(directory: Path) -> list[dict[str, dict[str, Any]]]:
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("run", ["incident", "sharded", "limit", "skip"])
def test_both_ranks_end_alike(run: str, told: list[dict[str, dict[str, Any]]]) -> None:
    one, other = told[0][run], told[1][run]
    for what in ("formats", "changes", "steps", "phase", "optimizer_steps"):
        assert one[what] == other[what], what
    assert all(torch.equal(one["weights"][n], other["weights"][n]) for n in one["weights"])


@pytest.mark.parametrize("run", ["incident", "sharded"])
def test_an_incident_on_one_rank_demotes_on_both(
    run: str, directory: Path, told: list[dict[str, dict[str, Any]]]
) -> None:
    (demotion,) = read_events(directory / run, kinds=["demote"])
    assert demotion.step == 60
    assert demotion.layers == (LAYER,)
    assert [c[0] for c in told[1][run]["changes"]] == [LAYER]
    assert told[0][run]["phase"] == "probation"
    (rollback,) = read_events(directory / run, kinds=["rollback"])
    assert rollback.replayed == 60 - rollback.to_step


def test_a_layer_over_its_limit_on_one_rank_climbs_on_both(
    directory: Path, told: list[dict[str, dict[str, Any]]]
) -> None:
    (climb,) = read_events(directory / "limit", kinds=["limit"])
    assert climb.layers == (LAYER,)
    assert told[1]["limit"]["formats"][LAYER] == "fp8-dynamic"


def test_a_bad_gradient_on_one_rank_skips_on_both(
    directory: Path, told: list[dict[str, dict[str, Any]]]
) -> None:
    (skip,) = read_events(directory / "skip", kinds=["skip"])
    assert skip.step == 30
    assert set(told[0]["skip"]["optimizer_steps"]) == {33.0}
