"""Under a Trainer too ranks hear of each other's layers at setup, and agree on scales by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.loop.own_layers_ranks import SHARED, blocks_of
from tests.plugins.own_layers_ranks import BAD, STEPS
from tests.two_ranks import run_on_two_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("own")
    run_on_two_ranks("tests.plugins.own_layers_ranks", directory)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_layers_of_one_name_share_scales(ranks: list[dict[str, Any]]) -> None:
    one, other = (told["amax"] for told in ranks)
    shared = f"part.{SHARED}"
    assert [told["said"] for told in ranks] == ["", ""]
    assert set(one) == {*(f"part.blocks.{i}" for i in blocks_of(0)), shared}
    assert set(other) == {*(f"part.blocks.{i}" for i in blocks_of(1)), shared}
    assert torch.equal(one[shared], other[shared])
    assert one[shared].min() > 0


def test_what_judges_all_layers_is_refused_at_setup(ranks: list[dict[str, Any]]) -> None:
    for rank, told in enumerate(ranks):
        others = "part.blocks.2-4" if rank == 0 else "part.blocks.0-1"
        assert f"here not: {others}" in told["watched"]
        assert "take ClampMonitor and PrecisionFallback out of callbacks=" in told["watched"]


def test_layers_of_one_name_and_several_sizes_are_refused(ranks: list[dict[str, Any]]) -> None:
    for told in ranks:
        assert "layer 'part.0' must be the same on all ranks" in told["sizes"]


def test_a_step_that_one_rank_leaves_out_is_left_out_by_all(ranks: list[dict[str, Any]]) -> None:
    """FP16's guard looks at each rank's own gradients."""
    moved = [index != BAD for index in range(STEPS)]
    assert [told["moved"] for told in ranks] == [moved, moved]
