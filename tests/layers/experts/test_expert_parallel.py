"""Expert parallelism: each rank multiplies its own experts, as one process multiplies all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.two_ranks import run_on_two_ranks

FORMATS = ["fp8-rowwise", "fp8-dynamic", "e8m3"]


@pytest.mark.slow
def test_experts_on_two_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    run_on_two_ranks("tests.layers.experts.expert_parallel_ranks", tmp_path, FORMATS)
    for rank in range(2):
        told = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for format in FORMATS:
            found = told[format]
            for name in ("output", "w1", "w2", "w3"):
                assert torch.equal(found[name], found[f"{name} of one process"]), (format, name)
            assert found["output"].any()
            assert not found["w1"][1].any()  # no token anywhere
