"""Two ranks have the signals that one rank has of the same micro-batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fp.records import read_stability
from lightning_fp.telemetry.stability.signals import NAMES
from tests.callbacks.stability.stability_ranks import STEPS, train
from tests.two_ranks import run_on_two_ranks


def columns(directory: Path) -> dict[str, list[Any]]:
    table = read_stability(directory).to_pydict()
    return {name: [math.nan if x is None else x for x in table[name]] for name in table}


@pytest.mark.slow
def test_ranks_combine_as_micro_batches_do(tmp_path: Path) -> None:
    """Means of what is there, and the largest: also where one rank alone has a number."""
    run_on_two_ranks("tests.callbacks.stability.stability_ranks", tmp_path)
    two = columns(tmp_path / "two")
    train(tmp_path / "one", 1)
    one = columns(tmp_path / "one")
    assert two["step"] == one["step"] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr", *NAMES):
        # gradients are summed in another order
        assert two[name] == pytest.approx(one[name], rel=1e-3, nan_ok=True), name
    # The odd micro-batch is seen: a maximum is its own, a mean is of the other one alone.
    assert two["output_logit_max"][4] > 2 * two["output_logit_max"][3]
    assert not math.isnan(two["logit_sharpness"][2])
    boards = [torch.load(tmp_path / f"board{rank}.pt") for rank in (0, 1)]
    assert boards[0] == boards[1]
    assert not any(map(math.isnan, boards[0]))
