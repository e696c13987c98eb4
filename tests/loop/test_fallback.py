"""The watch in loops of one's own: the verdicts of the Trainer at its steps, and its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_fp import PrecisionFallback, StagedRollout
from lightning_fp.demo.faults import CASES, fault_plugin, fault_run
from lightning_fp.demo.faults.base import Fault
from lightning_fp.demo.faults.innocent import DataFault
from lightning_fp.demo.faults.run import TinyByteGPT
from lightning_fp.demo.faults.trial import HEALTHY
from lightning_fp.events import Rehearsed
from lightning_fp.recipes import RolloutRecipe, Stage
from lightning_fp.records import read_events
from tests.loop.faulty import (
    INNOCENT,
    SHORT,
    STEPS,
    Own,
    batches,
    in_own_loop,
    in_the_trainer,
    kinds,
    loss_of,
    own_parts,
    same,
    told,
    watch,
)

Trained = tuple[dict[str, Tensor], Path]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """The Trainer's run of a case, which all other loops are compared with; made once."""
    made: dict[object, Trained] = {}

    def of(name: str, fault: Any, scaling: str, steps: int, **options: Any) -> Trained:
        if name not in made:
            directory = tmp_path_factory.mktemp("trainer")
            made[name] = in_the_trainer(fault, scaling, steps, directory, **options), directory
        return made[name]

    return of


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("noise", "plain"),
        ("noise", "fabric"),
        ("nan", "plain"),
        *(
            pytest.param(case, kind, marks=pytest.mark.slow)
            for case in SHORT
            for kind in ("plain", "fabric")
            if (case, kind) not in (("noise", "plain"), ("noise", "fabric"), ("nan", "plain"))
        ),
    ],
)
def test_verdicts_and_weights_are_the_trainers(
    case: str, kind: Own, trainer: Callable[..., Trained], tmp_path: Path
) -> None:
    scaling, make = SHORT[case]
    options: dict[str, Any] = {"blocks": 1, **watch()}
    weights, directory = trainer(f"short {case}", make(), scaling, STEPS, **options)
    ours = in_own_loop(make(), scaling, STEPS, tmp_path, kind, **options)
    assert told(tmp_path) == told(directory)
    assert same(ours, weights)
    assert kinds(tmp_path).count("demote") == (case == "noise")
    assert kinds(tmp_path).count("skip") == (2 if case == "nan" else 0)
    if case not in INNOCENT:
        assert len(kinds(tmp_path)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "fabric"])
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
def test_every_kind_of_fault_ends_as_in_the_trainer(
    case: str, kind: Own, trainer: Callable[..., Trained], tmp_path: Path
) -> None:
    known = None if case == HEALTHY else CASES[case]
    scaling = "fp8-delayed" if known is None else known.scaling

    def fault() -> Fault | DataFault | None:
        made = None if known is None else known.make()
        assert made is None or isinstance(made, (Fault, DataFault))
        return made

    weights, directory = trainer(case, fault(), scaling, 300)
    ours = in_own_loop(fault(), scaling, 300, tmp_path, kind)
    assert told(tmp_path) == told(directory)
    assert same(ours, weights)
    precision = known is not None and known.cause == "precision"
    assert ("demote" in kinds(tmp_path) or "limit" in kinds(tmp_path)) == precision


class Recipe:
    """What a user's function may belong to."""

    def __init__(self, model: TinyByteGPT, *, counts: bool) -> None:
        self.model, self.counts = model, counts
        self.generator = iter(range(10**6))

    def loss(self, batch: Any) -> torch.Tensor:
        return self.model._loss(batch) * (1 + (next(self.generator) if self.counts else 0))


@pytest.mark.parametrize("counts", [False, True])
def test_the_rehearsal_sees_whether_a_step_is_the_same_twice(counts: bool, tmp_path: Path) -> None:
    model, loop = own_parts(None, "fp8-dynamic", tmp_path, blocks=1)
    recipe = Recipe(model, counts=counts)
    for batch in batches(None, 8):
        loop.step(recipe.loss, batch)
    loop.close()
    (event,) = read_events(tmp_path, kinds=["rehearsal"])
    assert isinstance(event, Rehearsed)
    assert event.outcome == ("limits only" if counts else "passed")
    assert ("another loss the second time" in event.reason) == counts


@pytest.mark.parametrize("compiled", [False, True])
def test_a_replay_repeats_what_was_rounded_by_chance(compiled: bool, tmp_path: Path) -> None:
    model, loop = own_parts(None, "e8m3-stochastic", tmp_path, blocks=1)
    assert "e8m3-stochastic" in loop.precision_map.formats().values()
    loss = loss_of(model)
    if compiled:
        torch._dynamo.reset()
        loss = torch.compile(loss, backend="aot_eager")
    for batch in batches(None, 8):
        loop.step(loss, batch)
    loop.close()
    (event,) = read_events(tmp_path, kinds=["rehearsal"])
    assert isinstance(event, Rehearsed)
    assert event.outcome == "passed"


def test_blocks_are_watched_and_cannot_be_made_again(tmp_path: Path) -> None:
    model, loop = own_parts(None, "fp8-dynamic", tmp_path, blocks=1)
    for batch in batches(None, 6):
        with loop.training_step(batch):
            loop.backward(model._loss(batch))
    loop.close()
    events = read_events(tmp_path)
    said = [event.sentence() for event in events]
    assert any("cannot be run again" in line for line in said)
    assert loop.steps.attempted == 6


def test_a_step_is_recorded_in_the_formats_it_ran_in(tmp_path: Path) -> None:
    """A stage begins when the batch has come and been recorded."""
    stages = (
        Stage(name="high", layers={"*": "high"}, until={"steps": 2}),
        Stage(name="low", layers={"*": "configured"}),
    )
    recipe = RolloutRecipe(name="two", stages=stages)
    fallback = PrecisionFallback(dirpath=tmp_path / "trainer")
    seen: dict[str, list[tuple[Any, Any]]] = {"trainer": [], "plain": []}

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            plugin: Any = trainer.precision_plugin
            if plugin.precision_map.frozen:  # a replay
                return
            assert fallback.supervisor is not None
            last = fallback.supervisor.ring.last
            assert last is not None
            seen["trainer"].append((last.formats, plugin.precision_map.formats()))

    staged = StagedRollout(recipe, dirpath=tmp_path / "trainer")
    callbacks = [fallback, staged, Looks()]
    fault_run(None, fault_plugin("fp8-delayed"), callbacks, steps=4, blocks=1)
    _, loop = own_parts(None, "fp8-delayed", tmp_path / "plain", more={"recipe": recipe}, blocks=1)
    for batch in batches(None, 4):
        loop.step(loss_of(loop.model), batch)
        watching = loop._parts.watching
        assert watching is not None
        assert watching.ring.last is not None
        seen["plain"].append((watching.ring.last.formats, loop.precision_map.formats()))
    loop.close()
    for pairs in seen.values():
        assert [set(ran.values()) for _, ran in pairs] == [{"fp32"}] * 2 + [{"fp8-delayed"}] * 2
        assert all(recorded == ran for recorded, ran in pairs)


def test_ratios_are_one_where_a_stage_begins(tmp_path: Path) -> None:
    """What is due before the coming step is done when it is asked for its forward."""
    stages = (
        Stage(name="high", layers={"*": "high"}, until={"steps": 2}),
        Stage(name="low", layers={"*": "configured"}),
    )
    recipe = RolloutRecipe(name="two", stages=stages)
    model, loop = own_parts(None, "fp8-delayed", tmp_path, more={"recipe": recipe}, blocks=1)
    for batch in batches(None, 5):
        with loop.as_trained(), torch.no_grad():
            old = model(batch[0])
        seen: list[Tensor] = []

        def compute_loss(given: Any, seen: list[Tensor] = seen) -> Tensor:
            seen.append(model(given[0]).detach())
            return model._loss(given)

        loop.step(compute_loss, batch)
        assert torch.equal(old, seen[0])
    assert loop.stage == "low"
    assert loop.steps.attempted == 5
    (event,) = read_events(tmp_path, kinds=["rehearsal"])
    assert isinstance(event, Rehearsed)
    assert event.outcome == "passed"
    with loop.as_trained():
        pass
    assert loop.steps.attempted == 5
    loop.close()
