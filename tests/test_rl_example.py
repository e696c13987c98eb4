"""FP8 rollouts: what the example promises of mismatch and of routers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL: dict[str, Any] = {"steps": 2, "batch": 16, "pretraining": 20}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import rl_matched_precision
    finally:
        sys.path.remove(str(EXAMPLES))
    return rl_matched_precision


def test_precision_decides_how_far_apart_they_are(example: ModuleType) -> None:
    k3 = {
        name: example.train(example.ARMS[name], steps=2, batch=16).mismatch["k3_kl"]
        for name in ("fp16, both", "bf16, both", "fp8 rollout, bf16 training")
    }
    assert 30 * k3["fp16, both"] < k3["bf16, both"] < k3["fp8 rollout, bf16 training"] / 3


def test_the_quantiser_alone_makes_a_difference(example: ModuleType) -> None:
    assert 1e-7 < example.quantiser_alone(pretraining=20) < 1e-2


def test_replayed_routers_agree(example: ModuleType) -> None:
    replayed = example.train(example.MOE_ARMS["bf16, routers replayed"], "moe", **SMALL)
    assert replayed.rerouted == [0.0, 0.0]
    assert len(example.train(example.MOE_ARMS["bf16, both"], "moe", **SMALL).rerouted) == 2
