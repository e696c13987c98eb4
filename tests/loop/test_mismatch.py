"""The training-inference mismatch in a plain loop: measured, told apart, acted upon."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_fp.loop import PrecisionLoop
from lightning_fp.records import read_events
from lightning_fp.rl import SampleOrigin
from lightning_fp.stability import MismatchDetector
from tests.helper import TinyGPT, next_byte_loss, text_loader

START = 20


def test_stale_weights_tighten_the_bounds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    loop = PrecisionLoop(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        "dynamic",
        dirpath=tmp_path,
        mismatch={
            "act": "by-cause",
            "correction": "verl",
            "detector": MismatchDetector(armed=16),
            "hold_steps": 64,
        },
    )
    assert loop.mismatch.correction is not None
    assert loop.mismatch.correction.high == 2.0
    batches = iter(text_loader())
    for step in range(START + 12):
        old = step >= START
        train = torch.full((4, 32), -2.0)
        size = torch.where(torch.arange(4) % 2 == 0, 1e-3, 5e-2 if old else 1e-3).unsqueeze(1)
        rollout = train + size * torch.randn(4, 32)
        versions = step - 3 * (torch.arange(4) % 2) * old
        origin = SampleOrigin(rollout_version=versions, train_version=step)

        def compute_loss(batch: torch.Tensor) -> torch.Tensor:
            loop.mismatch.update(rollout, train, origin=origin)  # noqa: B023
            return next_byte_loss(model, batch)

        loop.step(compute_loss, next(batches))
    loop.close()
    assert loop.mismatch.causes is not None
    assert loop.mismatch.causes.main == "staleness"
    assert loop.mismatch.correction.high == 2.0**0.5
    (event,) = read_events(tmp_path, kinds=["suspect"])
    assert "versions behind): synchronise" in event.reason
    assert event.action == "truncated token weights in [0, 2] -> [0, 1.41]"


def test_one_process_measures_by_default_and_what_is_off_says_so() -> None:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    logs = torch.full((2, 4), -1.0)
    loop = PrecisionLoop(model, optimizer, "dynamic", mismatch=False, fallback=False)
    with pytest.raises(ValueError, match="mismatch must be True, or its options"):
        loop.mismatch.update(logs, logs)
    loop.close()
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with PrecisionLoop(model, optimizer, "dynamic", fallback=False) as loop:
        with loop.training_step():
            loop.mismatch.update(logs, logs)
            loop.backward(next_byte_loss(model, next(iter(text_loader()))))
        assert loop.mismatch.latest is not None
