"""How many collectives each kind of step of a watched run adds to the strategy's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.plugins.collective_ranks import REHEARSED, SNAPSHOT_EVERY
from tests.two_ranks import run_on_two_ranks

SCALES, SIGNALS, STATISTICS, LOG = 1, 1, 2, 5
"""What `lightning_fp.telemetry.rank_costs` says of steps, of sampled ones, and of log intervals."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[list[int]]]]:
    directory: Path = tmp_path_factory.mktemp("collectives")
    run_on_two_ranks("tests.plugins.collective_ranks", directory)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("run", ["in_a_loop", "in_a_trainer"])
def test_each_kind_of_step(ranks: list[dict[str, list[list[int]]]], run: str) -> None:
    """A snapshot adds none. The rehearsal is once; who begins and ends a run meets then too."""
    for told in ranks:
        plain, watched = told[run]
        added = [many - few for few, many in zip(plain, watched, strict=True)]
        usual = added[REHEARSED:-1]
        kinds = [SCALES + SIGNALS, SCALES + SIGNALS + STATISTICS, SCALES + SIGNALS + LOG]
        assert sorted(set(usual)) == kinds
        assert [usual.count(kind) for kind in kinds] == [len(usual) - 4, 3, 1]
        assert added[SNAPSHOT_EVERY] == added[2 * SNAPSHOT_EVERY] == SCALES + SIGNALS
