"""A group of the ranks trains as one process does, and waits for none of the others."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.loop.group_ranks import STEPS, TRAIN, WORLD, one_thread, train
from tests.two_ranks import run_on_ranks


def test_what_a_group_measures_and_decides_is_its_own(tmp_path: Path) -> None:
    codes = run_on_ranks(WORLD, "tests.loop.group_ranks", tmp_path, timeout=100)
    assert codes == [0] * WORLD, (tmp_path / "log1").read_text()[-4000:]
    files = [tmp_path / f"rank{rank}.pt" for rank in range(WORLD)]
    idle, *trained = [torch.load(file, weights_only=True) for file in files]
    assert "group must be one that this process is in, got one without rank 0" in idle["refused"]
    with one_thread():
        alone = train(tmp_path / "alone")
    assert [told["writes"] for told in trained] == [True] + [False] * (len(TRAIN) - 1)
    assert [kind for _, kind, _ in trained[0]["told"]] == ["rehearsal"]
    assert len(alone["losses"]) == STEPS
    for told in trained:
        for what in ("losses", "evaluated", "formats", "parity"):
            assert told[what] == alone[what], what
        for name, weight in alone["weights"].items():
            assert torch.equal(weight, told["weights"][name]), name
