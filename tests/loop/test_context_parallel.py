"""Context parallelism splits attention alone: to a linear layer a part of a text is a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_fp.events import Rehearsed
from lightning_fp.records import read_events
from tests.loop.context_parallel_ranks import train
from tests.two_ranks import run_on_two_ranks


@pytest.mark.compatibility(
    "wrappers",
    "context parallelism",
    "works with a note",
    "shown with keys and values gathered by hand; torch's own ring has no attention for CPUs",
)
def test_ranks_with_a_part_of_each_text_train_as_one_process(tmp_path: Path) -> None:
    """Their amaxes together are those of the whole text, and so are delayed scales."""
    run_on_two_ranks("tests.loop.context_parallel_ranks", tmp_path)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name
    alone = train(tmp_path / "alone")
    assert one["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    forward = slice(0, 2)  # a gradient is of the mean over a rank's part, so as many times larger
    assert torch.allclose(one["amax"][:, forward], alone["amax"][:, forward], rtol=1e-2)
    (rehearsal,) = read_events(tmp_path / "run", kinds=["rehearsal"])
    assert isinstance(rehearsal, Rehearsed)
    assert rehearsal.outcome == "passed"
    assert not read_events(tmp_path / "run", kinds=["watch_failed"])
