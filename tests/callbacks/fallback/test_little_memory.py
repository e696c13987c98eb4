"""A run with memory for the activations of FP8 alone goes on in high precision all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.proof.activation_bound import ActivationBound
from lightning_fp import PrecisionFallback
from lightning_fp.records.events import Note, read_events
from lightning_fp.stability.actions import Write
from lightning_fp.stability.questions import Promote
from tests.callbacks.fallback.test_precision_fallback import batches, between, plugin
from tests.helper import LanguageModel, make_trainer, same_weights, supervisor_of

DEMOTED, PROMOTED, STEPS = 4, 8, 11


class Demote(L.Callback):
    """All layers to high precision at one step, back at another."""

    def __init__(self, fallback: PrecisionFallback) -> None:
        self.fallback = fallback
        self.recomputing: dict[int, bool] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if not between(trainer, args[-1]):
            return
        hands, step = supervisor_of(self.fallback).hands, trainer.global_step
        loop = hands.loop
        if step == DEMOTED:
            hands.do(Write(formats=dict.fromkeys(loop.low(), loop.high), reason="a test"))
        if step == PROMOTED:
            layers = [name for name in loop.table.layers if name != "model.lm_head"]
            formats = tuple((name, "fp8-dynamic") for name in layers)
            hands.answer(Promote(at=step, formats=formats, reason="a test"))
        self.recomputing[step] = loop.recomputation.in_the_run


def train(
    directory: Path, bound: ActivationBound, *others: L.Callback, resume: Path | None = None
) -> tuple[Any, Demote]:
    fallback = PrecisionFallback(dirpath=directory, rehearse=False, limit=None)
    demote = Demote(fallback)
    callbacks = [bound, fallback, demote, *others]
    trainer = make_trainer(
        plugin("dynamic"), max_steps=STEPS, callbacks=callbacks, enable_checkpointing=bool(others)
    )
    model = LanguageModel(dropout=0.0 if others else 0.1)
    trainer.fit(model, batches(STEPS), ckpt_path=resume)
    return model, demote


def test_the_run_computes_activations_again_and_ends_alike(tmp_path: Path) -> None:
    free, _ = train(tmp_path / "free", ActivationBound())
    bound = ActivationBound(of_first=1.1)
    bounded, demote = train(tmp_path / "bounded", bound)
    assert bound.seen.refused > 0
    assert [step for step, again in demote.recomputing.items() if again] == [4, 5, 6, 7]
    assert same_weights(free, bounded)
    notes = [event.reason for event in read_events(tmp_path / "bounded") if type(event) is Note]
    assert any("2 blocks of the model will compute activations again" in note for note in notes)
    assert any("memory for all activations again" in note for note in notes)
    assert not any("forward" in vars(module) for module in bounded.modules())


def test_a_resumed_run_goes_on_so(tmp_path: Path) -> None:
    bound, saved = ActivationBound(of_first=1.1), ModelCheckpoint(tmp_path, every_n_train_steps=6)
    whole, _ = train(tmp_path / "whole", bound, saved)
    again = ActivationBound(bound.seen.limit)
    at = Path(saved.best_model_path)
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=6)
    resumed, demote = train(tmp_path / "parts", again, saved, resume=at)
    assert demote.recomputing == {6: True, 7: True, 8: False, 9: False, 10: False}
    assert same_weights(whole, resumed)


@pytest.mark.parametrize("compiled", [False, True])
def test_where_nothing_can_be_computed_again_fewer_layers_are_demoted(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_fp.callbacks.fallback.trainer_loop import TrainerLoop
    from lightning_fp.stability.replay import recompute

    if compiled:
        monkeypatch.setattr(TrainerLoop, "compiled", True)
    else:
        monkeypatch.setattr(recompute, "blocks_of", lambda *_: [])
    _, demote = train(tmp_path, ActivationBound(of_first=1.1))
    assert not any(demote.recomputing.values())
    notes = [event.reason for event in read_events(tmp_path) if type(event) is Note]
    assert any("to demote only" in note for note in notes)
