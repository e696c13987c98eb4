"""On two ranks, DDP and FSDP2: in a loop of one's own the Trainer's verdicts at its steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.loop.faulty import INNOCENT, SHORT
from tests.two_ranks import run_on_two_ranks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", SHORT)
def test_verdicts_are_the_trainers(case: str, kind: str, tmp_path: Path) -> None:
    run_on_two_ranks("tests.loop.verdict_ranks", tmp_path, case, kind, timeout=600)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    told = first["trainer"]["told"]
    kinds = [kind for _, kind, _ in told]
    assert "rehearsal" in kinds
    assert "demote" not in kinds or case not in INNOCENT
    assert ("demote" in kinds) or case != "noise"
    for loop in ("plain", "fabric"):
        assert first[loop]["told"] == told
        assert first[loop]["formats"] == first["trainer"]["formats"]
        assert all(map(torch.equal, first[loop]["weights"], first["trainer"]["weights"]))
    for one, other in zip(first.values(), second.values(), strict=True):
        assert one["formats"] == other["formats"]
        assert all(map(torch.equal, one["weights"], other["weights"]))
        assert all(bool(weight.isfinite().all()) for weight in one["weights"])
