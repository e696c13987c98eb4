"""A plain loop on two ranks: DDP, FSDP2 and compiled blocks; both decide alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_fp.events import WatchFailed
from lightning_fp.records import read_events
from tests.two_ranks import run_on_two_ranks


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_ranks_decide_alike(compiled: bool, tmp_path: Path) -> None:
    run_on_two_ranks("tests.loop.loop_ranks", tmp_path, compiled, timeout=900 if compiled else 240)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for kind, one in first.items():
        other = second[kind]
        assert all(map(torch.equal, one["weights"], other["weights"])), kind
        assert all(bool(w.isfinite().all()) for w in one["weights"])
        assert one["formats"] == other["formats"]
        # Nobody asked for it, so no step meets for a mismatch.
        assert "mismatch must be True" in one["mismatch"]
        assert one["mismatch"] == other["mismatch"]
        assert one["formats"]["blocks.0.fc1"] == "fp8-dynamic"
        assert one["skipped"] == other["skipped"] == 1
        kinds = [kind for _, kind, _ in one["told"]]
        assert kinds.count("skip") == 1
        assert "demote" not in kinds
        assert "rehearsal" in kinds
        assert one["confined"] == "", "the rehearsal has not passed"


def test_a_watch_that_fails_on_one_rank_ends_on_both_and_nobody_waits(tmp_path: Path) -> None:
    run_on_two_ranks("tests.loop.failing_rank", tmp_path, timeout=100)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for part, one in first.items():
        other = second[part]
        assert one["failed"] is not None, part
        assert one["failed"] == other["failed"], part
        assert all(map(torch.equal, one["weights"], other["weights"])), part
        (failed,) = (e for e in read_events(tmp_path / part) if isinstance(e, WatchFailed))
        assert "on another rank" in failed.reason
