"""A fault on one of two ranks: both decide alike, at the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fp.records import read_events
from tests.callbacks.fallback.test_precision_fallback import LAYER
from tests.two_ranks import run_on_two_ranks

Told = list[dict[str, Any]]
"""What each rank has told of a run."""

SLOW = pytest.mark.slow
RUN = [
    "incident",
    pytest.param("sharded", marks=SLOW),
    pytest.param("tensor parallel", marks=SLOW),
    pytest.param("two dimensions", marks=SLOW),
    pytest.param("limit", marks=SLOW),
    "skip",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def told(request: pytest.FixtureRequest, base: Path) -> Told:
    """Of the run that a test names."""
    name, directory = request.param, base / request.param
    directory.mkdir()
    run_on_two_ranks("tests.callbacks.fallback.fallback_ranks", directory, [name])
    ranks = [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return [{**rank[name], "records": directory / name} for rank in ranks]


def of(*names: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("told", names, indirect=True)


@of(*RUN)
def test_both_ranks_end_alike(told: Told) -> None:
    one, other = told
    for what in ("formats", "changes", "steps", "phase", "optimizer_steps"):
        assert one[what] == other[what], what
    assert all(torch.equal(one["weights"][n], other["weights"][n]) for n in one["weights"])


@of(
    "incident",
    pytest.param("sharded", marks=SLOW),
    pytest.param("tensor parallel", marks=SLOW),
    pytest.param("two dimensions", marks=SLOW),
)
def test_an_incident_on_one_rank_demotes_on_both(told: Told) -> None:
    (demotion,) = read_events(told[0]["records"], kinds=["demote"])
    assert demotion.step == 60
    assert demotion.layers == (LAYER,)
    assert [c[0] for c in told[1]["changes"]] == [LAYER]
    assert told[0]["phase"] == "probation"
    (rollback,) = read_events(told[0]["records"], kinds=["rollback"])
    assert rollback.replayed == 60 - rollback.to_step


@of(pytest.param("limit", marks=SLOW))
def test_a_layer_over_its_limit_on_one_rank_climbs_on_both(told: Told) -> None:
    (climb,) = read_events(told[0]["records"], kinds=["limit"])
    assert climb.layers == (LAYER,)
    assert told[1]["formats"][LAYER] == "fp8-dynamic"


@of("skip")
def test_a_bad_gradient_on_one_rank_skips_on_both(told: Told) -> None:
    (skip,) = read_events(told[0]["records"], kinds=["skip"])
    assert skip.step == 30
    assert set(told[0]["optimizer_steps"]) == {33.0}
