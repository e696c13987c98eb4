"""Optimizers that do more than one plain step: what plain Lightning does, ours does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fp import (
    ClampMonitor,
    DivergenceDetector,
    FP8Precision,
    FP16Precision,
    PrecisionFallback,
)
from tests.cases.programs import PLAIN, Program, error, fit, high, made, rows, weights


class Ascent(torch.optim.Optimizer):
    """Climbs to the worst point nearby, `climbs` times, and descends by the gradient found there.

    Sharpness-aware minimisation is one climb. With `drop` the gradients of a climb are dropped
    before the closure is called again, as widely used implementations do.
    """

    def __init__(self, params: Any, climbs: int = 1, drop: bool = False) -> None:
        super().__init__(params, {"lr": 0.05, "rho": 0.02})
        self.climbs, self.drop = climbs, drop

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            raise RuntimeError("needs a closure")
        [group] = self.param_groups
        start = [parameter.clone() for parameter in group["params"]]
        with torch.enable_grad():
            loss = closure()
        for _ in range(self.climbs):
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=group["rho"])
            if self.drop:
                self.zero_grad()
            with torch.enable_grad():
                closure()
        for parameter, before in zip(group["params"], start, strict=True):
            parameter.copy_(before).sub_(parameter.grad, alpha=group["lr"])
        return loss


class Climbing(Program):
    climbs, drop, calls = 1, False, 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.calls += 1
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return Ascent(self.parameters(), self.climbs, self.drop)


@pytest.mark.compatibility("optimizers", "SAM: the closure is called several times", "works")
@pytest.mark.parametrize(("climbs", "drop"), [(1, False), (1, True), (2, True)])
def test_a_closure_is_called_as_often_as_the_optimizer_likes(
    tmp_path: Path, climbs: int, drop: bool
) -> None:
    plain = made(Climbing, climbs=climbs, drop=drop)
    fit(plain, PLAIN, tmp_path)
    assert plain.calls == 4 * (1 + climbs)
    for plugin, callbacks in (
        (high(), []),
        (high(), [PrecisionFallback()]),
        (FP8Precision("delayed"), [PrecisionFallback(rehearse=False)]),
    ):
        ours = made(Climbing, climbs=climbs, drop=drop)
        fit(ours, plugin, tmp_path, *callbacks)
        assert ours.calls == plain.calls
        assert error(weights(ours), weights(plain)) < 0.01
    ours = made(Climbing, climbs=climbs, drop=drop)
    fit(ours, FP16Precision(), tmp_path)
    assert ours.calls == plain.calls
    assert error(weights(ours), weights(plain)) < 0.01


class Ahead(torch.optim.Optimizer):
    """Moves to another point before it asks for the gradient there, as schedule-free ones do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        [group] = self.param_groups
        start = [parameter.clone() for parameter in group["params"]]
        for parameter in group["params"]:
            parameter.mul_(1.5)
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for parameter, before in zip(group["params"], start, strict=True):
            parameter.copy_(before).sub_(parameter.grad, alpha=group["lr"])
        return loss


class Behind(torch.optim.SGD):
    """Steps by what has been accumulated so far, and then runs the closure."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        return closure()


class Looking(Program):
    optimizer: Any = Ahead
    bad = -1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch) * (torch.inf if batch_idx == self.bad else 1)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


WATCHED = [
    lambda: (high(), PrecisionFallback()),
    lambda: (FP16Precision(),),
    lambda: (FP16Precision("16-true"),),
]


@pytest.mark.compatibility("optimizers", "schedule-free: weights move before the closure", "works")
@pytest.mark.parametrize("watched", WATCHED, ids=["high", "16-mixed", "16-true"])
def test_a_step_left_out_ends_where_the_optimizer_began(tmp_path: Path, watched: Any) -> None:
    plain, ours = made(Looking), made(Looking, bad=2)
    plugin, *callbacks = watched()
    without = torch.cat([rows(32)[:16], rows(32)[24:]])
    fit(plain, PLAIN, tmp_path, data=DataLoader(without, batch_size=8))
    fit(ours, plugin, tmp_path, *callbacks)
    assert error(weights(ours), weights(plain)) < 1e-3


@pytest.mark.parametrize("plugin", [high, FP16Precision], ids=["high", "16-mixed"])
def test_gradients_that_an_optimizer_looks_at_first_are_without_the_loss_scale(
    tmp_path: Path, plugin: Any
) -> None:
    plain, ours = made(Looking, optimizer=Behind), made(Looking, optimizer=Behind)
    fit(plain, PLAIN, tmp_path, accumulate_grad_batches=2)
    fit(ours, plugin(), tmp_path, accumulate_grad_batches=2)
    assert error(weights(ours), weights(plain)) < 1e-3


class Without(Program):
    def configure_optimizers(self) -> None:
        return None


@pytest.mark.compatibility("optimizers", "none (`configure_optimizers` returns None)", "works")
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("scaling", ["high", "delayed"])
def test_a_module_without_an_optimizer_is_watched_as_others(tmp_path: Path, scaling: Any) -> None:
    before, module = made(Without), made(Without)
    fit(module, FP8Precision(scaling), tmp_path, PrecisionFallback(), ClampMonitor())
    assert torch.equal(weights(module), weights(before))


class Newton(Program):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@pytest.mark.compatibility(
    "optimizers",
    "LBFGS",
    "works with a note",
    "non-finite steps are not skipped; a warning says so",
)
def test_lbfgs_evaluates_its_closure_in_the_layers_formats(tmp_path: Path) -> None:
    plain, ours = made(Newton), made(Newton)
    fit(plain, PLAIN, tmp_path)
    fit(ours, high(), tmp_path)
    assert torch.equal(weights(ours), weights(plain))


class Generator(L.LightningModule):
    """Two networks; the critic steps between the generator's forward and its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32))
        self.judge = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        made = self.make(batch[:, :16])
        second.zero_grad()
        self.manual_backward(-self.judge(made.detach()).float().mean())
        second.step()
        first.zero_grad()
        self.manual_backward(made.float().square().mean())
        first.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (self.make, self.judge)]


@pytest.mark.compatibility("optimizers", "two networks in turns (GAN)", "works")
@pytest.mark.parametrize("scaling", ["delayed", "dynamic"])
def test_another_optimizer_steps_between_forward_and_backward(tmp_path: Path, scaling: str) -> None:
    plain, ours = made(Generator), made(Generator)
    fit(plain, PLAIN, tmp_path)
    fit(ours, FP8Precision(scaling), tmp_path)
    assert error(weights(ours), weights(plain)) < 0.05


class ByData(torch.optim.SGD):
    """Writes through `.data`, which no version counter sees, then pulls to slow weights."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.data.clone())
                parameter.data.add_(parameter.grad, alpha=-group["lr"])
                slow.lerp_(parameter.data, 0.5)
                parameter.data.copy_(slow)
        return loss


class Slow(Program):
    def configure_optimizers(self) -> Any:
        return ByData(self.parameters(), lr=0.5)


@pytest.mark.compatibility("optimizers", "writes through `.data` (Lookahead and others)", "works")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_writes_that_raise_no_version_are_seen_by_the_next_forward(
    tmp_path: Path, accumulate: int
) -> None:
    plain, ours = made(Slow), made(Slow)
    fit(plain, PLAIN, tmp_path, accumulate_grad_batches=accumulate, max_epochs=3)
    fit(ours, FP8Precision("delayed"), tmp_path, accumulate_grad_batches=accumulate, max_epochs=3)
    assert error(weights(ours), weights(plain)) < 0.05


class Sparse(Program):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32, sparse=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        chosen = (torch.arange(len(batch)) * 3 + batch_idx) % 40
        return self.loss(batch + self.table(chosen))


class Spectral(Program):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.ones(17, dtype=torch.complex64) * (0.5 + 0.5j))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(torch.fft.irfft(torch.fft.rfft(batch.float()) * self.filter, n=32))


@pytest.mark.compatibility("optimizers", "sparse gradients", "works")
@pytest.mark.compatibility("dtypes", "complex Parameters beside the layers", "works")
@pytest.mark.parametrize("kind", [Sparse, Spectral])
@pytest.mark.parametrize("base", ["fp8", "16-mixed", "16-true"])
def test_sparse_gradients_and_complex_parameters_are_watched_as_others(
    tmp_path: Path, kind: type[Program], base: Any
) -> None:
    plain, ours = made(kind), made(kind)
    data = DataLoader(rows(8 * 12), batch_size=8)
    fit(plain, PLAIN, tmp_path, data=data)
    plugin = FP8Precision("delayed") if base == "fp8" else FP16Precision(base)
    watch = [PrecisionFallback(detector=DivergenceDetector(armed=16))]
    watch += [ClampMonitor(every_n_steps=2)] if base == "fp8" else []
    trainer = fit(ours, plugin, tmp_path, *watch, data=data)
    assert trainer.global_step == 12
    assert error(weights(ours), weights(plain)) < 0.05
    assert not [f for f in tmp_path.rglob("events.jsonl") if "failed" in f.read_text()]
