"""The guard before the optimizer's step: skips what is not finite, and changes nothing else."""

import itertools
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_fp import FP8Precision, FP16Precision
from lightning_fp.plugins.guard import StepGuard
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stepping.loss_scaler import LossScaler
from tests.helper import LanguageModel, fit, next_byte_loss, same_weights, text_loader


def guarded(**options: Any) -> FP8Precision:
    plugin = FP8Precision("dynamic", base="32-true", **options)
    plugin.guard = StepGuard()
    return plugin


class Poisoned(LanguageModel):
    """The loss of some steps is NaN; a scheduler counts."""

    def __init__(self, bad: tuple[int, ...] = (), optimizer: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.bad = bad
        self.make = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2))
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss = super().training_step(batch, index)
        return loss * float("nan") if index in self.bad else loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


@pytest.mark.parametrize(
    "options", [{}, {"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}]
)
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_nothing_changes_where_nothing_is_wrong(options: dict[str, Any], clip: str) -> None:
    options = {**options, "max_steps": 6, "gradient_clip_algorithm": clip}
    plain = fit(FP8Precision("dynamic", base="32-true"), Poisoned(), **options)
    plugin = guarded()
    watched = fit(plugin, Poisoned(), **options)
    assert same_weights(plain, watched)
    assert plain.rates == watched.rates
    assert plugin.guard is not None
    assert len(plugin.guard.steps) == 6
    assert not any(bool(step.skipped) for step in plugin.guard.steps)


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.5}])
def test_the_norm_is_that_before_clipping(clip: dict[str, Any]) -> None:
    norms: list[float] = []

    class Norms(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    plugin = guarded()
    fit(plugin, Poisoned(), max_steps=4, callbacks=[Norms()], **clip)
    assert plugin.guard is not None
    assert [float(step.grad_norm) for step in plugin.guard.steps] == norms


@pytest.mark.compatibility("optimizers", "fused optimizers", "works")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_a_bad_step_is_left_out_and_the_scheduler_waits(fused: bool, clip: str) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, fused=fused)

    plugin = guarded()
    options = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": clip}
    model = fit(plugin, Poisoned((2,), make), max_steps=5, **options)
    assert plugin.guard is not None
    assert [bool(step.skipped) for step in plugin.guard.steps] == [False, False, True, False, False]
    assert model.trainer.global_step == 5
    assert model.rates == [1e-2, 5e-3, 2.5e-3, 2.5e-3, 1.25e-3]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    state = model.trainer.optimizers[0].state_dict()["state"]
    assert all(entry["step"] == 4 for entry in state.values())
    scheduler = model.trainer.lr_scheduler_configs[0]
    assert scheduler.frequency == 1
    assert "step" not in vars(scheduler.scheduler)


def test_a_skipped_step_is_as_if_it_had_not_been() -> None:
    skipped = fit(guarded(), Poisoned((2,)), max_steps=4)
    other = FP8Precision("dynamic", base="32-true")
    reference = LanguageModel()
    other.convert_module(reference)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    batches = list(itertools.islice(text_loader(), 4))
    for index, batch in enumerate((batches[0], batches[1], batches[3])):
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5**index
        optimizer.zero_grad()
        next_byte_loss(reference, batch).backward()
        optimizer.step()
        other.precision_map.step()
    assert same_weights(skipped, reference)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_inf_is_seen_before_clipping_hides_it(clip: str) -> None:
    class Overflowing(Poisoned):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 1:
                parameter = next(self.parameters())
                assert parameter.grad is not None
                parameter.grad[0, 0] = float("inf")

    plugin = guarded()
    options = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": clip}
    model = fit(plugin, Overflowing(), max_steps=3, **options)
    assert plugin.guard is not None
    assert [bool(step.skipped) for step in plugin.guard.steps] == [False, True, False]
    assert float(plugin.guard.steps[1].grad_norm) == float("inf")
    assert model.rates == [1e-2, 5e-3, 5e-3]


def test_a_guard_that_only_looks_skips_nothing() -> None:
    plain = fit(FP8Precision("dynamic", base="32-true"), Poisoned((2,)), max_steps=4)
    plugin = guarded()
    assert plugin.guard is not None
    plugin.guard.skip_nonfinite = False
    watched = fit(plugin, Poisoned((2,)), max_steps=4)
    assert [bool(step.skipped) for step in plugin.guard.steps] == [False] * 4
    finite = [bool(torch.isfinite(step.grad_norm)) for step in plugin.guard.steps]
    assert finite == [True, True, False, False]
    assert plain.rates == watched.rates
    assert any(torch.isnan(p).any() for p in plain.parameters())


def test_accumulation_skips_the_whole_step() -> None:
    plugin = guarded()
    model = fit(plugin, Poisoned((3,)), max_steps=3, accumulate_grad_batches=2)
    assert plugin.guard is not None
    assert [bool(step.skipped) for step in plugin.guard.steps] == [False, True, False]
    assert model.rates == [1e-2, 1e-2, 5e-3, 5e-3, 5e-3, 5e-3]


def test_a_scaler_takes_part() -> None:
    """Unscaled before anything looks, and told what was found, once a step."""

    plugin, scaler = guarded(), LossScaler(LossScaling(init_scale=1024, hysteresis=2))

    class Scale(L.Callback):
        """Over a float32 base, where scaling by a power of two changes nothing."""

        def on_fit_start(self, *_: Any) -> None:
            plugin.base.scaler, plugin.guard = scaler, StepGuard(scaler=scaler)

    scaled = fit(plugin, Poisoned((2,)), max_steps=4, gradient_clip_val=0.5, callbacks=[Scale()])
    numbers = scaler.state.numbers()
    assert (numbers["made"], numbers["skipped"], numbers["scale"]) == (3, 1, 1024)
    other = guarded()
    plain = fit(other, Poisoned((2,)), max_steps=4, gradient_clip_val=0.5)
    assert same_weights(scaled, plain)  # a power of two rounds nothing
    assert other.guard is not None
    norms = [[float(s.grad_norm) for s in guard.steps] for guard in (plugin.guard, other.guard)]
    assert norms[0] == pytest.approx(norms[1], nan_ok=True)


def test_steps_of_a_replay_leave_no_record_and_hold_no_scheduler() -> None:
    plugin = guarded()
    guard = plugin.guard
    assert guard is not None

    class Replays(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            guard.replaying = True
            before = [p.detach().clone() for p in module.parameters()]
            for p in module.parameters():
                p.grad = torch.full_like(p, float("nan"))
            guard.step(plugin, trainer.optimizers[0], module, lambda: None)
            assert all(map(torch.equal, before, module.parameters()))
            guard.replaying = False

    model = fit(plugin, Poisoned(), max_steps=3, callbacks=[Replays()])
    assert len(guard.steps) == 3
    assert model.rates == [1e-2, 5e-3, 2.5e-3]
    assert same_weights(model, fit(guarded(), Poisoned(), max_steps=3))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("replays", [False, True])
def test_a_step_that_a_kernel_skipped_holds_the_scheduler_one_step_later(
    monkeypatch: pytest.MonkeyPatch, accumulate: int, replays: bool
) -> None:
    """On a device the host hears of it late: the schedulers wait at the next step instead.

    The fused kernel takes the same flag on the host, where otherwise it is not needed.
    """
    monkeypatch.setattr(StepGuard, "_takes_flag", staticmethod(lambda *_: True))

    def fused(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, fused=True)

    class BeginsTwice(L.Callback):
        """A replay at the boundary enters the plugin's step context too."""

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if replays:
                with trainer.precision_plugin.train_step_context():
                    pass

    plugin = guarded()
    bad = 2 * accumulate
    model = fit(
        plugin,
        Poisoned((bad,), fused),
        max_steps=5,
        accumulate_grad_batches=accumulate,
        callbacks=[BeginsTwice()],
    )
    assert plugin.guard is not None
    assert [bool(step.skipped) for step in plugin.guard.steps] == [False, False, True, False, False]
    rates = model.rates[::accumulate]
    assert rates == [1e-2, 5e-3, 2.5e-3, 1.25e-3, 1.25e-3]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    state = model.trainer.optimizers[0].state_dict()["state"]
    assert all(entry["step"] == 4 for entry in state.values())
    assert model.trainer.lr_scheduler_configs[0].frequency == 1


@pytest.mark.compatibility("optimizers", "several optimizers in manual optimization", "works")
def test_manual_optimization_with_two_optimizers() -> None:
    class Manual(Poisoned):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, index: int) -> None:
            first, second = self.optimizers()
            loss = next_byte_loss(self, batch)
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss * (float("nan") if index == 1 else 1.0))
            first.step()
            second.step()
            for scheduler in self.lr_schedulers():
                scheduler.step()
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

        def configure_optimizers(self) -> Any:
            parameters = list(self.parameters())
            optimizers = [
                torch.optim.SGD(parameters[:5], 0.1),
                torch.optim.SGD(parameters[5:], 0.1),
            ]
            return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]

    plugin = guarded()
    model = fit(plugin, Manual(), max_steps=6)
    assert plugin.guard is not None
    assert [bool(step.skipped) for step in plugin.guard.steps] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert model.rates == [0.05, 0.05, 0.025]
    assert all("step" not in vars(c.scheduler) for c in model.trainer.lr_scheduler_configs)


def test_lbfgs_steps_unguarded(caplog: pytest.LogCaptureFixture) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)

    plain = fit(FP8Precision("dynamic", base="32-true"), Poisoned((), make), max_steps=2)
    plugin = guarded()
    watched = fit(plugin, Poisoned((), make), max_steps=2)
    assert same_weights(plain, watched)
    assert plugin.guard is not None
    assert not plugin.guard.steps
    assert sum("LBFGS calls its closure itself" in r.message for r in caplog.records) == 1


class SharpnessAware(torch.optim.Optimizer):
    """Two passes through the closure; `zeroing` ones drop the first pass's gradients themselves."""

    def __init__(self, params: Any, *, zeroing: bool = False) -> None:
        super().__init__(params, {"lr": 0.05})
        self.zeroing = zeroing

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        moves = [p.grad * 0.05 for p in parameters]
        torch._foreach_add_(parameters, moves)
        if self.zeroing:
            self.zero_grad()
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(parameters, moves)
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)
        return loss


class TestClosuresCalledTwice:
    @pytest.mark.parametrize("zeroing", [False, True])
    @pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.1}])
    def test_as_without_a_guard(self, zeroing: bool, clip: dict[str, Any]) -> None:
        def make(parameters: Any) -> torch.optim.Optimizer:
            return SharpnessAware(parameters, zeroing=zeroing)

        plain = fit(
            FP8Precision("dynamic", base="32-true"), Poisoned((), make), max_steps=4, **clip
        )
        plugin = guarded()
        watched = fit(plugin, Poisoned((), make), max_steps=4, **clip)
        assert same_weights(plain, watched)
        assert plain.losses == watched.losses
        assert len(watched.losses) == 8
        assert plugin.guard is not None
        assert [bool(step.skipped) for step in plugin.guard.steps] == [False] * 4

    @pytest.mark.parametrize("bad", [0, 1])
    def test_what_is_not_finite_moves_nothing(self, bad: int) -> None:
        class Bad(Poisoned):
            def training_step(self, batch: Tensor, index: int) -> Tensor:
                loss = super().training_step(batch, index)
                return loss * float("nan") if len(self.losses) == 5 + bad else loss

        plugin = guarded()
        model = fit(plugin, Bad((), SharpnessAware), max_steps=4)
        clean = fit(guarded(), Poisoned((), SharpnessAware), max_steps=2)
        assert plugin.guard is not None
        assert [bool(step.skipped) for step in plugin.guard.steps] == [False, False, True, False]
        assert len(model.losses) == 8 - (bad == 0)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert model.losses[:4] == clean.losses

    def test_under_a_loss_scale(self) -> None:
        plain = fit(FP8Precision("bf16", base="32-true"), Poisoned((), SharpnessAware), max_steps=4)
        scaled = fit(FP16Precision(), Poisoned((), SharpnessAware), max_steps=4)
        assert scaled.losses == pytest.approx(plain.losses, rel=1e-2)
        assert len(scaled.losses) == 8


class Words(LanguageModel):
    """Embeddings with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.model.embed.sparse = True

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Dense(Words):
    def __init__(self) -> None:
        super().__init__()
        self.model.embed.sparse = False


@pytest.mark.parametrize("base", ["32-true", "16-true"])
def test_sparse_gradients_are_clipped_and_cast_as_dense_ones_are(base: Any) -> None:
    def weights(kind: type[LanguageModel]) -> list[Tensor]:
        half = base == "16-true"
        plugin: Any = FP16Precision(base) if half else FP8Precision("dynamic", base=base)
        plugin.start_guarding()
        model = fit(plugin, kind(), max_steps=4, gradient_clip_val=0.1)
        return [p.detach() for p in model.parameters()]

    # a row that occurs n times is a sum of n terms, in another order and rounded in 16 bits
    tolerance = 1e-5 if base == "32-true" else 1e-2
    for sparse, dense in zip(weights(Words), weights(Dense), strict=True):
        assert torch.allclose(sparse, dense, rtol=tolerance, atol=tolerance)
