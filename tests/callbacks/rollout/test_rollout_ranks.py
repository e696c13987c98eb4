"""Two ranks that see different data go through the stages at the same steps."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_fp.records import StageChange, read_events
from tests.two_ranks import run_on_two_ranks


def test_two_ranks_agree(tmp_path: Path) -> None:
    run_on_two_ranks("tests.callbacks.rollout.rollout_ranks", tmp_path)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert one == other
    assert len(one["formats"]) == 20
    changes = {e.step: e.stage for e in read_events(tmp_path) if isinstance(e, StageChange)}
    # The mean over ranks falls below 0.5 in step 6, and the one before is out of the window at 7.
    assert changes == {0: "logged", 7: "tokens", 10: "low", 13: "tokens"}
    assert (one["stage"], one["ended"]) == ("tokens", "stage 'low' was given up 1 times")
