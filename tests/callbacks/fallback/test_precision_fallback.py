"""PrecisionFallback in a real Trainer: what it leaves alone, what it finds, what it saves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from benchmarks.proof.activation_bound import ActivationBound
from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback
from lightning_fp.demo import ByteBatches
from lightning_fp.records.events import (
    Demotion,
    Event,
    LayerClimb,
    Note,
    Rollback,
    Verdict,
    read_events,
)
from lightning_fp.stability.happenings import Asked
from lightning_fp.stability.questions import Climb, Climbed
from lightning_fp.stability.replay.trajectory import replay_trajectory
from lightning_fp.stability.respond.fallback_policy import FallbackPolicy
from lightning_fp.stability.supervise.supervisor import Supervisor
from tests.helper import (
    CONTEXT,
    LanguageModel,
    fit,
    make_trainer,
    same_weights,
    supervisor_of,
    text_rows,
)

LAYER = "model.blocks.1.fc1"


def batches(count: int, seed: int = 0, size: int = 8) -> ByteBatches:
    text = text_rows(3000).flatten()
    return ByteBatches(text, batches=count, batch_size=size, context=CONTEXT, seed=seed)


def plugin(scaling: str = "delayed") -> FP8Precision:
    return FP8Precision(scaling, base="32-true")


def train(
    callbacks: list[L.Callback],
    steps: int = 40,
    scaling: str = "delayed",
    model: L.LightningModule | None = None,
    **options: Any,
) -> Any:
    model = LanguageModel() if model is None else model
    loader = options.pop("loader", None) or batches(steps)
    options = {"max_steps": -1, "max_epochs": 1, "callbacks": callbacks, **options}
    return fit(plugin(scaling), model, loader=loader, **options)


class Reversed(L.Callback):
    """From a step on the gradient that comes back through a layer has the wrong sign, and is too
    large, while the layer is in FP8."""

    def __init__(self, layer: str = LAYER, start: int = 20) -> None:
        self.layer, self.start = layer, start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layer: Any = pl_module.get_submodule(self.layer)

        def corrupt(module: Any, args: Any, output: Tensor) -> None:
            wrong = trainer.global_step >= self.start and module.format.name.startswith("fp8")
            if wrong and output.requires_grad:
                output.register_hook(lambda gradient: -8 * gradient)

        self.hook = layer.register_forward_hook(corrupt)

    def on_train_end(self, *_: Any) -> None:
        self.hook.remove()


class SuspectAt(L.Callback):
    """Has the fallback investigate at given steps, whatever its detector says."""

    def __init__(
        self,
        fallback: PrecisionFallback,
        *steps: int,
        risen: bool = False,
        lasting: int | None = None,
    ) -> None:
        self.fallback, self.steps, self.risen, self.lasting = fallback, steps, risen, lasting

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        running = self.fallback.supervisor is not None
        if trainer.global_step in self.steps and running and between(trainer, args[-1]):
            step = supervisor_of(self.fallback).count.done
            onset = step if self.lasting is None else step - self.lasting
            supervisor_of(self.fallback).tell(Asked(at=step, onset=onset, risen=self.risen))


def between(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the run itself, not a replay, is between two steps."""
    replay = trainer.precision_plugin.precision_map.frozen
    return not replay and batch_idx % trainer.accumulate_grad_batches == 0


def events(directory: Path, *kinds: type[Event]) -> list[Any]:
    found = read_events(directory)
    return [event for event in found if not kinds or isinstance(event, kinds)]


# --- Nothing wrong ------------------------------------------------------------------------------


class WithBatchNorm(LanguageModel):
    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.norm = nn.BatchNorm1d(32)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.log("norm", self.norm(self.model.embed(batch).mean(dim=1)).mean())
        return super().training_step(batch, index)


@pytest.mark.parametrize("scaling", ["dynamic", "delayed"])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}], ids=["", "4x"]
)
def test_weights_are_bit_equal_to_those_without_it(
    scaling: str, options: dict[str, Any], tmp_path: Path
) -> None:
    plain = train([], 80, scaling, WithBatchNorm(), **options)
    fallback = PrecisionFallback(dirpath=tmp_path, probe_every_n_steps=16, preflight=True)
    watched = train([fallback], 80, scaling, WithBatchNorm(), **options)
    assert same_weights(plain, watched)
    assert fallback.steps.useful == fallback.steps.attempted == watched.trainer.global_step
    assert not events(tmp_path, Demotion, LayerClimb, Rollback)


@pytest.mark.parametrize("risen", [False, True])
def test_an_investigation_that_does_not_convict_leaves_no_trace(
    risen: bool, tmp_path: Path
) -> None:
    plain = train([], 40, "delayed", WithBatchNorm(), accumulate_grad_batches=2)
    fallback = PrecisionFallback(dirpath=tmp_path)
    suspicion = SuspectAt(fallback, 18, risen=risen)
    watched = train(
        [suspicion, fallback], 40, "delayed", WithBatchNorm(), accumulate_grad_batches=2
    )
    assert same_weights(plain, watched)
    assert len(plain.losses) == len(watched.losses)
    assert {v.verdict for v in events(tmp_path, Verdict)} <= {"not precision", "unclear"}
    assert len(events(tmp_path, Verdict)) == 2
    assert fallback.steps.replayed > 18


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}], ids=["", "clip"]
)
def test_a_trajectory_in_the_same_formats_is_the_run_bit_for_bit(
    options: dict[str, Any], tmp_path: Path
) -> None:
    class Compare(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step != 14 or not between(trainer, args[-1]):
                return
            supervisor = supervisor_of(fallback)
            start = supervisor.snapshots.kept[-1]
            steps = supervisor.ring.since(start.step)
            assert steps is not None
            trajectory = replay_trajectory(supervisor.loop, start, steps, {})
            self.losses = list(trajectory.losses)
            self.recorded = [step.loss for step in steps]
            now = {n: p.clone() for n, p in trainer.lightning_module.state_dict().items()}
            assert trajectory.end is not None
            supervisor.loop.restore(trajectory.end)
            again = trainer.lightning_module.state_dict()
            self.same = all(torch.equal(now[name], again[name]) for name in now)

    # under dynamic scaling: delayed scales are those of now, not those of then
    fallback, compare = PrecisionFallback(dirpath=tmp_path), Compare()
    train([compare, fallback], 40, "dynamic", WithBatchNorm(), **options)
    assert compare.same
    # the last step's loss has not been judged yet at that boundary
    assert compare.losses[:-1] == compare.recorded[:-1]


# --- Something wrong ----------------------------------------------------------------------------


def test_a_corrupted_layer_is_convicted_and_the_run_goes_on_from_high_precision(
    tmp_path: Path,
) -> None:
    high = fit(Precision(), LanguageModel(), loader=batches(70), max_steps=-1, max_epochs=1)
    fallback = PrecisionFallback(dirpath=tmp_path)
    fault = Reversed()
    model = train([fault, SuspectAt(fallback, 60, lasting=40), fallback], 70, "dynamic")
    (demotion,) = events(tmp_path, Demotion)
    assert demotion.formats == {LAYER: ("fp8-dynamic", "fp32")}
    (rollback,) = events(tmp_path, Rollback)
    assert rollback.replayed == 60 - rollback.to_step
    assert fallback.phase == "probation"
    assert fallback.steps.useful == 70
    assert model.trainer.global_step == 70
    assert sum(model.losses[-5:]) / 5 == pytest.approx(sum(high.losses[-5:]) / 5, rel=0.01)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_rung_that_cannot_run_is_left_out(phase: str, tmp_path: Path) -> None:
    """What follows the layer cannot take the output of rows, which only a step of the run shows."""

    class Refuses(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            layer: Any = pl_module.get_submodule(LAYER)

            def refuse(gradient: Tensor) -> None:
                raise RuntimeError("no rows here")

            def follow(module: Any, args: Any, output: Tensor) -> None:
                if module.format.name.startswith("fp8-rowwise"):
                    if phase == "forward":
                        refuse(output)
                    output.register_hook(refuse)

            layer.register_forward_hook(follow)

        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 6 and between(trainer, args[-1]):
                self.climbed = supervisor_of(fallback).hands.answer(climb)

    climb = Climb(at=6, layer=LAYER, reason="a test")
    fallback, refuses = PrecisionFallback(dirpath=tmp_path, rehearse=False, limit=None), Refuses()
    model = train([fallback, refuses], 10, "dynamic")
    assert refuses.climbed == Climbed(before="fp8-dynamic", after="fp32", replays=3)
    assert model.trainer.global_step == 10
    assert fallback.supervisor is not None
    assert fallback.supervisor.failed_at is None


def test_without_memory_for_high_precision_replays_recompute(tmp_path: Path) -> None:
    """There is more memory than FP8 needs, and less than high precision does."""
    low, high = ActivationBound(), ActivationBound()
    train([low], 2, "dynamic")
    fp32 = FP8Precision(base="32-true", layers={"*.0.fc1": "fp8-dynamic", "*": "fp32"})
    fit(fp32, max_steps=2, callbacks=[high], loader=batches(2))
    assert low.seen.most < high.seen.most
    bound = ActivationBound((low.seen.most + high.seen.most) // 2)
    fallback = PrecisionFallback(dirpath=tmp_path, rehearse=False)
    suspect = SuspectAt(fallback, 60, lasting=40)
    train([bound, Reversed(), suspect, fallback], 64, "dynamic")
    assert bound.seen.refused == 1  # the first time; from there on blocks compute again
    (demotion,) = events(tmp_path, Demotion)
    assert demotion.formats == {LAYER: ("fp8-dynamic", "fp32")}
    (rollback,) = events(tmp_path, Rollback)
    assert rollback.replayed == 60 - rollback.to_step


def test_a_stuck_scale_climbs_one_rung(tmp_path: Path) -> None:
    class Stuck(L.Callback):
        """A scale of grad_output stays 64 times too high."""

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            history = trainer.precision_plugin.precision_map.scale_history
            if trainer.global_step >= 70 and LAYER in history.names:
                index = history.names.index(LAYER)
                amax = history._history[index, 2].amax()
                history._scales[index, 2] = 64 * history._limits[index, 2] / amax

    fallback = PrecisionFallback(dirpath=tmp_path)
    model = train([Stuck(), fallback], 90)
    (climb,) = events(tmp_path, LayerClimb)
    assert climb.formats == {LAYER: ("fp8-delayed", "fp8-dynamic")}
    assert climb.step <= 76  # seen at every step once the headroom is negative
    assert "clamped mass of grad_output" in climb.reason
    assert model.trainer.precision_plugin.precision_map.formats()[LAYER] == "fp8-dynamic"
    assert not events(tmp_path, Demotion)


def test_nan_in_the_data_is_not_blamed_on_precision(tmp_path: Path) -> None:
    class Poison(LanguageModel):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss = super().training_step(batch, index)
            return loss * float("nan") if 70 <= index < 80 else loss

    fallback = PrecisionFallback(dirpath=tmp_path)
    model = train([fallback], 90, model=Poison())
    assert fallback.steps.skipped == 10
    assert not events(tmp_path, Demotion, LayerClimb, Rollback)
    assert {v.verdict for v in events(tmp_path, Verdict)} == {"not precision"}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any("it looks like" in note.reason for note in events(tmp_path, Note))


def test_a_dry_run_only_logs(tmp_path: Path) -> None:
    plain = train([Reversed()], 70, "dynamic")
    fallback = PrecisionFallback(dirpath=tmp_path, dry_run=True)
    model = train([Reversed(), SuspectAt(fallback, 60, lasting=40), fallback], 70, "dynamic")
    assert same_weights(plain, model)
    demotions = events(tmp_path, Demotion)  # the fault goes on, and is found again
    assert demotions
    assert all("nothing was changed" in demotion.action for demotion in demotions)
    assert not events(tmp_path, Rollback)


@pytest.mark.slow
def test_promotion_after_probation_and_a_longer_one_after_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the fault costs little by the second time, and this is not about how much is enough
    monkeypatch.setattr("lightning_fp.stability.respond.verdict.LEAST_GAIN", 0.002)
    for name, value in {"Z": 0.5, "FLOOR": 1e-4, "PLACEBO": 0.0}.items():
        monkeypatch.setattr(f"lightning_fp.stability.replay.paired.{name}", value)
    policy = FallbackPolicy(hold=20, grace=5)
    fallback = PrecisionFallback(dirpath=tmp_path, policy=policy, probe_every_n_steps=None)
    fault = Reversed()
    model = train([fault, SuspectAt(fallback, 60, 125, lasting=45), fallback], 190, "dynamic")
    states = [(event.before, event.after) for event in read_events(tmp_path, kinds=["state"])]
    demoted = [event.step for event in events(tmp_path, Demotion)]
    promoted = [event.step for event in read_events(tmp_path, kinds=["promote"])]
    assert demoted == [60, 125]
    assert promoted[0] == 80
    assert ("probation", "healthy") in states
    assert len(promoted) == 2
    assert promoted[1] == 165  # twice as long
    assert model.trainer.precision_plugin.precision_map.formats()[LAYER] == "fp8-dynamic"


# --- Around it ----------------------------------------------------------------------------------


def test_without_the_plugin_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"FP8Precision\(...\)"):
        fit(None, callbacks=[PrecisionFallback(dirpath=tmp_path)], max_steps=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("every_n_steps", 0), ("probe_every_n_steps", 0), ("snapshots", 0), ("ring_bytes", 0)],
)
def test_options_out_of_range(name: str, value: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        PrecisionFallback(**{name: value})


def test_a_bound_too_small_for_one_snapshot_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit_bytes must be at least"):
        train([PrecisionFallback(dirpath=tmp_path, snapshot_bytes=1000)], 2)


def test_memory_is_as_stated(tmp_path: Path) -> None:
    class Measure(L.Callback):
        def on_train_end(self, *_: Any) -> None:
            self.snapshots = supervisor_of(fallback).snapshots.nbytes
            self.one = supervisor_of(fallback).snapshots.kept[0].nbytes

    fallback, measure = PrecisionFallback(dirpath=tmp_path), Measure()
    train([measure, fallback], 300)
    (started,) = read_events(tmp_path, kinds=["started"])
    assert measure.one == pytest.approx(started.numbers["snapshot_bytes"], rel=0.05)
    assert measure.snapshots == pytest.approx(started.numbers["all_snapshots_bytes"], rel=0.05)


def test_a_failure_of_the_watch_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fallback = PrecisionFallback(dirpath=tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(Supervisor, "_boundary", fail)
    plain, watched = train([], 10), train([fallback], 10)
    assert same_weights(plain, watched)
    assert sum("the watch has failed;" in r.message for r in caplog.records) == 1


def test_with_a_monitor_both_look_at_the_same_samples(tmp_path: Path) -> None:
    monitor = ClampMonitor(dirpath=tmp_path, every_n_steps=4, log_every_n_steps=8)
    fallback = PrecisionFallback(dirpath=tmp_path)
    plain, watched = train([], 40), train([monitor, fallback], 40)
    assert same_weights(plain, watched)
    assert monitor.latest is not None
    assert not monitor.listeners


@pytest.mark.slow
def test_averages_go_back_too(tmp_path: Path) -> None:
    class Average(WeightAveraging):
        pass

    def run(fault: list[L.Callback], fallback: list[L.Callback]) -> Tensor:
        model = train([*fault, Average(), *fallback], 70, "dynamic")
        return model.model.blocks[1].fc1.weight.detach()  # Lightning puts the average here

    fallback = PrecisionFallback(dirpath=tmp_path)
    spoilt = run([Reversed()], [])
    saved = run([Reversed(), SuspectAt(fallback, 60, lasting=40)], [fallback])
    sound = run([], [])
    assert (saved - sound).norm() < 0.5 * (spoilt - sound).norm()
    assert events(tmp_path, Demotion)


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    class Manual(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            first, second = self.optimizers()
            loss = super().training_step(batch, index)
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss)
            first.step()
            second.step()
            for scheduler in self.lr_schedulers():
                scheduler.step()
            return loss

        def configure_optimizers(self) -> Any:
            parameters = list(self.parameters())
            optimizers = [
                torch.optim.AdamW(parameters[:7], 1e-3),
                torch.optim.AdamW(parameters[7:], 1e-3),
            ]
            return optimizers, [torch.optim.lr_scheduler.StepLR(o, 30, 0.9) for o in optimizers]

    plain = train([], 40, "dynamic", Manual())
    quiet = PrecisionFallback(dirpath=tmp_path / "quiet")
    watched = train([SuspectAt(quiet, 40), quiet], 40, "dynamic", Manual())
    assert same_weights(plain, watched)
    assert len(events(tmp_path / "quiet", Verdict)) == 2

    fallback = PrecisionFallback(dirpath=tmp_path / "fault")
    fault = Reversed(start=30)
    model = train([fault, SuspectAt(fallback, 110, lasting=70), fallback], 70, "dynamic", Manual())
    (demotion,) = events(tmp_path / "fault", Demotion)
    assert list(demotion.formats) == [LAYER]
    assert model.trainer.global_step == 140
    rates = [o.param_groups[0]["lr"] for o in model.trainer.optimizers]
    assert rates == pytest.approx([1e-3 * 0.9**2] * 2)


def test_a_compiled_block_is_replayed_eagerly_and_goes_on_compiled(tmp_path: Path) -> None:
    def compiled() -> LanguageModel:
        model = LanguageModel()
        model.model.blocks[1].compile(backend="aot_eager")  # what Inductor makes is another matter
        return model

    plain = train([], 30, "dynamic", compiled())
    counters = torch._dynamo.utils.counters
    counters.clear()
    fallback = PrecisionFallback(dirpath=tmp_path, limit=None)
    watched = train([SuspectAt(fallback, 20), fallback], 30, "dynamic", compiled())
    assert same_weights(plain, watched)
    assert len(events(tmp_path, Verdict)) == 2
    assert not counters["graph_break"]


# --- Resume -------------------------------------------------------------------------------------


class Interrupt(L.Callback):
    """Saves a checkpoint after a step, and ends the run there if asked to."""

    def __init__(self, step: int, path: Path, *, stop: bool) -> None:
        self.step, self.path, self.stop = step, path, stop

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            if self.stop:
                raise KeyboardInterrupt


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(step, marks=() if step == 58 else pytest.mark.slow, id=f"after {step}")
        for step in (40, 58, 62, 85, 105)
    ],
)
def test_a_resumed_run_decides_as_the_uninterrupted_one(step: int, tmp_path: Path) -> None:
    """In warm-up, while healthy, after a demotion, in probation, after a promotion."""

    def run(directory: Path, *, stop: bool, resume: Path | None = None) -> Any:
        fallback = PrecisionFallback(
            dirpath=directory, policy=FallbackPolicy(hold=30, grace=5), probe_every_n_steps=50
        )
        model = LanguageModel()
        trainer = make_trainer(
            plugin("dynamic"),
            max_epochs=1,
            callbacks=[
                Reversed(),
                SuspectAt(fallback, 60, 100, lasting=40),
                fallback,
                Interrupt(step, directory / "middle.ckpt", stop=stop),
            ],
        )
        with suppress(KeyboardInterrupt, SystemExit):
            trainer.fit(model, batches(120), ckpt_path=resume, weights_only=True)
        return model, fallback

    whole, kept = run(tmp_path / "whole", stop=False)
    run(tmp_path / "parts", stop=True)
    torch.load(tmp_path / "parts" / "middle.ckpt", weights_only=True)
    resumed, restored = run(
        tmp_path / "parts", stop=False, resume=tmp_path / "parts" / "middle.ckpt"
    )
    assert same_weights(whole, resumed)
    assert kept.steps == restored.steps
    assert kept.phase == restored.phase

    def told(directory: Path) -> list[str]:
        skip = ("resumed", "started")
        return [e.sentence() for e in read_events(directory) if e.kind not in skip]

    assert told(tmp_path / "whole") == told(tmp_path / "parts")


def test_model_checkpoint_keeps_working(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1)
    fallback = PrecisionFallback(dirpath=tmp_path)
    train([fallback, saver], 30, enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == 3


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.ERROR, "lightning_fp.fallback"):
        yield
