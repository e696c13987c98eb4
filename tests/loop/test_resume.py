"""Interrupted and resumed equals uninterrupted, in every phase of the watch, in every loop."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal, NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_fp import FallbackPolicy, PrecisionFallback, StagedRollout
from lightning_fp.demo.faults import fault_plugin, fault_run
from lightning_fp.demo.faults.base import Fault
from lightning_fp.loop import PrecisionLoop
from lightning_fp.recipes import RolloutRecipe, Stage
from tests.loop.faulty import SHORT, Own, batches, loss_of, own_parts, same, told, watch

Kind = Literal["trainer", "plain", "fabric"]

RECIPE = RolloutRecipe(
    name="three",
    stages=(
        Stage(name="high", layers={"*": "high"}, until={"steps": 6}),
        Stage(name="blocks", layers={"blocks.*": "configured"}, until={"steps": 6}),
        Stage(name="low", layers={"*": "configured"}),
    ),
)


class Story(NamedTuple):
    """A run with all that happens in it."""

    fault: str
    steps: int
    policy: FallbackPolicy = FallbackPolicy()
    recipe: bool = False


STORIES = {
    "demoted": Story("noise", 44),
    "open": Story("bursts", 48),
    "permanent": Story("noise", 44, FallbackPolicy(max_demotions=1)),
    "promoted": Story("noise", 48, FallbackPolicy(hold=6, grace=4)),
    "rollout": Story("labels", 36, recipe=True),
}

# By story, the steps before which the run is interrupted, and the phase that it is in there.
MOMENTS = [
    ("demoted", 2, "warmup"),  # before the rehearsal
    ("demoted", 20, "warmup"),
    ("demoted", 30, "warmup"),  # the fault acts, nothing is suspected yet
    ("demoted", 38, "probation"),
    ("open", 35, "healthy"),  # an unclear verdict will be asked about again
    ("permanent", 38, "permanent"),
    ("promoted", 42, ""),
    ("rollout", 9, "warmup"),
    ("rollout", 20, "warmup"),
]

QUICK = {("demoted", 38, "plain"), ("rollout", 9, "plain"), ("rollout", 9, "fabric")}


class Whole(NamedTuple):
    """What two runs are compared by."""

    weights: Mapping[str, Tensor]
    told: list[tuple[int, str, str]]
    formats: Mapping[str, str]
    phases: list[str]


def options(story: Story) -> dict[str, Any]:
    return {**watch(), "policy": story.policy}


def own(story: Story, directory: Path, kind: Own, interrupt: int | None) -> Whole:
    """To the end; at one step by way of a file into new objects."""
    scaling, make = SHORT[story.fault]
    more: dict[str, Any] = {"recipe": RECIPE} if story.recipe else {}
    fault: Any = None
    phases: list[str] = []

    def parts() -> tuple[torch.nn.Module, PrecisionLoop]:
        nonlocal fault
        if isinstance(fault, Fault):
            fault.uninstall()
        fault = make()
        return own_parts(fault, scaling, directory, kind, more, 1, **options(story))

    model, loop = parts()
    for index, batch in enumerate(list(batches(fault, story.steps))):
        if index == interrupt:
            assert loop.scheduler is not None
            saved: dict[str, Any] = {
                "model": model.state_dict(),
                "optimizer": loop.optimizer.state_dict(),
                "scheduler": loop.scheduler.state_dict(),
                "loop": loop.state_dict(),
                "rng": torch.get_rng_state(),
            }
            torch.save(saved, directory / "saved.pt")
            loop.close()
            saved = torch.load(directory / "saved.pt", weights_only=True)
            model, loop = parts()
            assert loop.scheduler is not None
            model.load_state_dict(saved["model"])
            loop.optimizer.load_state_dict(saved["optimizer"])
            loop.scheduler.load_state_dict(saved["scheduler"])
            loop.load_state_dict(saved["loop"])
            torch.set_rng_state(saved["rng"])
        loop.step(loss_of(loop.model), batch)
        phases.append(loop.phase)
    loop.close()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    return Whole(weights, told(directory), loop.precision_map.formats(), phases)


class Saving(L.Callback):
    """Saves a checkpoint after some steps, and ends the fit there."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def in_the_trainer(story: Story, directory: Path, interrupt: int | None) -> Whole:
    """To the end; at one step by way of a checkpoint into a new Trainer."""
    scaling, make = SHORT[story.fault]

    def fit(more: list[L.Callback], **trainer: Any) -> Any:
        fallback = PrecisionFallback(dirpath=directory, **options(story))
        staged = [StagedRollout(RECIPE, dirpath=directory)] if story.recipe else []
        plugin = fault_plugin(scaling)
        run = fault_run(
            make(),
            plugin,
            [*staged, fallback, *more],
            steps=story.steps,
            blocks=1,
            default_root_dir=directory,
            **trainer,
        )
        return run.model, plugin

    if interrupt is None:
        model, plugin = fit([])
    else:
        path = directory / "saved.ckpt"
        fit([Saving(path, interrupt)])
        model, plugin = fit([], ckpt_path=path)
    return Whole(model.state_dict(), told(directory), plugin.precision_map.formats(), [])


def train(story: Story, directory: Path, kind: Kind, interrupt: int | None = None) -> Whole:
    if kind == "trainer":
        return in_the_trainer(story, directory, interrupt)
    return own(story, directory, kind, interrupt)


@cache
def uninterrupted(name: str, kind: Kind) -> Whole:
    return train(STORIES[name], Path(mkdtemp()), kind)


@pytest.mark.parametrize(
    ("name", "step", "phase", "kind"),
    [
        pytest.param(
            name,
            step,
            phase,
            kind,
            marks=[] if (name, step, kind) in QUICK else pytest.mark.slow,
        )
        for name, step, phase in MOMENTS
        for kind in ("trainer", "plain", "fabric")
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    name: str, step: int, phase: str, kind: Kind, tmp_path: Path
) -> None:
    whole = uninterrupted(name, kind)
    resumed = train(STORIES[name], tmp_path, kind, step)
    assert resumed.told == whole.told
    assert resumed.formats == whole.formats
    assert same(dict(resumed.weights), dict(whole.weights))
    assert resumed.phases == whole.phases
    if whole.phases and phase:
        assert whole.phases[step - 1] == phase
