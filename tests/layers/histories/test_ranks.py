"""Scales are reduced layer by layer: ranks with other layers are told so, and none is mixed."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.two_ranks import run_on_two_ranks


def test_ranks_with_other_layers_are_refused_on_all(tmp_path: Path) -> None:
    run_on_two_ranks("tests.layers.histories.other_ranks", tmp_path)
    for rank in range(2):
        told = torch.load(tmp_path / f"rank{rank}.pt")
        assert told["same"] == ""
        for other in ("other", "fewer"):
            assert "must be the same on all ranks" in told[other]
            assert f"on rank {rank}" in told[other]
