"""A fault on one of two ranks: both decide alike, at the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fp.records import read_events
from tests.callbacks.fallback.test_precision_fallback import LAYER
from tests.two_ranks import run_on_two_ranks


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    run_on_two_ranks("tests.callbacks.fallback.fallback_ranks", directory)
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
