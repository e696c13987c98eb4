"""The watch in a plain loop: the Trainer's verdicts at the Trainer's steps, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fp.demo.data import read_sources
from lightning_fp.demo.faults import CASES
from lightning_fp.demo.faults.base import Fault
from lightning_fp.demo.faults.corruption import ForwardCorruption
from lightning_fp.demo.faults.innocent import DataFault, NaNData
from lightning_fp.demo.faults.run import TinyBatches, TinyByteGPT
from lightning_fp.demo.faults.trial import HEALTHY
from lightning_fp.events import Rehearsed
from lightning_fp.records import read_events
from tests.loop.faulty import in_a_plain_loop, in_the_trainer, plain_parts, same, told


def noise(start: int = 70) -> ForwardCorruption:
    return ForwardCorruption("head", kind="noise", strength=0.5, start=start)


def test_a_fault_is_found_when_the_trainer_finds_it(tmp_path: Path) -> None:
    weights = in_the_trainer(noise(), "fp8-dynamic", 84, tmp_path / "trainer")
    ours = in_a_plain_loop(noise(), "fp8-dynamic", 84, tmp_path / "plain")
    assert told(tmp_path / "plain") == told(tmp_path / "trainer")
    assert [kind for _, kind, _ in told(tmp_path / "plain")].count("demote") == 1
    assert same(ours, weights)


def test_what_is_not_precisions_fault_is_not_blamed(tmp_path: Path) -> None:
    fault = NaNData(start=40, batches=2)
    weights = in_the_trainer(fault, "fp8-delayed", 60, tmp_path / "trainer")
    ours = in_a_plain_loop(fault, "fp8-delayed", 60, tmp_path / "plain")
    assert told(tmp_path / "plain") == told(tmp_path / "trainer")
    kinds = [kind for _, kind, _ in told(tmp_path / "plain")]
    assert kinds.count("skip") == 2
    assert "demote" not in kinds
    assert same(ours, weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "backward-zero",
        "forward-noise",
        "gradient-bursts",
        HEALTHY,
        "outlier-tokens",
        "shuffled-labels-burst",
        "stuck-scale",
    ],
)
def test_every_kind_of_fault_ends_as_in_the_trainer(case: str, tmp_path: Path) -> None:
    known = None if case == HEALTHY else CASES[case]
    scaling = "fp8-delayed" if known is None else known.scaling

    def fault() -> Fault | DataFault | None:
        made = None if known is None else known.make()
        assert made is None or isinstance(made, (Fault, DataFault))
        return made

    weights = in_the_trainer(fault(), scaling, 300, tmp_path / "trainer")
    ours = in_a_plain_loop(fault(), scaling, 300, tmp_path / "plain")
    assert told(tmp_path / "plain") == told(tmp_path / "trainer")
    assert same(ours, weights)


class Recipe:
    """What a user's function may belong to."""

    def __init__(self, model: TinyByteGPT, *, counts: bool) -> None:
        self.model, self.counts = model, counts
        self.generator = iter(range(10**6))

    def loss(self, batch: Any) -> torch.Tensor:
        return self.model._loss(batch) * (1 + (next(self.generator) if self.counts else 0))


@pytest.mark.parametrize("counts", [False, True])
def test_the_rehearsal_sees_whether_a_step_is_the_same_twice(counts: bool, tmp_path: Path) -> None:
    model, loop = plain_parts(None, "fp8-dynamic", tmp_path)
    recipe = Recipe(model, counts=counts)
    text, _ = read_sources()
    for batch in TinyBatches(text, batches=8, seed=0):
        loop.step(recipe.loss, batch)
    loop.close()
    (event,) = read_events(tmp_path, kinds=["rehearsal"])
    assert isinstance(event, Rehearsed)
    assert event.outcome == ("limits only" if counts else "passed")
    assert ("not the same twice" in event.reason) == counts


def test_blocks_are_watched_and_cannot_be_made_again(tmp_path: Path) -> None:
    model, loop = plain_parts(None, "fp8-dynamic", tmp_path)
    text, _ = read_sources()
    for batch in TinyBatches(text, batches=6, seed=0):
        with loop.training_step(batch):
            loop.backward(model._loss(batch))
    loop.close()
    events = read_events(tmp_path)
    said = [event.sentence() for event in events]
    assert any("cannot be run again" in line for line in said)
    assert loop.steps.attempted == 6


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = in_a_plain_loop(noise(40), "fp8-dynamic", 64, tmp_path / "whole")
    fault = noise(40)
    model, loop = plain_parts(fault, "fp8-dynamic", tmp_path / "parts")
    text, _ = read_sources()
    batches = list(TinyBatches(text, batches=64, seed=0))
    for batch in batches[:43]:
        loop.step(model._loss, batch)
    saved = {
        "model": {name: x.clone() for name, x in model.state_dict().items()},
        "optimizer": loop.optimizer.state_dict(),
        "scheduler": loop.scheduler.state_dict() if loop.scheduler else {},
        "loop": loop.state_dict(),
    }
    torch.save(saved, tmp_path / "saved.pt")
    loop.close()
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    fault = noise(40)
    model, loop = plain_parts(fault, "fp8-dynamic", tmp_path / "parts")
    model.load_state_dict(saved["model"])
    loop.optimizer.load_state_dict(saved["optimizer"])
    assert loop.scheduler is not None
    loop.scheduler.load_state_dict(saved["scheduler"])
    loop.load_state_dict(saved["loop"])
    for batch in batches[43:]:
        loop.step(model._loss, batch)
    loop.close()
    assert same(model.state_dict(), whole)
    assert told(tmp_path / "parts") == told(tmp_path / "whole")
