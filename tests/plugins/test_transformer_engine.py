"""Whole runs with Transformer Engine's backend, over a stand-in that multiplies on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_fp import ClampMonitor, DelayedScaling, FP8Precision, ParityProbe, PrecisionFallback
from lightning_fp.kernels.transformer_engine.kernel import use_library
from lightning_fp.plugins.base import STATE_KEY
from lightning_fp.records import read_events, read_parity, read_statistics
from lightning_fp.records.events import Demotion
from tests.callbacks.fallback.test_precision_fallback import LAYER, Reversed, SuspectAt, batches
from tests.helper import LanguageModel, fit, make_trainer, same_weights, text_loader, text_rows
from tests.te_stub.fake import State, fake_library

TE = "transformer-engine"


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    with use_library(fake_library()):
        yield


def plugin(scaling: Any = "delayed", **options: Any) -> FP8Precision:
    # by a rule, because the defaults leave layers this small alone where there is FP8 hardware
    format = "fp8-dynamic" if scaling == "dynamic" else "fp8-delayed"
    rules = {"*blocks*": format}
    return FP8Precision(scaling, **{"backend": TE, "base": "32-true", "layers": rules, **options})


def train(scaling: Any, callbacks: list[L.Callback], steps: int = 20, **options: Any) -> Any:
    State.reset()
    options = {"max_steps": -1, "max_epochs": 1, "callbacks": callbacks, **options}
    return fit(plugin(scaling), LanguageModel(), loader=batches(steps), **options)


class Writes(L.Callback):
    """Changes formats after fixed steps."""

    def __init__(self, writes: dict[int, tuple[str, str]]) -> None:
        self.writes = writes

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in self.writes:
            trainer.precision_plugin.precision_map.set(*self.writes[trainer.global_step])


@pytest.mark.parametrize("base", ["32-true", "bf16-mixed", "16-mixed"])
def test_dynamic_scaling_is_our_own_kernels_course(base: Any) -> None:
    theirs = fit(plugin("dynamic", base=base), max_steps=5)
    ours = fit(plugin("dynamic", backend="native", base=base), max_steps=5)
    assert theirs.losses == ours.losses
    assert same_weights(theirs, ours)


def test_delayed_scaling_learns_as_our_own() -> None:
    theirs = fit(plugin(), max_steps=20)
    ours = fit(plugin("delayed", backend="native"), max_steps=20)
    assert theirs.losses[-1] < 0.8 * theirs.losses[0]
    # not bit for bit: their first step looks for scales in high precision
    assert theirs.losses[-1] == pytest.approx(ours.losses[-1], rel=0.01)
    # one update of scales a step and direction; the first step's has no layer in it yet
    assert (State.forward_updates, State.backward_updates) == (20, 19)


def test_scales_follow_the_configured_history() -> None:
    run = plugin(DelayedScaling(history_len=4, margin=2, algorithm="most_recent"))
    fit(run, max_steps=6)
    state = run.precision_map.scale_history.state_dict()
    newest = state["history"][..., 0]
    limits = torch.tensor([448.0, 448.0, 57344.0])
    torch.testing.assert_close(state["scales"], limits / newest / 4)
    assert state["history"].shape == (8, 3, 4)


def test_evaluation_reaches_no_scale_and_takes_any_batch() -> None:
    class Evaluated(LanguageModel):
        def on_validation_start(self) -> None:
            self.before = State.forward_updates, table().state_dict()["scales"]["scales"].clone()

        def on_validation_end(self) -> None:
            assert State.forward_updates == self.before[0]
            assert torch.equal(table().state_dict()["scales"]["scales"], self.before[1])

    def table() -> Any:
        return run.precision_map

    run, model = plugin(), Evaluated()
    trainer = make_trainer(run, max_steps=8, val_check_interval=4)
    odd = torch.utils.data.DataLoader(text_rows(3)[:, :4], batch_size=3)  # 9 tokens
    trainer.fit(model, text_loader(40), odd)
    assert len(model.val_losses) == 2
    assert all(map(math.isfinite, model.val_losses))


def test_evaluation_in_fp8_leaves_delayed_scales_alone() -> None:
    run = plugin(fp8_eval=True)
    model = LanguageModel()
    trainer = make_trainer(run, max_steps=4)
    trainer.fit(model, text_loader(16))
    updates, scales = State.forward_updates, run.precision_map.scale_history.state_dict()
    trainer.validate(model, text_loader(16), verbose=False)
    in_fp8 = model.val_losses[-1]
    assert State.forward_updates == updates
    assert torch.equal(run.precision_map.scale_history.state_dict()["scales"], scales["scales"])
    run.precision_map.phase.fp8_eval = False
    trainer.validate(model, text_loader(16), verbose=False)
    assert model.val_losses[-1] != in_fp8


WRITES = {2: ("*.fc1", "bf16"), 4: ("*.fc1", "fp8-delayed"), 5: ("*blocks.0.*", "fp8-dynamic")}


@pytest.mark.parametrize("scaling", ["dynamic", "delayed"])
def test_resuming_is_bit_equal_and_checkpoints_stay_everyones(tmp_path: Path, scaling: str) -> None:
    path = tmp_path / "epoch.ckpt"

    class Saves(Writes):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    whole = LanguageModel()
    first = make_trainer(plugin(scaling), max_epochs=2, callbacks=[Saves(WRITES)])
    first.fit(whole, text_loader(24))
    State.reset()  # another process
    resumed, run = LanguageModel(), plugin(scaling)
    make_trainer(run, max_epochs=2, callbacks=[Writes(WRITES)]).fit(
        resumed, text_loader(24), ckpt_path=path
    )
    assert resumed.losses == whole.losses[6:]
    assert same_weights(resumed, whole)
    assert run.precision_map.formats()["model.blocks.1.fc1"] == "fp8-delayed"

    checkpoint = torch.load(path, weights_only=True)
    assert not [key for key in checkpoint["state_dict"] if "extra_state" in key]
    LanguageModel().load_state_dict(checkpoint["state_dict"], strict=True)
    assert checkpoint[STATE_KEY]["scales"]["history"].shape[1:] == (3, 16)


def test_a_checkpoint_of_our_own_kernel_continues(tmp_path: Path) -> None:
    path = tmp_path / "native.ckpt"
    ours = plugin("delayed", backend="native")
    trainer = make_trainer(ours, max_epochs=1)
    trainer.fit(LanguageModel(), text_loader(24))
    trainer.save_checkpoint(path)
    theirs = plugin()
    model = LanguageModel()
    make_trainer(theirs, max_epochs=2).fit(model, text_loader(24), ckpt_path=path)
    # scales were there from the first step on: no step in high precision to look for them
    assert State.backward_updates == len(model.losses) == 6


def test_callbacks_that_only_look_change_nothing(tmp_path: Path) -> None:
    looks = [
        ClampMonitor(every_n_steps=4, dirpath=tmp_path),
        ParityProbe(every_n_steps=5, dirpath=tmp_path),
        PrecisionFallback(dirpath=tmp_path),
    ]
    alone = train("delayed", [])
    watched = train("delayed", looks)
    assert watched.losses == alone.losses
    assert same_weights(watched, alone)
    assert len(set(read_parity(tmp_path)["step"].to_pylist())) == 4
    assert not [event for event in read_events(tmp_path) if "failed" in event.reason]


def test_statistics_are_in_the_same_table(tmp_path: Path) -> None:
    kept = [
        "step",
        "layer",
        "operand",
        "format",
        "amax",
        "scale",
        "clamped_fraction",
        "clamped_mass",
        "underflow_fraction",
        "nonfinite",
        "sqnr_db",
    ]
    tables = []
    for backend in ("native", TE):
        run = plugin("dynamic", backend=backend)
        monitor = ClampMonitor(every_n_steps=4, sample=1, dirpath=tmp_path / backend)
        fit(run, max_steps=12, callbacks=[monitor])
        tables.append(read_statistics(tmp_path / backend).select(kept).to_pylist())
    assert tables[0]
    assert repr(tables[0]) == repr(tables[1])  # by text: NaN is NaN


def test_delayed_statistics_have_theirs_scales_and_headroom(tmp_path: Path) -> None:
    monitor = ClampMonitor(every_n_steps=4, sample=1, dirpath=tmp_path)
    train("delayed", [monitor], steps=12)
    rows = [r for r in read_statistics(tmp_path).to_pylist() if r["operand"] == "grad_output"]
    assert rows
    last = rows[-1]
    assert last["scale"] > 1e3  # of gradients: not the 1 that Transformer Engine begins with
    assert -3 < last["headroom_bits"] < 3


@pytest.mark.slow
def test_the_fallback_convicts_demotes_and_goes_on(tmp_path: Path) -> None:
    fallback = PrecisionFallback(dirpath=tmp_path)
    model = train("delayed", [Reversed(), SuspectAt(fallback, 60, lasting=40), fallback], 70)
    (demotion,) = [event for event in read_events(tmp_path) if isinstance(event, Demotion)]
    assert demotion.formats == {LAYER: ("fp8-delayed", "fp32")}
    assert fallback.phase == "probation"
    sound = train("delayed", [], 70)
    assert sum(model.losses[-5:]) == pytest.approx(sum(sound.losses[-5:]), rel=0.01)
