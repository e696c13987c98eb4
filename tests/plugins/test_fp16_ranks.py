"""An overflow on one of two ranks: both leave the step out, both scales fall, both fall back."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.two_ranks import run_on_two_ranks


def test_an_overflow_on_one_rank_is_all_ranks(tmp_path: Path) -> None:
    run_on_two_ranks("tests.plugins.fp16_ranks", tmp_path)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    for strategy in ("ddp", "fsdp2"):
        assert one[strategy] == other[strategy]
        seen = one[strategy]
        assert (seen["made"], seen["skipped"], seen["scale"]) == (3, 1, 2.0**9)
        assert list(seen["named"]) == [2]
        assert seen["dtypes"] == {torch.float32}
    fallback = one["fallback"]
    assert fallback == other["fallback"]
    assert fallback["formats"][0] == {"fp16"}
    assert fallback["formats"][-1] == {"bf16"}
    assert fallback["phase"] == "probation"
