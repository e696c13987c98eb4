"""Ranks with layers of their own agree on scales by name; what judges all layers is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.loop.own_layers_ranks import LATE, SHARED, blocks_of, without_pipeline
from tests.two_ranks import run_on_two_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("own")
    run_on_two_ranks("tests.loop.own_layers_ranks", directory)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_layers_of_one_name_share_scales_and_others_do_not(ranks: list[dict[str, Any]]) -> None:
    one, other = (told["by name"] for told in ranks)
    for step, (mine, yours) in enumerate(zip(one["amax"], other["amax"], strict=True)):
        assert torch.equal(mine[SHARED], yours[SHARED])
        assert mine[SHARED][0] == max(one["own"][step], other["own"][step])
        assert one["own"][step] != other["own"][step]
    late = [] if LATE not in one["amax"][0] else [LATE]
    assert not late
    assert set(one["amax"][-1]) == {*(f"blocks.{i}" for i in blocks_of(0)), SHARED}
    assert all(amax.min() > 0 for amax in one["amax"][-1].values())


def test_a_write_reaches_the_rank_that_has_the_layer(ranks: list[dict[str, Any]]) -> None:
    one, other = (told["by name"] for told in ranks)
    assert LATE not in one["formats"][-1]
    assert [formats[LATE] for formats in other["formats"]] == (
        ["fp8-delayed"] * 2 + ["fp8-dynamic"] * 2
    )
    assert LATE not in other["amax"][-1]


def test_a_step_that_one_rank_leaves_out_is_left_out_by_all(ranks: list[dict[str, Any]]) -> None:
    assert [told["left out"]["moved"] for told in ranks] == [False, False]


def test_a_rank_without_delayed_layers_meets_the_others(ranks: list[dict[str, Any]]) -> None:
    one, other = (told["none here"]["amax"] for told in ranks)
    assert one == {}
    assert set(other) == {*(f"blocks.{i}" for i in blocks_of(1)), SHARED}


def test_what_cannot_be_is_refused_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank, told in enumerate(ranks):
        other = "blocks.2-4" if rank == 0 else "blocks.0-1"
        assert f"here not: {other}" in told["refused"]["fallback"]
        assert "PrecisionLoop(fallback=False, monitor=False)" in told["refused"]["fallback"]
        assert 'scaling must not be "auto"' in told["refused"]["auto"]
        assert "layer '0' must be the same on all ranks" in told["refused"]["sizes"]
        assert "32 x 32 and 64 x 32" in told["refused"]["sizes"]


def test_a_group_of_its_own_keeps_its_scales(ranks: list[dict[str, Any]]) -> None:
    one, other = (told["refused"]["amax"]["0"] for told in ranks)
    assert other[0] > 2 * one[0] > 0


@pytest.mark.compatibility(
    "wrappers",
    "pipeline parallelism (torch.distributed.pipelining)",
    "works with a note",
    "`convert` and `precision_map.meet()` in a loop of your own; nothing that watches",
)
def test_a_pipeline_trains_as_one_process_does(ranks: list[dict[str, Any]]) -> None:
    alone = without_pipeline()
    assert ranks[1]["pipeline"]["losses"] == alone["losses"]
    weights = {**ranks[0]["pipeline"]["weights"], **ranks[1]["pipeline"]["weights"]}
    assert weights.keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        assert torch.equal(weight, weights[name]), name
