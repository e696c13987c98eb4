"""A probe of which the run makes half: what it finds, where it is taken, that nothing is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_fp import FP16Precision, PrecisionFallback
from lightning_fp.loop import PrecisionLoop
from lightning_fp.records.events import Suspicion
from lightning_fp.stability.answers import Answers
from lightning_fp.stability.happenings import Answered
from lightning_fp.stability.keep.batch_ring import BatchRing, MicroBatch, RecordedStep
from lightning_fp.stability.keep.random_state import RandomState
from lightning_fp.stability.keep.snapshots import Snapshots
from lightning_fp.stability.questions import Failed, ProbeStep
from lightning_fp.stability.replay.one_step import Replay, compare
from lightning_fp.stability.respond.attribution import gradient_error
from lightning_fp.stability.supervise.coming_probe import ComingProbe
from lightning_fp.stability.supervise.supervisor import Supervisor
from tests.callbacks.fallback.test_precision_fallback import batches, events, plugin
from tests.helper import LanguageModel, fit, next_byte_loss, same_weights, supervisor_of

STEPS = 90
"""The watch is armed after 64."""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Answered]:
    """The probes of a run and what they came to."""
    found: list[Answered] = []
    heard = Supervisor._heard

    def hear(self: Supervisor, happening: Any) -> Any:
        if isinstance(happening, Answered) and isinstance(happening.question, ProbeStep):
            found.append(happening)
        return heard(self, happening)

    monkeypatch.setattr(Supervisor, "_heard", hear)
    return found


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What two replays of the coming batches say, which probes have to agree with."""
    found: list[float] = []
    before_forward = ComingProbe.before_forward

    def both(self: ComingProbe, batch: MicroBatch) -> None:
        if self._asked is not None:
            loop = self._loop
            run = loop.replay(RecordedStep(step=self._asked, micro_batches=[batch]))
            assert run is not None
            high = run(dict.fromkeys(loop.low(), loop.high))
            found.append(gradient_error(compare(run({}), high, loop.model, loop.table)))
        before_forward(self, batch)

    monkeypatch.setattr(ComingProbe, "before_forward", both)
    return found


def train(callbacks: list[L.Callback], scaling: str = "dynamic", **options: Any) -> LanguageModel:
    precision = FP16Precision("16-mixed") if scaling == "fp16" else plugin(scaling)
    options = {"max_steps": STEPS, "callbacks": callbacks, "gradient_clip_val": 0.5, **options}
    model = options.pop("model", None) or LanguageModel(dropout=0.1)
    return fit(precision, model, loader=batches(4 * STEPS), **options)


@pytest.mark.parametrize("scaling", ["dynamic", "delayed"])
def test_the_steps_own_gradients_are_those_of_a_replay_and_nothing_is_left(
    scaling: str, told: list[Answered], errors: list[float], tmp_path: Path
) -> None:
    watched = train([PrecisionFallback(dirpath=tmp_path)], scaling)
    assert same_weights(train([], scaling), watched)
    found: list[Any] = [each.answer for each in told]
    assert [each.of_step for each in found] == [True]
    assert [each.error for each in found] == errors
    assert 0 < errors[0] < 0.5
    low, high = found[0].losses
    assert 0 < abs(low - high) < 0.01 * high


class Manual(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, index)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"model": Manual, "gradient_clip_val": None},
        {"scaling": "fp16"},
    ],
    ids=["accumulation", "manual", "scaled loss"],
)
def test_elsewhere_both_sides_are_replays(
    options: dict[str, Any], told: list[Answered], tmp_path: Path
) -> None:
    made = {**options, "model": options["model"]()} if "model" in options else options
    train([PrecisionFallback(dirpath=tmp_path)], **made)
    found: list[Any] = [each.answer for each in told]
    assert [(each.of_step, each.replays) for each in found] == [(False, 2)]


class Larger(L.Callback):
    """Writes into the gradients before the fallback sees them; in replays too."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.precision_plugin.precision_map.frozen:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad *= 3


def test_what_others_do_to_the_gradients_raises_no_suspicion(
    told: list[Answered], tmp_path: Path
) -> None:
    fallback = PrecisionFallback(dirpath=tmp_path)
    watched = train([Larger(), fallback])
    found: list[Any] = [each.answer for each in told]
    assert [each.of_step for each in found] == [True, False]
    assert found[0].error > 1.5 > 0.5 > found[1].error
    assert fallback.phase == "healthy"
    assert not events(tmp_path, Suspicion)
    assert same_weights(train([Larger()]), watched)


def in_a_loop(micro_batches: int, fallback: bool, path: Path) -> tuple[nn.Module, PrecisionLoop]:
    torch.manual_seed(0)
    model = LanguageModel(dropout=0.1).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loop = PrecisionLoop(
        model, optimizer, "dynamic", base="32-true", fallback=fallback, clip_norm=0.5, dirpath=path
    )
    rows = iter(batches(micro_batches * STEPS))
    for _ in range(STEPS):
        batch = [next(rows) for _ in range(micro_batches)]
        loop.step(lambda batch: next_byte_loss(model, batch), batch)
    return model, loop


@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_in_a_loop_of_ones_own(
    micro_batches: int, told: list[Answered], errors: list[float], tmp_path: Path
) -> None:
    watched, loop = in_a_loop(micro_batches, True, tmp_path / "watched")
    found: list[Any] = [each.answer for each in told]
    assert [each.error for each in found if each.of_step] == errors
    assert len(errors) == (micro_batches == 1)
    assert loop.phase == "healthy"
    plain, _ = in_a_loop(micro_batches, False, tmp_path / "plain")
    assert same_weights(plain, watched)


def test_a_checkpoint_keeps_what_was_not_told_yet(tmp_path: Path) -> None:
    class Between(L.Callback):
        saved: Any = None

        def on_train_batch_end(self, *_: Any) -> None:
            state = fallback.state_dict()["coming_probe"]
            self.saved = state or self.saved

    fallback, between = PrecisionFallback(dirpath=tmp_path), Between()
    train([fallback, between])
    assert between.saved["error"] > 0

    ring = BatchRing()
    loop: Any = None  # it is not asked
    later = ComingProbe(loop, Answers(loop, ring, Snapshots()), ring)
    later.load_state_dict(between.saved)
    at = between.saved["at"]
    ring.begin(at)
    ring.add(torch.zeros(1), 0, RandomState.capture())
    ring.end()
    assert later.take(at + 1) is None  # the step's loss has not arrived
    ring.set_results(at, loss=2.0, grad_norm=1.0, skipped=False)
    answered: Any = later.take(at + 1)
    assert answered.answer.losses == (2.0, between.saved["high_loss"])
    assert answered.question == ProbeStep(at=at + 1, coming=True)
    assert later.take(at + 1) is None


def test_lack_of_memory_is_an_answer() -> None:
    class Loop:
        own_gradients, high = True, None

        def low(self) -> list[str]:
            return []

        def replay(self, step: RecordedStep, *, backward: bool) -> Any:
            return lambda formats: Replay(outcome="out of memory")

    loop: Any = Loop()
    ring = BatchRing()
    probe = ComingProbe(loop, Answers(loop, ring, Snapshots()), ring)
    assert not probe.waits
    assert probe.takes(ProbeStep(at=3, coming=True))
    assert probe.waits
    assert not probe.takes(ProbeStep(at=3))
    assert probe.takes(ProbeStep(at=3, coming=True))
    micro = MicroBatch(batch=None, batch_idx=0, rng=RandomState.capture(), position={})
    probe.before_forward(micro)
    probe.after_backward()
    answered: Any = probe.take(4)
    assert answered.answer.error is None
    assert not probe.waits


class FailsInHighPrecision(LanguageModel):
    """Its step cannot be run without the formats that it is trained in, once it is armed."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        plugin: Any = self.trainer.precision_plugin
        high = set(plugin.precision_map.formats().values()) == {"fp32"}
        if high and index > 50:
            raise RuntimeError("no high precision here")
        return super().training_step(batch, index)


def test_a_step_that_raises_in_high_precision_ends_no_watch(
    told: list[Answered], tmp_path: Path
) -> None:
    fallback = PrecisionFallback(dirpath=tmp_path)
    train([fallback], model=FailsInHighPrecision())
    assert [each.answer for each in told] == [Failed(error="no high precision here")]
    assert supervisor_of(fallback).failed_at is None
    assert fallback.phase == "healthy"


class NeverTheSame(LanguageModel):
    """What the rehearsal does not let be run again: every step writes to where nobody looks."""

    made = 0

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        type(self).made += 1
        return super().training_step(batch, index) * (1 + 0.01 * type(self).made)


def test_nothing_is_run_where_the_rehearsal_lets_nothing_be_run(
    told: list[Answered], tmp_path: Path
) -> None:
    fallback = PrecisionFallback(dirpath=tmp_path)
    train([fallback], model=NeverTheSame())
    assert supervisor_of(fallback).confined_to == "limits only"
    assert [each.answer.replays for each in told] == [0] * len(told)
    assert all(not getattr(each.answer, "of_step", False) for each in told)


def test_no_snapshot_is_taken_between_question_and_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A fault may have begun since the probe before, and a new snapshot pushes out an old one."""
    fallback = PrecisionFallback(dirpath=tmp_path, snapshot_every_n_steps=16)
    there: list[list[int]] = []
    takes, take = ComingProbe.takes, ComingProbe.take

    def kept() -> list[int]:
        return [snapshot.step for snapshot in supervisor_of(fallback).snapshots.kept]

    def asked(self: ComingProbe, question: ProbeStep) -> bool:
        there.append(kept())
        return takes(self, question)

    def answered(self: ComingProbe, step: int) -> Answered | None:
        if (answer := take(self, step)) is not None:
            there.append(kept())
        return answer

    monkeypatch.setattr(ComingProbe, "takes", asked)
    monkeypatch.setattr(ComingProbe, "take", answered)
    train([fallback])
    before, *_, after = there
    assert before == after == [48, 0]  # one of step 64 was due
